"""Verbs about what a root holds: show, ls, rm."""

import logging
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from jobs.cli.options import CommonOptions, Flat, ResultAsJson, SigningOptions
from jobs.telemetry import heartbeat, output
from jobs.telemetry.units import format_bytes, format_count
from pipeline import storage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShowOptions:
    """Show all that is known of one row: columns, license, neighbors, ledger entries, and its image as a file."""

    examples: ClassVar = ("show mine/0000000042",
                          "show beach/7.jpg --dataset mine --out 7.jpg --json")

    key: Annotated[str, tyro.conf.Positional,
                   tyro.conf.arg(metavar="KEY", help="Key of the row or its name in the source, or DATASET/KEY.")]
    common: Flat[CommonOptions]
    dataset: str = ""
    """Dataset to look into. Default: the published version, or v1, of every dataset."""
    out: str = ""
    """File for the image. Default: a file in the folder for temporary files."""
    json: ResultAsJson = False


def run_show(options: ShowOptions) -> int:
    from jobs.inspection.show import row_text, show_row
    document = show_row(options.common.root, options.key, options.dataset, options.out)
    output.print_answer(document, lambda: row_text(document), as_json=output.wants_json(options.json))
    return 0


@dataclass(frozen=True)
class LsOptions:
    """List the datasets, runs and samples of a root, or the stages and files of one of them."""

    examples: ClassVar = ("ls --root s3://bucket/rdm",
                          "ls mine")

    common: Flat[CommonOptions]
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(
        metavar="TARGET", help="NAME, NAME@VERSION, or a path of the root such as runs/RUN.")] = ""
    json: ResultAsJson = False


def run_ls(options: LsOptions) -> int:
    from jobs.inspection import contents
    from jobs.runs.targets import target_path
    root, as_json = storage.normalize(options.common.root), output.wants_json(options.json)
    if options.target:
        stages = contents.list_stages(root, target_path(root, options.target))
        output.print_answer(stages, lambda: contents.stages_table(stages), as_json=as_json)
    else:
        entries = contents.list_contents(root)
        output.print_answer(entries, lambda: contents.contents_table(entries, root), as_json=as_json)
    return 0


@dataclass(frozen=True)
class RmOptions:
    """Remove a dataset, a version or stage of it, a run, or samples that nothing else needs."""

    examples: ClassVar = ("rm runs/myrun/samples/first --yes",
                          "rm mine --published --dry-run")

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(
        metavar="TARGET", help="NAME, NAME@VERSION, or a path of the root such as runs/RUN.")]
    common: Flat[CommonOptions]
    published: bool = False
    """Also remove a published dataset, with all of its versions."""
    yes: bool = False
    """Do not ask. Without a terminal it must be given."""
    json: ResultAsJson = False
    signing: Flat[SigningOptions] = field(default_factory=SigningOptions)


def run_rm(options: RmOptions) -> int:
    from jobs.inspection.status import read_status
    from jobs.publishing.remove import plan_removal, remove
    from jobs.runs.targets import target_path
    root, as_json = storage.normalize(options.common.root), output.wants_json(options.json)
    path = target_path(root, options.target)
    removal = plan_removal(root, path, [state["path"] for state in read_status(root)], options.signing.keys(),
                           published=options.published)
    files = f"{format_count(removal.files, 'file')}, {format_bytes(removal.bytes)}"
    if options.common.dry_run:
        first = [output.fit_commands(f"first: python -m jobs rm {user}") for user in removal.blocked_by]
        output.print_answer(removal.document() | {"dry_run": True, "blocked_by": list(removal.blocked_by)},
                            lambda: "\n".join([f"would remove {path}: {files}", *first]), as_json=as_json)
        return 2 if removal.blocked_by else 0
    removal.refuse_blocked()
    if not options.yes:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            flag = " --published" if options.published else ""
            raise ValueError(f"rm does not ask without a terminal: {path} has {removal.files} files\n"
                             f"hint: python -m jobs rm {path}{flag} --yes")
        what = f"the published {path}" if removal.published else path
        if not _confirm(f"Remove {what} ({files})?"):
            _log.info("rm: nothing was removed")
            return 1
    remove(removal)
    output.print_answer(removal.document(), lambda: f"removed {path}: {files}", as_json=as_json)
    return 0


def _confirm(question: str) -> bool:
    heartbeat.stop()  # the command waits for its user
    output.print_text(f"{question} [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
