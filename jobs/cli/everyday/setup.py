"""Verbs to begin with: init, doctor."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from jobs.cli.options import CommonOptions, Flat, ResultAsJson
from jobs.telemetry import output
from pipeline import storage


@dataclass(frozen=True)
class InitOptions:
    """Write a file of settings for a purpose, with a comment for each setting."""

    examples: ClassVar = ("init photographs settings.toml",
                          "init list laion.toml")

    purpose: Annotated[Literal["photographs", "art", "style", "list", "demo"], tyro.conf.Positional, tyro.conf.arg(
        metavar="PURPOSE", help="photographs and art: train a model; style: a style database; list: a list of URLs; "
                                "demo: the demo.")]
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help="The file to write (.toml).")]
    common: Flat[CommonOptions]
    json: ResultAsJson = False


def run_init(options: InitOptions) -> int:
    from jobs.config.starters import STARTERS, starter_text
    quoted = shlex.quote(options.file)
    text = starter_text(options.purpose, quoted)
    try:
        with open(Path(options.file).expanduser(), "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{options.file} exists, and init overwrites no file\n"
                         f"hint: choose another name, or remove it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no folder for {options.file}\n"
                         f"hint: mkdir -p {shlex.quote(str(Path(options.file).parent))}") from None
    following = f"{output.PROGRAM} {STARTERS[options.purpose].commands[0]} --config {quoted}"
    output.print_answer({"file": options.file, "purpose": options.purpose, "next": following},
                        lambda: f"{options.file} is written. Next:\n  {following}",
                        as_json=output.wants_json(options.json))
    return 0


@dataclass(frozen=True)
class DoctorOptions:
    """Check this machine: packages, devices, Ray, the root, disk, memory, clock, network. Exit 1 if one fails."""

    examples: ClassVar = ("doctor",
                          "doctor --root s3://bucket/rdm --json")

    common: Flat[CommonOptions]
    json: ResultAsJson = False


def run_doctor(options: DoctorOptions) -> int:
    from jobs.inspection.doctor import checks_text, run_checks
    checks = run_checks(storage.normalize(options.common.root))
    output.print_answer([check.document() for check in checks], lambda: checks_text(checks),
                        as_json=output.wants_json(options.json))
    return int(any(check.state == "failed" for check in checks))
