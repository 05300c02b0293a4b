"""Run a stage with the options of a verb. Imports Ray and torch only when a stage needs them."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.cli.options import CommonOptions
from jobs.cluster.config import ClusterConfig
from jobs.telemetry import interrupts, output
from pipeline import storage

if TYPE_CHECKING:
    from pipeline.stages.driver import Runner
    from pipeline.stages.stage import Stage


@contextlib.contextmanager
def open_runner(common: CommonOptions, cluster: ClusterConfig) -> Iterator["Runner"]:
    """The runner of a command: this process with --local, otherwise actors that live as long as the command."""
    from jobs.cluster.gpus import InProcess, local_device
    from pipeline.hardware import devices
    if common.local:
        with devices.reserve_temporarily(local_device(cluster)):
            yield InProcess(cluster)
        return
    with interrupts.defer_interrupts():  # an import may swallow the exception of a signal
        from jobs.cluster.actor_pool import Pool
    pool = Pool(cluster)
    try:
        with devices.reserve_temporarily("cpu"):  # the driver reserved no GPU
            yield pool
    finally:
        pool.close()


def seal_and_print(stage: "Stage", options: Any, **how: Any) -> int:
    """Bring a stage to its sealed state and print its result. `how` goes to `run_stage` of the driver."""
    from jobs.telemetry.observe import observe
    from pipeline.stages.driver import run_stage
    overwrite = options.stage.overwrite
    check_unpublished(stage, overwrite)
    if options.common.dry_run:
        return print_forecast(stage, overwrite, options.cluster)
    with (open_runner(options.common, options.cluster) as runner,
          observe(stage, tracker=options.stage.tracker) as observers):
        manifest = observers.sealed(run_stage(stage, runner, watch=observers.watch, overwrite=overwrite, **how))
    print_result(stage, manifest)
    return 0


def check_unpublished(stage: "Stage", overwrite: bool) -> None:
    """ValueError if the stage would be written into a published version. Published versions never change."""
    from pipeline.datasets import published
    from pipeline.datasets.dataset import Dataset
    parts = stage.path.split("/")
    if parts[0] == "datasets" and parts[3] in published.STAGES:
        dataset = Dataset(stage.root, parts[1], parts[2])
        sealed = dataset.is_sealed(parts[3])
        if (overwrite or (parts[3] == "tombstones" and not sealed)) and published.read_release(dataset)[0]:
            raise ValueError(f"{dataset.name}@{dataset.version} was published, and a published version never changes\n"
                             f"hint: python -m jobs rebuild {dataset.name} --source SOURCE makes the next version; or "
                             f"write {dataset.name}@{dataset.next_version().version}")


def print_forecast(stage: "Stage", overwrite: bool = False, cluster: ClusterConfig | None = None) -> int:
    """Print what running the stage would do."""
    from jobs.cluster.gpus import check_gpus
    from jobs.inspection import status
    if cluster:
        check_gpus(stage, cluster)
    output.print_json(status.forecast_stage(stage, overwrite=overwrite), indent=1)
    return 0


def print_result(stage: "Stage", manifest: dict[str, Any]) -> None:
    """Print one JSON document: the folder, its ledger if it has one, counts and facts."""
    totals = manifest["totals"]
    ledger = {"ledger": storage.join(stage.folder, "ledger")} if totals["skipped"] or totals["noted"] else {}
    facts = {key: value for key, value in manifest["info"].items() if isinstance(value, int | float | str)}
    output.print_json({"folder": stage.folder, **ledger, **totals, **facts})
