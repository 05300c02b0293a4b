"""Run a stage with the options of a verb. Imports Ray and torch only when a stage needs them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
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


def spare_ray(common: CommonOptions, cluster: ClusterConfig, *, small: bool) -> CommonOptions:
    """The options with `local` set for `small` work, unless a cluster, more workers or GPUs are named.

    Starting Ray on one machine takes longer than such work. The result is the same.
    """
    named = os.environ.get("RAY_ADDRESS") or cluster.gpus or cluster.workers != ClusterConfig.workers
    return replace(common, local=True) if small and not named else common


def seal_and_print(stage: "Stage", options: Any, **how: Any) -> int:
    """Bring a stage to its sealed state and print its result. `how` goes to `run_stage` of the driver."""
    from jobs.telemetry.observe import observe
    from jobs.telemetry.trackers.trackers import check_choices
    from pipeline.stages.driver import run_stage
    overwrite = options.stage.overwrite
    check_choices(options.stage.tracker)
    check_unpublished(stage, overwrite)
    if options.common.dry_run:
        return print_forecast(stage, options, options.cluster)
    with (open_runner(options.common, options.cluster) as runner,
          observe(stage, trackers=options.stage.tracker) as observers):
        manifest = observers.sealed(run_stage(stage, runner, watch=observers.watch, overwrite=overwrite, **how))
    print_result(stage, manifest, options)
    return 0


def check_unpublished(stage: "Stage", overwrite: bool) -> None:
    """ValueError if the stage would be written into a published version, which never changes, or a removed one.

    DamagedFile if a published version has lost the stage: made again, it would have another hash than the release says.
    """
    from jobs.publishing.whole_versions import find_replacement, is_signed, refuse_removed
    from pipeline.datasets.dataset import RELEASED_STAGES, Dataset
    from pipeline.releases import release_files
    from pipeline.releases.published import Published
    parts = stage.path.split("/")
    if parts[0] != "datasets" or parts[3] not in RELEASED_STAGES:
        return
    dataset, stage_name = Dataset(stage.root, parts[1], parts[2]), parts[3]
    refuse_removed(dataset, stage_name)
    release, sealed = release_files.read_release(dataset)[0], dataset.is_sealed(stage_name)
    if release is None or (sealed and not overwrite):
        return
    current = Published.load(dataset.root, dataset.name)
    if not sealed and stage_name in release["manifests"]:
        command = find_replacement(current, dataset.version)
        raise storage.DamagedFile(f"{dataset.name}@{dataset.version} was published, and the manifest of its "
                                  f"{stage_name} is lost: made again, it would be another\nhint: {command}")
    if overwrite or stage_name == "tombstones":
        raise ValueError(f"{dataset.name}@{dataset.version} was published, and a published version never changes\n"
                         f"hint: python -m jobs rebuild {dataset.name} --source SOURCE{current.sign_option}, or name a "
                         f"new version: {dataset.name}@{dataset.next_version().version}")
    if is_signed(current, dataset.version):
        raise ValueError(f"{dataset.name}@{dataset.version} is signed, and its signature does not cover {stage_name}: "
                         f"readers with the key would refuse it\n"
                         f"hint: python -m jobs rebuild {dataset.name} --source SOURCE --embed-captions --sign KEYFILE")


def print_forecast(stage: "Stage", options: Any, cluster: ClusterConfig | None = None, *,
                   replaces: bool = False) -> int:
    """Print what the stage would do. `replaces`: it replaces existing results also without --overwrite."""
    from jobs.cluster.gpus import check_gpus
    from jobs.inspection import status
    if cluster:
        check_gpus(stage, cluster)
    forecast = status.forecast_stage(stage, overwrite=options.stage.overwrite or replaces)
    output.print_document(forecast, as_json=options.stage.json, indent=1)
    return 0


def print_result(stage: "Stage", manifest: dict[str, Any], options: Any) -> None:
    """Print the result of a stage: a summary and the next command for people, one JSON document for programs."""
    from jobs.inspection import summary
    if not output.wants_json(options.stage.json):
        output.print_text(summary.summarize_stage(stage, manifest))
        _suggest(summary.next_command(stage))
        return
    totals = manifest["totals"]
    ledger = {"ledger": storage.join(stage.folder, "ledger")} if totals["skipped"] or totals["noted"] else {}
    facts = {key: value for key, value in manifest["info"].items() if isinstance(value, int | float | str)}
    output.print_json({"folder": stage.folder, **ledger, **totals, **facts})


_held: list[str] | None = None  # the next commands of a pipeline; only the last one is printed


@contextlib.contextmanager
def suggest_once() -> Iterator[None]:
    """Print only the last of the next commands inside, at the end."""
    global _held
    if _held is not None:  # a pipeline prints it
        yield
        return
    _held = []
    try:
        yield
        if _held and _held[-1]:
            output.print_next(_held[-1])
    finally:
        _held = None


def _suggest(command: str) -> None:
    if _held is not None:
        _held.append(command)
    elif command:
        output.print_next(command)
