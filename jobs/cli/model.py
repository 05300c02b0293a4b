"""Verbs for models: train, sample, evaluate, convert, export."""

import logging
import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from jobs.cli.options import (
    STOPPED,
    CommonOptions,
    Flat,
    ResultAsJson,
    RunName,
    StageOptions,
    TextStageOptions,
    Unflagged,
    Words,
)
from jobs.cli.run_stage import open_runner, print_forecast, print_result, seal_and_print, spare_ray
from jobs.cluster.config import ClusterConfig
from jobs.evaluation.config import EvaluateConfig
from jobs.sampling.config import QueryConfig, SampleConfig
from jobs.telemetry import interrupts, output
from jobs.telemetry.units import format_count
from jobs.training.config import ConvertConfig
from model.config import TrainConfig
from pipeline import storage
from pipeline.embeddings.config import EmbedConfig

if TYPE_CHECKING:
    from jobs.runs.run import Run
    from jobs.training.train_stage import Job, Training
    from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Train a retrieval-augmented diffusion model on a dataset and its neighbors."""

    examples: ClassVar = ("train myrun --dataset mine --steps 3000 --local",
                          "train large --dataset art --validation held_out --recipe imagenet_400m --workers 8 "
                          "--gpus 1")

    run: RunName
    dataset: str
    """Dataset with shards and neighbors."""
    train: Flat[TrainConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    database: str = ""
    """Database of the neighbors. Default: the dataset itself."""
    on_latents: Annotated[bool, tyro.conf.arg(name="latents")] = False
    """Train on the latents of the dataset instead of its images."""
    validation: str = ""
    """Dataset to validate on. Logs sample images, and losses with the neighbors of each sample, with neighbors of
    other samples and with none."""


def run_train(options: TrainOptions, *, mention_defaults: bool = True) -> int:
    """Train a run. `mention_defaults`: name settings of the demo, unless a caller has done so."""
    from jobs.training.train_stage import Training
    # torchrun has started the processes, so the run is local without --local.
    local = options.common.local or "TORCHELASTIC_RUN_ID" in os.environ
    job = check_train(options, mention_defaults=mention_defaults)
    training = Training(job)
    if options.common.dry_run:
        return print_forecast(training, options, options.cluster, replaces=training.takes_over)
    manifest = train(job, options.cluster, local=local, overwrite=options.stage.overwrite)
    if manifest:
        print_result(training, _with_checkpoints(manifest, job.run), options)
    # Only the process of rank 0 reports whether the run was stopped.
    return 0 if manifest or os.environ.get("RANK", "0") != "0" else STOPPED


def _with_checkpoints(manifest: dict[str, Any], run: "Run") -> dict[str, Any]:
    """The manifest of a run, with the bytes of its checkpoints, which are no files of the stage."""
    totals = manifest["totals"]
    return manifest | {"totals": totals | {"bytes": totals["bytes"] + run.checkpoint_bytes()}}


def check_train(options: TrainOptions, *, here: bool = True, mention: bool = True,
                mention_defaults: bool = True) -> "Job":
    """The job of a run, after its checks.

    `here`: this machine does the work. `mention`: name settings that make little sense, with `mention_defaults` those
    of the demo too.
    """
    from jobs.checks.check import run_checks
    from jobs.checks.demo_defaults import mention_demo_defaults, mention_large_images
    from jobs.checks.verbs import can_read, train_checks
    from jobs.config.settings import Settings
    from jobs.runs.metrics import never_made_a_step
    from jobs.runs.run import Run
    from jobs.telemetry.trackers.trackers import check_choices
    from jobs.training.train_stage import Job
    from pipeline.datasets.dataset import Dataset
    from pipeline.releases import published
    if here:
        check_choices(options.stage.tracker)
    run = Run.parse(options.common.root, options.run)
    readable = can_read(run.root, here=here)
    # A resumed run keeps its versions when other versions are published.
    pinned = {} if options.stage.overwrite or not readable or never_made_a_step(run) else run.planned()

    def reader(text: str, role: str) -> Dataset:
        if not readable:
            return Dataset.parse(run.root, text)
        return published.open_dataset(run.root, text, pinned.get(role, ""))

    job = Job(run, reader(options.dataset, "dataset"), reader(options.database or options.dataset, "database"),
              options.train, options.on_latents, reader(options.validation, "") if options.validation else None,
              options.stage.tracker)
    local = options.common.local or "TORCHELASTIC_RUN_ID" in os.environ
    run_checks(train_checks(job, options.cluster, local=local, here=here))
    if mention and mention_defaults and not (options.common.names_recipe or pinned):
        mention_demo_defaults(Settings(train=options.train), embeds=False, trains=True)
    if mention and readable and not (pinned or job.latents):
        mention_large_images(job.dataset, options.train)
    return job


def train(job: "Job", cluster: ClusterConfig, *, local: bool, overwrite: bool = False) -> dict[str, Any] | None:
    """Bring a run to its sealed state. None if it was stopped, and in processes of torchrun other than rank 0."""
    from jobs.cluster.gpus import check_gpus
    from jobs.runs.labels import run_labels
    from jobs.telemetry import logs
    from jobs.training.train_stage import Training, hold_training
    from pipeline.stages.manifest import read_manifest
    from pipeline.stages.plan import hold_folder, prepare, replace_plan
    with logs.label_events(run_labels(job.dataset.name, job.dataset.version, job.run.name)):
        training = Training(job)
        check_gpus(training, cluster)
        training.check()
        # With --overwrite rank 0 replaces the folder meanwhile, so the other ranks do not look into it.
        if not overwrite and storage.exists(storage.join(training.folder, "manifest.json")):
            prepare(training)
            manifest, lost = read_manifest(training.folder, training.command), job.run.lost_step()
            if lost is None and manifest["info"]["steps"] >= job.config.steps:
                return manifest
            if lost is not None:
                _log.info("train: the last checkpoint of the run %s, of step %d, is missing; its steps are made again",
                          job.run.name, lost)
        if os.environ.get("RANK", "0") != "0":
            return _train_and_seal(training, job, cluster, local=local)
        if not overwrite and training.takes_over:
            _log.info("train: the run %s was planned with other settings and never made a step; its name is free",
                      job.run.name)
            overwrite = True
        with hold_folder(training, exclusive=overwrite) as lease, hold_training(job.run):
            if overwrite:
                replace_plan(training)
                lease.share()
            return _train_and_seal(training, job, cluster, local=local)


def _train_and_seal(training: "Training", job: "Job", cluster: ClusterConfig, *, local: bool) -> dict[str, Any] | None:
    from jobs.cluster.gpus import local_device
    from pipeline.hardware import devices
    from pipeline.stages.driver import run_stage
    if local:
        from jobs.training.worker import train_in_processes
        with devices.reserve_temporarily(local_device(cluster)):
            if not train_in_processes(job):
                return None
    else:
        with interrupts.defer_interrupts():
            from jobs.training.ray_train import train_on_ray
        train_on_ray(job, cluster)
    if job.run.latest_step() < job.config.steps:
        _log.info("train: stopped at step %d; the same command continues from there", job.run.latest_step())
        return None
    sealed = storage.join(training.folder, "manifest.json")
    if storage.exists(sealed):  # a finished run with more --steps
        storage.remove(sealed)
        storage.remove(storage.join(training.folder, "records", "run.json"))
    return run_stage(training)


@dataclass(frozen=True)
class SampleOptions:
    """Generate images for prompts or for query images, each with its neighbors in a database."""

    examples: ClassVar = ("sample 'red apple' 'a tree' --database noto",
                          "sample emoji_32 --image apple.jpg --database noto:3+openmoji:1 --seed 7")

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|PROMPT", help=(
        "Name of the run, if --prompt, --prompts, --image or --unconditional is given. Otherwise all words are "
        "prompts, and the run is the newest finished one with the encoder of the database, or else the bundled "
        "model."))]
    sample: Flat[SampleConfig]
    embed: Unflagged[EmbedConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT", help="Prompts.")] = ()
    prompt: Words = ()
    """Prompt. Repeat the flag for more."""
    prompts: str = ""
    """File of prompts: a text with one in each line, or a table (CSV, JSONL, parquet) with a column caption."""
    image: Words = ()
    """Local image file that is used in place of a prompt. Repeat the flag for more."""
    query: Flat[QueryConfig] = field(default_factory=QueryConfig)
    database: Words = ()
    """Database of the neighbors. Repeat the flag for more. noto:3+openmoji:1 mixes databases by weight."""
    checkpoint: int = 0
    """Step of the checkpoint. 0: the newest."""
    name: str = ""
    """Name of the folder in the samples of the run. Default: a hash of these settings."""
    model: str = ""
    """Name of the open_clip model that embeds the prompts. Default: that of the run."""
    pretrained: str = ""
    """Pretrained tag or weights file of that model. Default: that of the run."""


def run_sample(options: SampleOptions) -> int:
    if not options.database:
        from pipeline.datasets.dataset import list_names
        names = list_names(storage.normalize(options.common.root))
        raise ValueError(f"sample needs a database: expected --database, got none; there are {', '.join(names)}\n"
                         f"hint: --database {names[0] if names else 'NAME'}")
    from jobs.runs.run import Run
    from jobs.sampling.mixture import Mixture
    from jobs.sampling.queries import read_prompts
    from pipeline.embeddings.clip_weights import ClipConfig, encoder_of
    root, embed = options.common.root, options.embed
    run = None if _names_no_run(options) else Run.parse(root, options.run)
    if run:
        run.section()  # before the imports, which take seconds
    encoder = ClipConfig(options.model or embed.model, options.pretrained or embed.pretrained, embed.precision)
    databases = tuple(Mixture.parse(root, name) for name in options.database)
    prompts = options.words + options.prompt + (read_prompts(options.prompts) if options.prompts else ())
    from jobs.sampling.default_run import default_run
    from jobs.sampling.sample_stage import Sampling
    from jobs.training.export import BUNDLED_RUN
    if run is None:
        prompts = (options.run, *options.words)
        run = default_run(databases, prompts, dry_run=options.common.dry_run)
        if run is None:
            output.print_document({"stage": "sample", "waits_for": Run.parse(root, BUNDLED_RUN).folder},
                                  as_json=options.stage.json)
            return 0
    if not (options.model or options.pretrained):
        encoder = encoder_of(f"the run {run.name}", run.encoder(), embed.clip())
    sampling = Sampling(run, options.checkpoint, prompts, databases, encoder, options.sample, options.name,
                        pictures=options.image, query_config=options.query)
    common = spare_ray(options.common, options.cluster, small=len(databases) == 1)  # one item has one worker
    return seal_and_print(sampling, replace(options, common=common))


def _names_no_run(options: SampleOptions) -> bool:
    """Whether the first word is a prompt instead of a run: there is no other query, and no run has this name."""
    return (not (options.prompt or options.prompts or options.image or options.query.unconditional)
            and options.run not in storage.list_folders(storage.join(storage.normalize(options.common.root), "runs")))


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure whether the style of samples follows the database, with prompts that training has not seen."""

    examples: ClassVar = ("evaluate emoji_32",
                          "evaluate emoji_32 --database noto --database openmoji --json")

    run: RunName
    evaluate: Flat[EvaluateConfig]
    sample: Flat[SampleConfig]
    embed: Unflagged[EmbedConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    stage: Flat[TextStageOptions]
    database: Words = ()
    """Database of one style. Repeat the flag. Default: every other dataset of the root that has an index."""
    prompt: Words = ()
    """Prompt. Default: the subjects that training has not seen."""
    checkpoint: int = 0
    """Step of the checkpoint. 0: the newest."""
    name: str = ""
    """Name of the folder in the evaluations of the run. Default: a hash of these settings."""


def run_evaluate(options: EvaluateOptions) -> int:
    from jobs.evaluation.evaluate_stage import Evaluation, check_same_data, count_images, plan_ways
    from jobs.evaluation.evaluation_data import evaluation_data
    from jobs.evaluation.judge_stage import StyleClassifierStage
    from jobs.runs.run import Run
    from jobs.telemetry import tables
    from jobs.telemetry.observe import run_observed
    from pipeline.embeddings.clip_weights import encoder_of
    run = Run.parse(options.common.root, options.run)
    dataset, train_database, databases, unfit = evaluation_data(run, options.database)
    for database, reason in unfit:
        _log.info("evaluate: %s is left out: %s", database.label, reason)
    check_same_data(run, dataset)
    judging = StyleClassifierStage(run, dataset, databases, options.evaluate.judge_steps)
    encoder = encoder_of(f"the run {run.name}", run.encoder(), options.embed.clip())
    request = (judging, train_database, options.checkpoint, encoder, options.evaluate, options.sample, options.prompt)
    planned = plan_ways(*request)  # what is impossible is refused before the judges are trained
    stage = options.stage
    if options.common.dry_run:
        return print_forecast(judging, options, options.cluster)
    images = count_images(planned[1], len(databases), options.evaluate.seeds)
    _log.info("evaluate: the judge of %s learns from %s images, and then judges %s that the run generates",
              format_count(len(databases), "style"), format_count(judging.rows(judging.plan()[0])),
              format_count(images, "image"))
    with open_runner(options.common, options.cluster) as runner:
        run_observed(judging, runner, trackers=stage.tracker, overwrite=stage.overwrite)
        evaluation = Evaluation(*request, planned, options.name)
        run_observed(evaluation, runner, trackers=stage.tracker, overwrite=stage.overwrite)
    _log.info("evaluate: images, plot and numbers are in %s", evaluation.folder)
    if stage.json:
        document = storage.read_json(storage.join(evaluation.folder, "evaluation.json"))
        output.print_text(storage.json_bytes(document).decode(), end="")
    else:
        result = storage.read_bytes(storage.join(evaluation.folder, "table.md")).decode()
        output.print_text(tables.render_markdown(result), end="")
        if not output.wants_json(flag=False):
            output.print_next("python -m jobs report")
    return 0


@dataclass(frozen=True)
class ConvertOptions:
    """Make a run from a checkpoint of the CompVis release (model.ckpt), or from a folder that export wrote."""

    examples: ClassVar = ("convert released --checkpoint model.ckpt --database art",
                          "convert small --checkpoint exported")

    run: RunName
    checkpoint: str
    """The file or folder. A pickle is read as weights only, and its code never runs."""
    common: Flat[CommonOptions]
    stage: Flat[StageOptions]
    database: str = ""
    """A dataset embedded by the encoder that the released network was trained with."""
    convert: Flat[ConvertConfig] = field(default_factory=ConvertConfig)


def run_convert(options: ConvertOptions) -> int:
    from jobs.runs.run import Run
    from jobs.training.convert import Convert
    from jobs.training.export import Import
    from pipeline.releases import published
    from pipeline.stages.driver import run_stage
    root = options.common.root
    run = Run.parse(root, options.run)
    if Path(options.checkpoint).is_dir():
        convert: Stage = Import(run, Path(options.checkpoint))
    elif not options.database:
        raise ValueError("a released checkpoint does not say which encoder it was trained with\n"
                         "hint: --database NAME, a dataset that was embedded by it")
    else:
        database = published.open_label(root, options.database)
        database.manifest("embeddings")  # check it before reading the weights, which takes long
        convert = Convert(run, options.checkpoint, database, options.convert)
    if options.common.dry_run:
        return print_forecast(convert, options)
    print_result(convert, _with_checkpoints(run_stage(convert, overwrite=options.stage.overwrite), run), options)
    return 0


@dataclass(frozen=True)
class ExportOptions:
    """Write the weights of a run, in half precision, into a folder that convert reads."""

    examples: ClassVar = ("export myrun --out exported",
                          "export myrun --out exported --checkpoint 9000")

    run: RunName
    out: str
    """The folder. It must not exist, or be empty."""
    common: Flat[CommonOptions]
    checkpoint: int = 0
    """Step of the checkpoint. 0: the newest."""
    json: ResultAsJson = False


def run_export(options: ExportOptions) -> int:
    from jobs.runs.run import Run
    from jobs.training.export import export_weights
    run, out = Run.parse(options.common.root, options.run), Path(options.out)
    if options.common.dry_run:
        output.print_document({"folder": str(out), "step": run.choose_step(options.checkpoint)},
                              as_json=options.json)
        return 0
    output.print_document(export_weights(run, options.checkpoint, out), as_json=options.json)
    if not output.wants_json(options.json):
        output.print_next(f"python -m jobs convert {options.run}_copy --checkpoint {shlex.quote(str(out))}")
    return 0
