"""Verbs that write no stage: search, status, verify, report, plan, recipes."""

import itertools
import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from jobs.cli.options import CommonOptions, Dataset, Flat, TextAsJson, Unflagged, Words
from jobs.cli.run_stage import open_runner
from jobs.config.settings import Settings
from jobs.planning.config import PlanConfig
from jobs.telemetry import heartbeat, output
from jobs.telemetry.units import format_count
from pipeline import storage
from pipeline.embeddings.config import EmbedConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchOptions:
    """Search databases by words, images or samples, and show the nearest images."""

    examples: ClassVar = ('search noto "red apple" --root data/demo',
                          'search noto "red apple" --minus leaf --database openmoji --sheet apples.png')

    dataset: Dataset
    common: Flat[CommonOptions]
    embed: Unflagged[EmbedConfig]
    text: Annotated[tuple[str, ...], tyro.conf.Positional,
                    tyro.conf.arg(metavar="WORDS", help="Words to search for, as one text.")] = ()
    image: Words = ()
    """Local image file to search for. Repeat the flag for more: the search uses the mean of all."""
    like: Words = ()
    """Sample to search for: KEY of the dataset, or DATASET/KEY. Repeat the flag for more."""
    minus: Words = ()
    """Words to move away from. Repeat the flag for more."""
    database: Words = ()
    """Another database to search in. Repeat the flag for more."""
    count: int = 10
    """How many images to show."""
    sheet: str = ""
    """Write a contact sheet of the images to this file (.png)."""
    json: bool = False
    """Print JSON lines instead of a table."""
    model: str = ""
    """Name of the open_clip model of the databases. Default: that of the recipe."""
    pretrained: str = ""
    """Pretrained tag or weights file of that model. Default: that of the recipe."""


def run_search(options: SearchOptions) -> int:
    from jobs.sampling.search import SearchQuery, matches_table, save_sheet, search_databases
    from pipeline.embeddings.clip_weights import ClipConfig
    from pipeline.releases import published
    embed = options.embed
    query = SearchQuery((" ".join(options.text),) if options.text else (), options.image, options.like, options.minus)
    databases = [published.open_dataset(options.common.root, name) for name in
                 dict.fromkeys((options.dataset, *options.database))]
    encoder = ClipConfig(options.model or embed.model, options.pretrained or embed.pretrained, embed.precision)
    matches = search_databases(databases, query, encoder, options.count)
    if options.sheet:
        save_sheet(matches, Path(options.sheet).expanduser())
        _log.info("search: the images are in %s", options.sheet)
    if options.json:
        for match in matches:
            output.print_json(match.document())
    else:
        output.print_text(matches_table(matches))
    return 0


@dataclass(frozen=True)
class StatusOptions:
    """Print the state of every stage: absent, planned, i of n, sealed or stale."""

    examples: ClassVar = ("status",
                          "status --root s3://bucket/rdm --watch")

    common: Flat[CommonOptions]
    json: TextAsJson = False
    watch: bool = False
    """Repeat until Ctrl-C (exit 0): in place on a terminal, elsewhere a block or a line of JSON each time."""
    serve: str = ""
    """Serve metrics to Prometheus at PORT of this machine or at HOST:PORT, until Ctrl-C (exit 0)."""


def run_status(options: StatusOptions) -> int:
    root = storage.normalize(options.common.root)
    if options.watch and options.serve:
        raise ValueError("--watch shows it here, --serve to others: these are two commands")
    if options.watch or options.serve:
        heartbeat.stop()
    try:
        if options.serve:
            from jobs.inspection import prometheus
            prometheus.serve_metrics(root, options.serve)
        elif options.watch:
            from jobs.inspection import watch
            watch.watch_root(root, as_json=options.json)
        else:
            from jobs.inspection.status import read_status, status_table
            from jobs.publishing.check_published import check_published
            with storage.remember_reads():
                stages = [*read_status(root), *({"path": fault["path"], "state": "damaged", "error": fault["fault"]}
                                                for fault in check_published(root, quick=True)[1])]
            output.print_answer(stages, lambda: status_table(root, stages), as_json=options.json)
    except KeyboardInterrupt:
        if not (options.watch or options.serve):
            raise
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@dataclass(frozen=True)
class VerifyOptions:
    """Read everything again: sizes, hashes, counts and alignment. Exit 1 if anything is wrong."""

    examples: ClassVar = ("verify",
                          "verify --only datasets/mine --quick")

    common: Flat[CommonOptions]
    only: str = ""
    """Only folders below this path of the root, for example datasets/noto."""
    against: Literal["", "current"] = ""
    """current: only the published versions, against the hashes of their publication."""
    quick: bool = False
    """Only the manifests, not the files that they name."""
    key: str = ""
    """ed25519 public key, or a file with one or more: the published versions must be signed by it. Default:
    RDM_RELEASE_KEY."""
    json: bool = False
    """Print faults as JSON lines."""


def _version_folder(path: str) -> str:
    """The folder of the version of a dataset that a stage folder is in, "" for other stage folders."""
    parts = path.split("/")
    return "/".join(parts[:3]) if parts[0] == "datasets" and len(parts) > 3 else ""


def _find_removing(root: str, stages: list[dict[str, Any]]) -> set[str]:
    """The folders of versions that a killed gc or rm has not removed completely."""
    from jobs.publishing.whole_versions import is_removed
    folders = {_version_folder(stage["path"]) for stage in stages} - {""}
    return {folder for folder in folders if is_removed(root, folder.split("/")[1], folder.split("/")[2])}


def _finish_removal(root: str, name: str) -> str:
    """The command that removes the rest of a dataset, or of its versions."""
    from pipeline.releases.published import Published
    return f"python -m jobs {f'rm {name} --published' if Published.load(root, name).is_removed else f'gc {name}'}"


@storage.remember_reads()
def run_verify(options: VerifyOptions) -> int:
    from jobs.inspection.status import read_status
    from pipeline.releases.signatures import parse_release_keys, read_release_keys
    from pipeline.versions import verify
    keys = parse_release_keys(options.key, "--key") if options.key else read_release_keys()
    root = storage.normalize(options.common.root)
    only = options.only.strip("/")
    stages = [stage for stage in read_status(root) if not only or f"{stage['path']}/".startswith(f"{only}/")]
    from jobs.publishing.check_published import check_published
    current, chain = check_published(root, quick=options.quick, keys=keys)
    chain = [fault for fault in chain if not only or f"{fault['path']}/".startswith(f"{only}/")]
    if options.key and not chain and not any(
            f"{only}/".startswith(folder) or folder.startswith(f"{only}/" if only else "") for folder in current):
        raise ValueError(f"{storage.join(root, only)} has no published version, so there is no signature to check")
    if options.against == "current":
        stages = [stage for stage in stages if stage["path"].startswith(current)]
    removing = _find_removing(root, stages)
    if removing:
        _log.info("verify: the rest of %s is not read, because it is being removed\nhint: %s",
                  ", ".join(sorted(removing)), _finish_removal(root, min(removing).split("/")[1]))
        stages = [stage for stage in stages if _version_folder(stage["path"]) not in removing]
    # A stale folder that was never sealed promises nothing.
    folders = [stage["path"] for stage in stages if stage["state"] in {"sealed", "damaged"}
               or (stage["state"] == "stale" and "sealed" in stage)]
    if options.common.dry_run:
        output.print_answer(folders, lambda: "\n".join(folders), as_json=options.json)
        return 0
    damaged = [{"path": stage["path"], "fault": stage["error"]} for stage in stages if stage["state"] == "damaged"
               and (options.quick or "lost_step" not in stage)]  # a lost checkpoint is found below
    faults: list[str] = []
    for fault in itertools.chain(chain, damaged, *(
            verify.find_faults(root, path, quick=options.quick) for path in folders)):
        faults.append(fault["path"])
        if options.json:
            output.print_json(fault)
        else:
            output.print_text(f"{fault['path']}: {fault['fault']}")
    _log.info("verify: %s read, %s", format_count(len(folders), "folder"), format_count(len(faults), "fault"))
    if keys.accepted and current and not (chain or only):
        _log.info("verify: every published version has a signature by %s", " or ".join(keys.fingerprints))
    if not folders and not chain:
        raise ValueError(f"nothing is sealed in {storage.join(root, only)}\nhint: python -m jobs status, which lists "
                         f"what is in a root")
    if faults:
        from jobs.inspection.way_back import find_command
        from jobs.telemetry import logs
        command = find_command(root, faults, keys)
        logs.log_exit(f"{format_count(len(faults), 'fault')}, the first in {faults[0]}\nhint: {command}", exit=1)
    return 1 if faults else 0


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html: one self-contained page with images, neighbors, losses, samples and stages."""

    examples: ClassVar = ("report",
                          "report --root data/demo --out report.html")

    common: Flat[CommonOptions]
    out: str = ""
    """File to write. Default: report.html in the root."""


def run_report(options: ReportOptions) -> int:
    from jobs.inspection.status import read_status
    from jobs.report import report
    root = storage.normalize(options.common.root)
    out = options.out or storage.join(root, "report.html")
    if options.common.dry_run:
        output.print_text(f"would write {out}")
        return 0
    if not read_status(root):
        raise ValueError(f"there is nothing in {root} to report on\nhint: --root")
    report.write_report(root, out)
    output.print_text(out)
    return 0


@dataclass(frozen=True)
class PlanOptions:
    """Estimate the cost of a full build, stage by stage: hours, bytes, money."""

    examples: ClassVar = ("plan --pictures 100M --database-rows 20M --workers 64 --gpus 8",
                          "plan --measure rates.json --local")

    common: Flat[CommonOptions]
    settings: Unflagged[Settings]
    plan: Flat[PlanConfig] = field(default_factory=PlanConfig)
    from_root: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Take the rates from the sealed stages of this root."""
    from_gpu: bool = False
    """In the root of --from, the workers of embed, train and exact neighbors had a GPU."""


def run_plan(options: PlanOptions) -> int:
    from jobs.planning import plan_table
    plan, settings, common = options.plan, options.settings, options.common
    if plan.measure and options.from_root:
        raise ValueError("--measure measures here, --from takes what was measured: one of them")
    if plan.measure and common.dry_run:
        output.print_json(plan_table.to_measure(plan, settings, common.root))
        return 0
    if plan.measure:
        from jobs.telemetry.observe import run_observed
        workers = plan_table.workers_here(plan, settings, common.root, local=common.local)
        with open_runner(common, workers) as runner:
            plan_table.measure(plan, settings, common.root, workers, lambda stage: run_observed(stage, runner))
        plan = replace(plan, rates=plan.measure, measure="")
    rates = plan_table.resolve_rates(plan, options.from_root, gpu=options.from_gpu)
    output.print_text(plan_table.make_plan(plan, settings, rates))
    return 0


@dataclass(frozen=True)
class RecipesOptions:
    """List the recipes by purpose: image size, encoder, network, memory, and a command."""

    examples: ClassVar = ("recipes",
                          "recipes --json")

    common: Flat[CommonOptions]
    json: TextAsJson = False


def run_recipes(options: RecipesOptions) -> int:
    from jobs.planning.recipe_table import list_recipes, recipes_table
    recipes = list_recipes()
    output.print_answer([facts.document() for facts in recipes], lambda: recipes_table(recipes), as_json=options.json)
    return 0
