"""A root on a read-only file system, or where this user may not write: readers work, writers say why they do not."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.publishing.damage.attacks import run
from tests.jobs.publishing.published_art import NAME

_READERS = (["status"], ["versions", NAME], ["verify"], ["ls"], ["show", f"{NAME}/0000000004"],
            ["search", NAME, "a red circle"], ["rollback", NAME, "--dry-run"], ["repair", NAME, "--dry-run"],
            ["gc", NAME, "--dry-run"], ["forget", "--sha256", "0" * 64, "--dry-run"], ["repair", NAME])
_WRITERS = (["rollback", NAME], ["gc", NAME], ["forget", "--sha256", "0" * 64], ["report"],
            ["shard", "other", "--source", "{source}", "--local"],
            ["rebuild", NAME, "--source", "{source}", "--local", "--image-size", "32", "--full"])


@pytest.fixture(scope="module")
def read_only(two_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root on a file system that is mounted read-only, for root; else without the right to write."""
    root = shutil.copytree(two_versions / "root", tmp_path_factory.mktemp("read-only") / "root")
    folders = [folder for folder, _, _ in os.walk(root)]
    if os.geteuid():
        for folder in folders:
            os.chmod(folder, 0o555)
        yield root
        for folder in folders:
            os.chmod(folder, 0o755)
        return
    mount = ["mount", "--bind", str(root), str(root)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize("verb", _READERS, ids=" ".join)
def test_readers_work(read_only: Path, verb: list[str]) -> None:
    code, output = run(read_only, *verb)
    assert code == 0, output


@pytest.mark.parametrize("verb", _WRITERS, ids=lambda verb: verb[0])
def test_writers_name_the_folder(read_only: Path, two_versions: Path, verb: list[str]) -> None:
    code, output = run(read_only, *(word.format(source=two_versions / "source") for word in verb))
    assert code == 1 and "Errno" not in output, output
    said = "cannot be written by this user" if verb[0] == "rebuild" else (
        "this user may not write in" if os.geteuid() else "is on a read-only file system: expected a place to write")
    assert said in output and str(read_only) in output and "hint: --root must " in output, output
