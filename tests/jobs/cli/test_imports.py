"""The command line imports heavy modules only for verbs that need them: they take seconds and half a gigabyte."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.verbs import VERBS

REPOSITORY = Path(__file__).parents[3]
HEAVY = {"PIL", "aiohttp", "boto3", "diffusers", "faiss", "jinja2", "matplotlib", "numpy", "open_clip", "pandas",
         "pyarrow", "ray", "s3fs", "scipy", "sqlglot", "torch", "torchvision", "wandb"}
CODE = """
import contextlib, sys
from jobs.cli.main import main
with contextlib.suppress(SystemExit):
    assert main(sys.argv[2:]) == 0
print("loaded:", *sorted(set(sys.argv[1].split(",")) & sys.modules.keys()))
"""


def heavy_modules(*words: str) -> tuple[str, set[str]]:
    """The output of a command, and the heavy modules that it has imported at its end."""
    done = subprocess.run([sys.executable, "-c", CODE, ",".join(HEAVY), *words], check=True, capture_output=True,
                          text=True, cwd=REPOSITORY)
    printed, _, loaded = done.stdout.rpartition("loaded:")
    return printed, set(loaded.split())


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    printed, loaded = heavy_modules(*words)
    assert "usage: " in printed and loaded == set()


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_status_imports_only_readers_of_records(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "datasets/some/v1/shards").mkdir(parents=True)
    printed, loaded = heavy_modules("status", "--root", str(tmp_path), *more)
    assert "datasets/some/v1/shards" in printed and loaded <= {"numpy", "pyarrow"}
