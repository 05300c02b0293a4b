"""Something odd in the place of a file or folder of a published root: each command names it, in one sentence."""

import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from tests.jobs.publishing.damage.attacks import make_place, run
from tests.jobs.publishing.published_art import NAME

_BASE = f"datasets/{NAME}"
_FILES = (f"{_BASE}/current.json", f"published/{NAME}/000001.json", f"published/{NAME}/000003.json",
          f"{_BASE}/v3/mark.json", f"{_BASE}/v1/mark.json", f"{_BASE}/v3/release.json", f"{_BASE}/v1/release.json",
          "forgotten.json", f"{_BASE}/v3/forgotten.json", f"{_BASE}/v1/forgotten.json", "takedowns/000001.json",
          f"{_BASE}/v3/rebuild.json", f"{_BASE}/v3/gates.json", f"{_BASE}/v3/shards/plan.json",
          f"{_BASE}/v3/shards/manifest.json", f"{_BASE}/v2/index/manifest.json")
_FOLDERS = ("takedowns", f"published/{NAME}", f"{_BASE}/v3", f"{_BASE}/v1", f"{_BASE}/v3/shards", _BASE, "published",
            "datasets")
_NOT_VERIFIED = ("leases", "leases/odd.0123456789abcdef.json", f"{_BASE}/.swap", "runs/consumer/plan.json")
_READ_BY_ALL = (f"{_BASE}/v3/index/knn.index", f"{_BASE}/v3/shards/records/000000.json")
"""What `verify --quick` does not read."""
_MAY_BE_DAMAGED = ("mark.json", "rebuild.json", "gates.json")
"""Files whose content counts as absent if it is damaged: the next command writes another one."""


def _bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # the name of a socket has at most 107 characters
        made.bind(path.name)


KINDS: dict[str, Callable[[Path], Any]] = {
    "loop": lambda path: path.symlink_to(path.name), "dangling": lambda path: path.symlink_to("/nowhere/at/all"),
    "outside": lambda path: path.symlink_to("/etc/passwd"), "folder": Path.mkdir, "pipe": os.mkfifo,
    "socket": _bind_socket, "device": lambda path: path.symlink_to("/dev/zero")}
_READERS = (["status"], ["versions", NAME], ["ls"], ["show", f"{NAME}/0000000004"], ["search", NAME, "a red circle"],
            ["neighbors", NAME, "--local", "--dry-run"], ["rollback", NAME, "--dry-run"], ["repair", NAME, "--dry-run"],
            ["rollback", NAME, "--to", "v1", "--dry-run"], ["gc", NAME, "--dry-run"],
            ["forget", "--sha256", "0" * 64, "--dry-run"])
_WRITERS = (["forget", "--sha256", "0" * 64], ["gc", NAME], ["rollback", NAME], ["repair", NAME])


@pytest.fixture(scope="module")
def template(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(first, tmp_path_factory.mktemp("odd") / "place")
    (place / "root/leases").mkdir(exist_ok=True)
    return place


@pytest.fixture(scope="module")
def turns() -> Iterator[list[str]]:
    """The verbs in turn: each kind of damage meets some of them, and RDM_ODD=all tries all with each."""
    return itertools.cycle([*_READERS, *_WRITERS])


def _damage(place: Path, path: str, kind: str) -> None:
    odd = place / "root" / path
    shutil.rmtree(odd) if odd.is_dir() else odd.unlink(missing_ok=True)
    KINDS[kind](odd)


def _find_fault(root: Path, verb: list[str], codes: set[int]) -> str:
    """What is wrong with the end of a command: a crash, another exit code, no sentence, no hint, odd names."""
    try:
        code, output = run(root, *verb)
    except Exception as error:
        return f"{verb} raises {error!r}"
    is_clear = not re.search(r"Traceback|Errno|/\.[^/ ]*\.[0-9a-f]{16}", output) and (
        not code or ("error: " in output and "hint: " in output))
    return "" if is_clear and code in codes else f"{verb}: {code} {output}"


@pytest.mark.parametrize("path", [*_FILES, *_FOLDERS, *_NOT_VERIFIED, *_READ_BY_ALL])
def test_each_command_names_it(template: Path, tmp_path: Path, turns: Iterator[list[str]], path: str) -> None:
    faults = []
    for kind in KINDS:
        if kind == "folder" and path in {*_FOLDERS, "leases"}:
            continue
        place = shutil.copytree(template, tmp_path / kind)
        _damage(place, path, kind)
        verify = ["verify"] if path in _READ_BY_ALL else ["verify", "--quick"]
        code, output = run(place / "root", *verify)
        is_harmless = path in _NOT_VERIFIED or (kind == "outside" and path.endswith(_MAY_BE_DAMAGED))
        if (code, "hint: " in output) != (1, True) and not is_harmless:
            faults.append(f"{kind} {verify}: {code} {output}")
        verbs = [*_READERS, *_WRITERS] if os.environ.get("RDM_ODD") == "all" else list(itertools.islice(turns, 2))
        codes = {0, 1, 2} if (path, kind) == (_BASE, "outside") else {0, 1}  # a file beside datasets is no dataset
        faults += [f"{kind} {fault}" for verb in verbs if (fault := _find_fault(place / "root", verb, codes))]
        shutil.rmtree(place)
    assert not faults, "\n".join(faults)


def test_gc_removes_a_version_with_a_folder_in_the_place_of_a_file(second: Path) -> None:
    root = second / "root"
    manifest = root / f"datasets/{NAME}/v1/embeddings/manifest.json"
    manifest.unlink()
    manifest.mkdir()
    assert main(["gc", NAME, "--keep", "0", "--lease", "0", "--root", str(root)]) == 0
    assert not manifest.exists() and main(["verify", "--root", str(root)]) == 0
