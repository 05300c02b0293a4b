"""The command line imports heavy modules only for verbs that need them: they take seconds and half a gigabyte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.verbs import VERBS

REPOSITORY = Path(__file__).parents[3]
HEAVY = {"PIL", "aiohttp", "boto3", "diffusers", "faiss", "jinja2", "matplotlib", "numpy", "open_clip", "pandas",
         "pyarrow", "ray", "s3fs", "scipy", "sqlglot", "torch", "torchvision", "wandb"}
# A fork for each command, because tyro and the packages that it needs take half a second to import.
CODE = """
import contextlib, json, os, sys
from jobs.cli.main import main
for words in json.loads(sys.argv[2]):
    if not os.fork():
        with contextlib.suppress(SystemExit):
            assert main(words) == 0
        print("loaded:", *sorted(set(sys.argv[1].split(",")) & sys.modules.keys()))
        print("end of the command", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def heavy_modules(*commands: list[str]) -> list[tuple[str, set[str]]]:
    """For each command its output, and the heavy modules that it has imported at its end."""
    done = subprocess.run([sys.executable, "-c", CODE, ",".join(HEAVY), json.dumps(commands)], check=True,
                          capture_output=True, text=True, cwd=REPOSITORY)
    printed = [text.rpartition("loaded:") for text in done.stdout.split("end of the command\n")[:-1]]
    return [(text, set(loaded.split())) for text, _, loaded in printed]


def test_help_imports_nothing_heavy() -> None:
    commands = [["--help"], *([verb, "--help"] for verb in VERBS)]
    seen = heavy_modules(*commands)
    assert len(seen) == len(commands)
    assert not [words for words, (printed, loaded) in zip(commands, seen, strict=True)
                if "usage: " not in printed or loaded]


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_status_imports_only_readers_of_records(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "datasets/some/v1/shards").mkdir(parents=True)
    [(printed, loaded)] = heavy_modules(["status", "--root", str(tmp_path), *more])
    assert "datasets/some/v1/shards" in printed and loaded <= {"numpy", "pyarrow"}
