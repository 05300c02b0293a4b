"""Verbs for published databases: rebuild, versions, rollback, repair, gc, credits, forget."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from jobs.cli.options import CommonOptions, DatasetName, Flat, ResultAsJson, SigningOptions, TextAsJson, Words
from jobs.cli.run_stage import open_runner, spare_ray
from jobs.cluster.config import ClusterConfig
from jobs.config.settings import Settings
from jobs.publishing.config import GcConfig, RebuildConfig
from jobs.telemetry import output
from pipeline import storage
from pipeline.embeddings.config import EmbedConfig
from pipeline.indices.config import IndexConfig
from pipeline.sources.config import ShardConfig
from pipeline.stages.timers import Times

if TYPE_CHECKING:
    from jobs.config.published_settings import PublishedSettings
    from jobs.publishing.rebuild import Rebuild
    from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)
_IMAGES_WITHOUT_RAY = 5000
"""Up to this number of images, `style` runs without Ray."""


@dataclass(frozen=True)
class RebuildOptions:
    """Update a published database to its source: build what changed, check it, publish it."""

    examples: ClassVar = ("rebuild ukiyo_e --source s3://images/ukiyo_e --root s3://bucket/rdm",
                          "rebuild mine --source ~/images --local --dry-run")

    dataset: DatasetName
    shard: Flat[ShardConfig]
    embed: EmbedConfig
    index: IndexConfig
    rebuild: Flat[RebuildConfig]
    cluster: Flat[ClusterConfig]
    common: Flat[CommonOptions]
    signing: Flat[SigningOptions] = field(default_factory=SigningOptions)
    json: ResultAsJson = False

    def read_published_settings(self) -> "PublishedSettings | None":
        """The settings of the published version; None if nothing is published."""
        from jobs.config.published_settings import read_published_settings
        from pipeline.datasets.dataset import Dataset
        name = Dataset.parse(self.common.root, self.dataset).name
        return read_published_settings(self.common.root, name, self.embed, scores=bool(self.rebuild.scores),
                                       keys=self.signing.keys())


def run_rebuild(options: RebuildOptions) -> int:
    from jobs.inspection.summary import next_sample
    build = _open_rebuild(options)
    return _publish(build, options, Times(), lambda: next_sample(build.root, build.name))


def _open_rebuild(options: RebuildOptions) -> "Rebuild":
    from jobs.publishing.rebuild import Rebuild
    from pipeline.datasets.dataset import Dataset
    root, name = storage.normalize(options.common.root), Dataset.parse(options.common.root, options.dataset).name
    check_rebuild(options)
    return Rebuild(root, name, options.shard, options.embed, options.index, options.rebuild, options.signing.keys())


def _publish(build: "Rebuild", options: RebuildOptions, times: Times, following: Callable[[], str]) -> int:
    """Bring the published version up to the source, and print what was done and the seconds of each part."""
    if options.common.dry_run:
        output.print_document(build.forecast(), as_json=options.json, indent=1)
        return 0
    with times("imports"):
        import_torch_first()
        from jobs.inspection.summary import summarize_rebuild
        from jobs.publishing.rebuild import run_rebuild
        from jobs.telemetry.observe import run_observed
        from pipeline.indices.choose import check_autofaiss
    check_autofaiss()

    def seal(stage: "Stage") -> dict[str, Any]:
        with times(stage.name):
            return run_observed(stage, runner, name=stage.name.replace("_", " "), trackers=())

    before = sum(times.seconds.values())
    with times("all"), open_runner(options.common, options.cluster) as runner:
        result = run_rebuild(build, seal)
    if result.get("by") == "another":
        _log.info("rebuild: another command published %s@%s meanwhile", build.name, result["published"])
    whole = times.seconds.pop("all")
    times.add("publish", whole - (sum(times.seconds.values()) - before))
    seconds = {part: round(value, 1) for part, value in times.seconds.items()}
    if output.wants_json(options.json):
        output.print_json(result | {"seconds": seconds})
    else:
        output.print_document(summarize_rebuild(result, seconds), as_json=False)
        output.print_next(following())
    return 0


@dataclass(frozen=True)
class StyleOptions(RebuildOptions):
    """Make a published style database of a folder of images, or its next version."""

    examples: ClassVar = ("style mine --source ~/images",
                          "style mine --source ~/images --root data/demo --dry-run")
    default_recipe: ClassVar = "style"


def run_style(options: StyleOptions) -> int:
    times = Times()
    with times("imports"):
        import_torch_first()
        from jobs.config.published_settings import choose_encoder
        from pipeline.embeddings.clip_weights import BUNDLED_MODEL
    with times("source"):
        encoder = choose_encoder(options.common.root, options.dataset, options.embed)
        options = replace(options, embed=replace(options.embed, model=encoder.model, pretrained=encoder.pretrained))
        build = _open_rebuild(options)
    if encoder.model == BUNDLED_MODEL:
        _log.info("style: the encoder %s was trained on emoji, like the bundled model\nhint: for photographs, use "
                  "--embed.model and --embed.pretrained, and a run with that encoder", BUNDLED_MODEL)
    small = build.source.count <= _IMAGES_WITHOUT_RAY
    common = spare_ray(options.common, options.cluster, small=small)


    def following() -> str:
        from jobs.inspection.summary import next_sample
        if encoder.model == BUNDLED_MODEL:  # the bundled model has this encoder
            return f"python -m jobs sample 'a tree' --database {build.name}"
        return next_sample(build.root, build.name)

    return _publish(build, replace(options, common=common), times, following)


def check_rebuild(options: RebuildOptions, *, here: bool = True, mention: bool = True) -> None:
    """Run the checks of a rebuild. `here`: this machine does the work. `mention`: name settings of the demo."""
    from jobs.checks.check import run_checks
    from jobs.checks.demo_defaults import mention_demo_defaults
    from jobs.checks.verbs import PlannedBuild, rebuild_checks
    from pipeline.datasets.dataset import Dataset
    settings = Settings(shard=options.shard, embed=options.embed, index=options.index, rebuild=options.rebuild,
                        cluster=options.cluster)
    dataset = Dataset.parse(options.common.root, options.dataset)
    build = PlannedBuild(dataset, settings, local=options.common.local, here=here)
    run_checks(rebuild_checks(build))
    if mention and not (options.common.names_recipe or isinstance(options, StyleOptions)
                        or (here and build.has_published)):
        mention_demo_defaults(settings, embeds=True, trains=False)


def import_torch_first() -> None:
    """Import torch before faiss. In a job's driver the other order sometimes fails to load MKL and ends the process."""
    import torch  # noqa: F401


@dataclass(frozen=True)
class VersionsOptions:
    """List the versions of a published database: their changes, and the runs and neighbors that use them."""

    examples: ClassVar = ("versions ukiyo_e --root s3://bucket/rdm",
                          "versions mine --json")

    dataset: DatasetName
    common: Flat[CommonOptions]
    json: TextAsJson = False


def run_versions(options: VersionsOptions) -> int:
    from jobs.publishing.releases import list_versions, versions_table
    from pipeline.releases.published import Published
    versions = list_versions(options.common.root, options.dataset)
    output.print_answer(versions, lambda: versions_table(versions), as_json=options.json)
    current = Published.load(options.common.root, options.dataset)
    if not current.version:
        why = f"{options.dataset} was removed" if current.is_removed else f"nothing of {options.dataset} is published"
        _log.info("versions: %s\nhint: python -m jobs rebuild %s --source SOURCE%s", why, options.dataset,
                  current.sign_option)
    return 0


@dataclass(frozen=True)
class RollbackOptions:
    """Publish an earlier version of a database again."""

    examples: ClassVar = ("rollback mine",
                          "rollback mine --to v2")

    dataset: DatasetName
    common: Flat[CommonOptions]
    to: str = ""
    """The version, for example v2. Default: the newest undamaged earlier one."""
    signing: Flat[SigningOptions] = field(default_factory=SigningOptions)
    json: ResultAsJson = False


def run_rollback(options: RollbackOptions) -> int:
    from jobs.publishing.releases import rollback
    result = rollback(options.common.root, options.dataset, options.to, dry_run=options.common.dry_run,
                      keys=options.signing.keys())
    output.print_document(result, as_json=options.json)
    return 0


@dataclass(frozen=True)
class RepairOptions:
    """Restore a damaged or missing pointer of a published database, and the images that it must hide."""

    examples: ClassVar = ("repair mine",
                          "repair mine --dry-run")

    dataset: DatasetName
    common: Flat[CommonOptions]
    accept_lost_requests: bool = False
    """Accept the loss of takedown requests, and record it. Images that versions hide stay hidden."""
    accept_lost_publications: bool = False
    """Accept the loss of publications that this machine has seen. An earlier version is published again then."""
    signing: Flat[SigningOptions] = field(default_factory=SigningOptions)
    json: ResultAsJson = False


def run_repair(options: RepairOptions) -> int:
    from jobs.publishing.repair import repair
    result = repair(options.common.root, options.dataset, dry_run=options.common.dry_run, keys=options.signing.keys(),
                    accept_lost_requests=options.accept_lost_requests,
                    accept_lost_publications=options.accept_lost_publications)
    output.print_document(result, as_json=options.json)
    return 0


@dataclass(frozen=True)
class GcOptions:
    """Remove versions of a published database that nothing uses."""

    examples: ClassVar = ("gc mine --keep 3",
                          "gc mine --keep 1 --dry-run")

    dataset: DatasetName
    common: Flat[CommonOptions]
    gc: Flat[GcConfig] = field(default_factory=GcConfig)
    json: TextAsJson = False


def run_gc(options: GcOptions) -> int:
    from jobs.publishing.garbage_collect import collect_garbage, refuse_unreadable, removed_table
    removed = collect_garbage(options.common.root, options.dataset, options.gc, dry_run=options.common.dry_run)
    output.print_answer(removed, lambda: removed_table(removed, options.common.dry_run), as_json=options.json)
    refuse_unreadable(options.common.root, options.dataset, removed)
    return 0


@dataclass(frozen=True)
class CreditsOptions:
    """List the images that a sample used as neighbors, with source and license."""

    examples: ClassVar = ("credits data/demo/runs/emoji_32/samples/first/grid.png",
                          "credits data/demo/runs/emoji_32/samples/first/samples.json --sheet credits.png")

    file: Annotated[str, tyro.conf.Positional,
                    tyro.conf.arg(metavar="SAMPLE", help=(
                        "runs/RUN/samples/ID of the root, or a path of such a folder, its samples.json or an image."))]
    common: Flat[CommonOptions]
    sheet: str = ""
    """Write a contact sheet of the images to this file (.png)."""
    json: TextAsJson = False


def run_credits(options: CreditsOptions) -> int:
    from jobs.publishing import credits
    samples = credits.list_credits(options.file, options.common.root)
    if options.sheet and not options.common.dry_run:
        credits.save_sheet(samples, Path(options.sheet).expanduser())
        _log.info("credits: the images are in %s", options.sheet)
    output.print_answer(samples, lambda: credits.credits_text(samples), as_json=options.json)
    return 0


@dataclass(frozen=True)
class ForgetOptions:
    """Remove images from every database permanently, and list the runs and neighbors that use them."""

    examples: ClassVar = ("forget --domain example.org --note 'asked by mail'",
                          "forget --key mine/0000000042 --dry-run")

    common: Flat[CommonOptions]
    sha256: Words = ()
    """Hash of an image, as downloaded or as stored. Repeat the flag for more."""
    url: Words = ()
    """URL of an image, or its name in the source folder. Repeat the flag for more."""
    key: Words = ()
    """DATASET/KEY of a sample, or DATASET@VERSION/KEY. Repeat the flag for more."""
    domain: Words = ()
    """All images from this host and its subdomains. Repeat the flag for more."""
    note: str = ""
    """Reason, or name of the requester. It is stored with the request."""
    json: TextAsJson = False


def run_forget(options: ForgetOptions) -> int:
    from jobs.publishing import forget
    root = options.common.root
    takedown = forget.parse_takedown(root, options.sha256, options.url, options.key, options.domain)
    result = forget.forget(root, takedown, options.note, dry_run=options.common.dry_run)
    output.print_answer(result, lambda: forget.forget_text(root, result), as_json=options.json)
    forget.refuse_unreadable(root, result["unreadable"], result["denied"], dry_run=options.common.dry_run)
    return 0
