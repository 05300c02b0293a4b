"""What each verb of the command line does: `(command, settings) -> exit code`.

What loads torch or Ray is imported where it is used: a look at the status is not to wait for them.
"""

import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jobs import commands
from jobs.cli.pipeline import pipeline_steps
from jobs.cluster.config import ClusterConfig
from jobs.cluster.gpus import InProcess, check_gpus, local_device
from jobs.config.settings import Settings
from jobs.inspection import status
from jobs.report import report
from jobs.runs.labels import run_labels, stage_labels
from jobs.runs.run import Run
from jobs.telemetry import interrupts, logs, tables
from jobs.telemetry.observe import run_observed
from jobs.training.train_stage import Job, Training
from pipeline import storage
from pipeline.datasets import published
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.hidden_rows import Tombstones
from pipeline.embeddings.clip_retrieval import AdoptEmbeddings, Export
from pipeline.embeddings.clip_weights import ClipConfig
from pipeline.embeddings.embed import Embed, EmbedCaptions
from pipeline.hardware import devices
from pipeline.indices.choose import check_autofaiss
from pipeline.indices.extend import Extension
from pipeline.indices.index import Index, build_index
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards import deduplicate
from pipeline.shards.adopt import Adopt
from pipeline.shards.shard import Shard
from pipeline.stages.driver import Runner, run_stage
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import check_and_clear, prepare
from pipeline.stages.stage import Stage
from pipeline.versions import verify

_log = logging.getLogger(__name__)
STOPPED = 130


def _shard(command: commands.ShardCommand, settings: Settings) -> int:
    dataset = Dataset.parse(command.common.root, command.dataset)
    if not 0 <= command.max_failed <= 1:
        raise ValueError(f"--max-failed {command.max_failed}: a share of the rows, within 0 and 1")
    if command.adopt:
        if command.retry_failed:
            raise ValueError("--adopt takes tars as they are: there is nothing to try again")
        return _run(Adopt(dataset, command.shard), command)
    if command.retry_failed and storage.exists(storage.join(dataset.folder("shards"), "manifest.json")):
        following = dataset.following()
        _log.info("shard: %s is sealed; rows that failed are tried again for %s", dataset.label, following.label)
        return _run(Shard(following, command.shard, base=dataset), command)
    if command.shard.duplicates != "keep" and not command.common.dry_run:
        return _sift(deduplicate.Deduplicate(dataset, command.shard), command)
    return _run(Shard(dataset, command.shard), command)


def _sift(sifted: deduplicate.Deduplicate, command: commands.ShardCommand) -> int:
    with runner(command) as run_with:
        def seal(stage_: Shard) -> dict[str, Any]:
            first = stage_ is sifted.whole
            return run_observed(stage_, run_with, name="shard" if first else "sift", tracker=command.stage.tracker,
                               retry=command.retry_failed and first, max_failed=command.max_failed)

        manifest = deduplicate.deduplicate_shards(sifted, seal, overwrite=command.stage.rebuild)
    _done(sifted, manifest)
    return 0


def _embed(command: commands.EmbedCommand, settings: Settings) -> int:
    dataset = Dataset.parse(command.common.root, command.dataset)
    stages = [AdoptEmbeddings(dataset, command.embed, command.adopt) if command.adopt
              else Embed(dataset, command.embed)]
    if command.captions:
        stages.append(EmbedCaptions(dataset, command.embed))
    code = next((code for one in stages if (code := _run(one, command))), 0)
    if command.export and not code and not command.common.dry_run:
        code = _run(Export(dataset, command.embed), command)
    return code


def _index(command: commands.IndexCommand, settings: Settings) -> int:
    dataset = Dataset.parse(command.common.root, command.dataset)
    if command.tombstone and command.extend:
        raise ValueError("--tombstone leaves the index as it is, --extend makes one: these are two commands")
    if command.tombstone:
        return _run(Tombstones(dataset, command.tombstone), command)
    index = Index(dataset, command.index)
    if command.extend:
        index = Extension(dataset, Dataset.parse(command.common.root, command.extend), command.index)
    _unreleased(index, command.stage.rebuild)
    if command.common.dry_run:
        return _dry_run(index, command.stage.rebuild)
    with runner(command) as run_with:
        manifest = build_index(index, lambda one: run_observed(one, run_with, name=one.name.replace("_", " "),
                                                               tracker=command.stage.tracker),
                                overwrite=command.stage.rebuild)
    _done(index, manifest)
    return 0


def _torch_first() -> None:
    """Load torch before faiss: after it, in a job's driver, MKL now and then does not load and ends the process."""
    import torch  # noqa: F401


def _rebuild(command: commands.RebuildCommand, settings: Settings) -> int:
    from jobs.publishing.rebuild import Rebuild, run_rebuild
    root, name = storage.normalize(command.common.root), Dataset.parse(command.common.root, command.dataset).name
    if "@" in command.dataset:
        raise ValueError(f"{command.dataset}: a rebuild makes the next version itself\nhint: rebuild {name}")
    one = Rebuild(root, name, command.shard, command.embed, command.index, command.rebuild)
    if command.common.dry_run:
        print(json.dumps(one.forecast(), indent=1))
        return 0
    _torch_first()
    check_autofaiss()
    with runner(command) as run_with:
        print(json.dumps(run_rebuild(one, lambda stage_: run_observed(
            stage_, run_with, name=stage_.name.replace("_", " "), tracker="auto"))))
    return 0


def _name(command: Any, hint: str) -> str:
    """The name of a dataset, of which a verb means all versions."""
    name = Dataset.parse(command.common.root, command.dataset).name
    if "@" in command.dataset:
        raise ValueError(f"{command.dataset}: this is about all versions of {name}\nhint: {hint}")
    return name


def _versions(command: commands.VersionsCommand, settings: Settings) -> int:
    from jobs.publishing.releases import list_versions, versions_table
    found = list_versions(command.common.root, _name(command, f"versions {command.dataset.split('@')[0]}"))
    print(json.dumps(found, indent=1) if command.json else versions_table(found))
    return 0


def _rollback(command: commands.RollbackCommand, settings: Settings) -> int:
    from jobs.publishing.releases import rollback
    plain, _, version = command.dataset.partition("@")
    name = _name(command, f"rollback {plain} --to {version}")
    print(json.dumps(rollback(command.common.root, name, command.to, dry_run=command.common.dry_run)))
    return 0


def _gc(command: commands.GcCommand, settings: Settings) -> int:
    from jobs.publishing.releases import collect_garbage, removed_table
    name = _name(command, f"gc {command.dataset.split('@')[0]} --keep 3")
    found = collect_garbage(command.common.root, name, command.gc, dry_run=command.common.dry_run)
    print(json.dumps(found, indent=1) if command.json else removed_table(found, command.common.dry_run))
    return 0


def _credits(command: commands.CreditsCommand, settings: Settings) -> int:
    from jobs.publishing import credits
    found = credits.list_credits(command.drawn)
    if command.sheet and not command.common.dry_run:
        credits.sheet(found, Path(command.sheet))
        _log.info("credits: the pictures are in %s", command.sheet)
    print(json.dumps(found, indent=1) if command.json else credits.text(found))
    return 0


def _forget(command: commands.ForgetCommand, settings: Settings) -> int:
    from jobs.publishing import forget
    root = command.common.root
    wanted = forget.parse_takedown(root, command.sha256, command.url, command.key, command.domain)
    found = forget.forget(root, wanted, command.note, dry_run=command.common.dry_run)
    print(json.dumps(found, indent=1) if command.json else forget.text(found))
    return 0


def _neighbors(command: commands.NeighborsCommand, settings: Settings) -> int:
    dataset = published.reader(command.common.root, command.dataset)
    database = published.reader(command.common.root, command.database or command.dataset)
    return _run(Neighbors(dataset, database, command.neighbors), command)


def _latents(command: commands.LatentsCommand, settings: Settings) -> int:
    from jobs.training.latents import Latents
    return _run(Latents(published.reader(command.common.root, command.dataset), command.latents), command)


def _convert(command: commands.ConvertCommand, settings: Settings) -> int:
    from jobs.training.convert import Convert
    from jobs.training.export import Import
    root = command.common.root
    run = Run.parse(root, command.run)
    if Path(command.checkpoint).is_dir():
        convert: Stage = Import(run, Path(command.checkpoint))
    elif not command.database:
        raise ValueError("a released checkpoint does not say which encoder it was trained with\n"
                         "hint: --database NAME, a dataset that was embedded by it")
    else:
        convert = Convert(run, command.checkpoint, Dataset.parse(root, command.database), command.convert)
    if command.common.dry_run:
        return _dry_run(convert, command.stage.rebuild)
    _done(convert, run_stage(convert, overwrite=command.stage.rebuild))
    return 0


def _export(command: commands.ExportCommand, settings: Settings) -> int:
    from jobs.training.export import export_weights
    run, out = Run.parse(command.common.root, command.run), Path(command.out)
    if command.common.dry_run:
        print(json.dumps({"folder": str(out), "step": command.checkpoint or run.latest_step()}))
        return 0
    print(json.dumps(export_weights(run, command.checkpoint, out)))
    return 0


def _train(command: commands.TrainCommand, settings: Settings) -> int:
    # torchrun has started processes of its own; it would take --local for one of its own flags.
    local = command.common.local or "TORCHELASTIC_RUN_ID" in os.environ
    run = Run.parse(command.common.root, command.run)
    # A run goes on with the versions that it began with, whatever is published meanwhile.
    pinned = {} if command.stage.rebuild else run.planned()

    def reader(text: str, what: str) -> Dataset:
        return published.reader(run.root, text, pinned.get(what, ""))

    job = Job(run, reader(command.dataset, "dataset"), reader(command.database or command.dataset, "database"),
              command.train, command.on_latents,
              published.reader(run.root, command.validation) if command.validation else None, command.stage.tracker)
    training = Training(job)
    if command.common.dry_run:
        return _dry_run(training, config=command.cluster)
    manifest = train(job, command.cluster, local=local, overwrite=command.stage.rebuild)
    if manifest:
        _done(training, manifest)
    # Another process of torchrun's speaks for the run where this one does not.
    return 0 if manifest or os.environ.get("RANK", "0") != "0" else STOPPED


def train(job: Job, config: ClusterConfig, *, local: bool, overwrite: bool = False) -> dict[str, Any] | None:
    """Bring a run to its sealed state; None in a process that does not speak for the run, or was stopped."""
    with logs.about(run_labels(job.dataset.name, job.dataset.version, job.run.name)):
        return _trained(job, config, local, overwrite)


def _trained(job: Job, config: ClusterConfig, local: bool, overwrite: bool) -> dict[str, Any] | None:
    training = Training(job)
    check_gpus(training, config)
    training.check()
    if overwrite and os.environ.get("RANK", "0") == "0":
        check_and_clear(training)
    sealed = storage.join(training.folder, "manifest.json")
    # Of torchrun's processes one empties the folder: what the others see there meanwhile means nothing.
    if not overwrite and storage.exists(sealed):
        prepare(training)
        manifest = read_manifest(training.folder, training.command)
        if manifest["info"]["steps"] >= job.config.steps:
            return manifest
    if local:
        from jobs.training.worker import train_in_processes
        with devices.reserving(local_device(config)):
            if not train_in_processes(job):
                return None
    else:
        with interrupts.held():
            from jobs.training.ray_train import train_on_ray
        train_on_ray(job, config, lambda line: _log.info(
            "train: step %d of %d, loss %.4f, %.0f samples/s", line["step"], job.config.steps, line["loss"],
            line["samples_per_s"], extra={"fields": line}))
    if job.run.latest_step() < job.config.steps:
        _log.info("train: stopped at step %d; the same command goes on from there", job.run.latest_step())
        return None
    if storage.exists(sealed):  # a finished run that was given more steps
        storage.remove(sealed)
        storage.remove(storage.join(training.folder, "records", "run.json"))
    return run_stage(training)


def _sample(command: commands.SampleCommand, settings: Settings) -> int:
    from jobs.sampling.mixture import Mixture
    from jobs.sampling.sample_stage import Sampling
    root = command.common.root
    encoder = ClipConfig(command.model or settings.embed.model, command.pretrained or settings.embed.pretrained,
                              settings.embed.precision)
    return _run(Sampling(Run.parse(root, command.run), command.checkpoint, command.prompt,
                         tuple(Mixture.parse(root, name) for name in command.database), encoder, command.sample,
                         command.name, pictures=command.image, asked=command.asked), command)


def _evaluate(command: commands.EvaluateCommand, settings: Settings) -> int:
    from jobs.evaluation.evaluate_stage import Evaluation, same_data
    from jobs.evaluation.judge_stage import Judging
    root = command.common.root
    run = Run.parse(root, command.run)
    trained = run.section()
    if "dataset" not in trained:
        raise ValueError(f"the run {run.name} was not trained here: what it has seen is not known")
    dataset, mixed = (Dataset.parse(root, trained[name]) for name in ("dataset", "database"))
    newest = {one.name: one for one in sorted(datasets(root), key=lambda one: (len(one.version), one.version))
              if one.sealed("index") and one.name not in {dataset.name, mixed.name}}
    newest |= {name: published.reader(root, name) for name in newest if published.current(root, name)}
    databases = [published.reader(root, name) for name in command.database] or list(newest.values())
    same_data(run, dataset)
    judging = Judging(run, dataset, databases, command.evaluate.judge_steps)
    if command.common.dry_run:
        return _dry_run(judging, command.stage.rebuild, command.cluster)
    with runner(command) as run_with:
        run_observed(judging, run_with, tracker=command.stage.tracker, overwrite=command.stage.rebuild)
        evaluation = Evaluation(judging, mixed, command.checkpoint, settings.embed.clip(), command.evaluate,
                                command.sample, command.prompt, command.name)
        run_observed(evaluation, run_with, tracker=command.stage.tracker, overwrite=command.stage.rebuild)
    _log.info("evaluate: pictures, plot and numbers are in %s", evaluation.folder)
    file = storage.join(evaluation.folder, "evaluation.json" if command.json else "table.md")
    shown = storage.read_bytes(file).decode()
    print(shown if command.json else tables.render_markdown(shown), end="")
    return 0


def _report(command: commands.ReportCommand, settings: Settings) -> int:
    root = storage.normalize(command.common.root)
    out = command.out or storage.join(root, "report.html")
    if command.common.dry_run:
        print(f"would write {out}")
        return 0
    if not status.read_status(root):
        raise ValueError(f"there is nothing in {root} to report on\nhint: --root")
    report.write(root, out)
    print(out)
    return 0


def _status(command: commands.StatusCommand, settings: Settings) -> int:
    root = storage.normalize(command.common.root)
    if command.watch and command.serve:
        raise ValueError("--watch shows it here, --serve to others: these are two commands")
    try:
        if command.serve:
            from jobs.inspection import prometheus
            prometheus.serve(root, command.serve)
        elif command.watch:
            from jobs.inspection import watch
            watch.show(root, as_json=command.json)
        else:
            found = status.read_status(root)
            print(json.dumps(found, indent=1) if command.json else status.status_table(root, found), flush=True)
    except KeyboardInterrupt:
        if not (command.watch or command.serve):
            raise
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _verify(command: commands.VerifyCommand, settings: Settings) -> int:
    root = storage.normalize(command.common.root)
    only = command.only.strip("/")
    found = [one for one in status.read_status(root) if not only or f"{one['path']}/".startswith(f"{only}/")]
    chain: list[dict[str, str]] = []
    if command.against == "current":
        from jobs.publishing.releases import against_current
        current, chain = against_current(root)
        found = [one for one in found if one["path"].startswith(current)]
    folders = [one["path"] for one in found if one["state"] in {"sealed", "stale", "damaged"}]
    if command.common.dry_run:
        print("\n".join(folders))
        return 0
    damaged = [{"path": one["path"], "fault": one["error"]} for one in found if one["state"] == "damaged"]
    faults = 0
    for fault in itertools.chain(chain, damaged, *(verify.folder(root, path, quick=command.quick) for path in folders)):
        faults += 1
        print(json.dumps(fault) if command.json else f"{fault['path']}: {fault['fault']}")
    _log.info("verify: %d folders read, %d faults", len(folders), faults)
    if not folders and not chain:
        raise ValueError(f"nothing is sealed in {storage.join(root, only)}")
    return 1 if faults else 0


def _plan(command: commands.PlanCommand, settings: Settings) -> int:
    from jobs.planning import plan_table
    if command.measure and command.common.dry_run:
        print(json.dumps(plan_table.to_measure(command, settings)))
        return 0
    if command.measure:
        workers = plan_table.workers_here(command, settings)
        with runner(SimpleNamespace(common=command.common, cluster=workers)) as run_with:
            command = plan_table.measure(command, settings, workers, lambda one: run_observed(one, run_with))
    print(plan_table.make_plan(command, settings))
    return 0


def _pipeline(command: commands.PipelineCommand, settings: Settings) -> int:
    if command.trained and not command.common.dry_run:
        _torch_first()
    if not command.common.dry_run:
        check_autofaiss()
    before = ""
    for verb, one, folder in pipeline_steps(command):
        if before:
            print(json.dumps({"stage": verb, "folder": folder, "waits_for": before}))
            continue
        if code := VERBS[verb][1](one, settings):
            return code
        if command.common.dry_run and not storage.exists(storage.join(folder, "manifest.json")):
            before = folder
    return 0


def _demo(command: commands.DemoCommand, settings: Settings) -> int:
    from jobs.cli.demo import run_demo
    settings = replace(settings, cluster=command.cluster,
                       pictures=replace(settings.pictures, subjects=command.subjects))
    root = storage.normalize(command.common.root)
    with runner(command) as run_with:
        out = run_demo(root, settings, run_with, drawn=command.drawn, dry_run=command.common.dry_run,
                       steps=command.steps, train=lambda job: train(job, command.cluster, local=command.common.local))
    if out:
        print(out)
    return 0


@contextlib.contextmanager
def runner(command: Any) -> Iterator[Runner]:
    """The runner that a command asks for: this process, or actors that live as long as the command."""
    if command.common.local:
        with devices.reserving(local_device(command.cluster)):
            yield InProcess(command.cluster)
        return
    with interrupts.held():  # an exception in the midst of an import may be swallowed there
        from jobs.cluster.actor_pool import Pool
    pool = Pool(command.cluster)
    try:
        with devices.reserving("cpu"):  # the driver reserved no GPU
            yield pool
    finally:
        pool.close()


def _run(stage_: Stage, command: Any) -> int:
    _unreleased(stage_, command.stage.rebuild)
    if command.common.dry_run:
        return _dry_run(stage_, command.stage.rebuild, command.cluster)
    with runner(command) as run_with:
        manifest = run_observed(stage_, run_with, tracker=command.stage.tracker, overwrite=command.stage.rebuild,
                               retry=getattr(command, "retry_failed", False) and not getattr(stage_, "base", None),
                               max_failed=getattr(command, "max_failed", 1.0))
    _done(stage_, manifest)
    return 0


def _unreleased(stage_: Stage, overwrite: bool) -> None:
    """ValueError if a stage would be written into a version that was published: those never change."""
    parts = stage_.path.split("/")
    if parts[0] == "datasets" and parts[3] in published.STAGES:
        dataset = Dataset(stage_.root, parts[1], parts[2])
        sealed = dataset.sealed(parts[3])
        if (overwrite or (parts[3] == "tombstones" and not sealed)) and published.released(dataset)[0]:
            hint = "forget takes pictures out of it at once, rebuild makes the next version"
            raise ValueError(f"{dataset.name}@{dataset.version} was published, and a published version never changes\n"
                             f"hint: {hint}; or write {dataset.name}@{dataset.following().version}")


def _dry_run(stage_: Stage, overwrite: bool = False, config: ClusterConfig | None = None) -> int:
    if config:
        check_gpus(stage_, config)
    print(json.dumps(status.forecast(stage_, overwrite=overwrite), indent=1))
    return 0


def _done(stage_: Stage, manifest: dict[str, Any]) -> None:
    """One JSON document on stdout: where, and how much; what was left out on stderr."""
    totals, known = manifest["totals"], stage_labels(stage_.path, stage_.name)
    print(json.dumps({"folder": stage_.folder, **totals, **{key: value for key, value in manifest["info"].items()
                                                            if isinstance(value, int | float | str)}}))
    if totals["skipped"]:
        _log.warning("%s: left out %s; the ledger names each", stage_.name,
                     ", ".join(f"{count} {reason}" for reason, count in totals["skipped"].items()),
                     extra={"fields": {name: value for name, value in known.items() if value}})


VERBS: dict[str, tuple[type, Callable[[Any, Settings], int]]] = {
    "shard": (commands.ShardCommand, _shard), "embed": (commands.EmbedCommand, _embed),
    "index": (commands.IndexCommand, _index), "neighbors": (commands.NeighborsCommand, _neighbors),
    "latents": (commands.LatentsCommand, _latents), "convert": (commands.ConvertCommand, _convert),
    "export": (commands.ExportCommand, _export),
    "train": (commands.TrainCommand, _train), "sample": (commands.SampleCommand, _sample),
    "evaluate": (commands.EvaluateCommand, _evaluate),
    "rebuild": (commands.RebuildCommand, _rebuild), "versions": (commands.VersionsCommand, _versions),
    "rollback": (commands.RollbackCommand, _rollback), "gc": (commands.GcCommand, _gc),
    "credits": (commands.CreditsCommand, _credits), "forget": (commands.ForgetCommand, _forget),
    "report": (commands.ReportCommand, _report), "status": (commands.StatusCommand, _status),
    "verify": (commands.VerifyCommand, _verify), "plan": (commands.PlanCommand, _plan),
    "pipeline": (commands.PipelineCommand, _pipeline), "demo": (commands.DemoCommand, _demo),
}
