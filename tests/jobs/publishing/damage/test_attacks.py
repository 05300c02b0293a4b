"""One damaged file of a published root: every verb ends as documented, and the hints lead to a root without faults.

RDM_ATTACKS names other kinds of damage than the default three, with commas (`DAMAGE` has all), and none is slow then.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.publishing.damage.attacks import DAMAGE, follow, make_place, run
from tests.jobs.publishing.published_art import NAME, rebuild

_VERSIONS = f"datasets/{NAME}"
_FILES = (f"{_VERSIONS}/current.json", f"published/{NAME}/000001.json", f"published/{NAME}/000002.json",
          f"{_VERSIONS}/v1/release.json", f"{_VERSIONS}/v2/release.json", f"{_VERSIONS}/v3/release.json",
          f"{_VERSIONS}/v1/shards/manifest.json", f"{_VERSIONS}/v1/shards/000000.tar",
          f"{_VERSIONS}/v2/embeddings/manifest.json", f"{_VERSIONS}/v3/index/knn.index",
          f"{_VERSIONS}/v2/forgotten.json", "forgotten.json", "takedowns/000001.json")
_UNSEEN_BY_SIZES = [
    (f"{_VERSIONS}/v1/shards/000000.tar", "rot"), (f"{_VERSIONS}/v3/embeddings/000000.npy", "rot"),
    (f"{_VERSIONS}/v3/index/records/index.json", "edited"), (f"{_VERSIONS}/v2/shards/plan.json", "removed")]
_KINDS = os.environ.get("RDM_ATTACKS", "edited,removed,pipe").split(",")
_VERBS = (["status"], ["versions", NAME], ["rollback", NAME, "--dry-run"],
          ["rollback", NAME, "--to", "v1", "--dry-run"], ["repair", NAME, "--dry-run"], ["gc", NAME, "--dry-run"],
          ["forget", "--sha256", "0" * 64, "--dry-run"])


@pytest.fixture(scope="module")
def template(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(first, tmp_path_factory.mktemp("attacked") / "place")


def attack(template: Path, folder: Path, file: str, damage: str) -> list[str]:
    """Damage a file of a copy, run the verbs, and follow the hints of `verify`; what was run. AssertionError if not."""
    place = shutil.copytree(template, folder)
    DAMAGE[damage](place / "root" / file)
    for arguments in _VERBS:
        code, output = run(place / "root", *arguments)
        assert code in {0, 1, 2} and "Traceback" not in output, (arguments, output)
        assert not code or ("error: " in output and "hint: " in output), (arguments, output)
    ways: list[str] = []
    while True:
        code, output = run(place / "root", "verify")
        if code == 0:
            break
        assert code == 1 and len(ways) < 12, (ways, output)
        ways += follow(place, output)
    assert ways, "verify finds nothing"
    rebuild(place / "root", place / "source")
    assert run(place / "root", "verify") == (0, ""), ways
    shutil.rmtree(place)
    return ways


def _attacks() -> Iterator[Any]:
    """Each file with each kind of damage. One kind of each file is in `make test`; the others are slow."""
    yield from _UNSEEN_BY_SIZES
    for number, file in enumerate(_FILES):
        for place, damage in enumerate(_KINDS):
            slow = "RDM_ATTACKS" not in os.environ and number % len(_KINDS) != place
            yield pytest.param(file, damage, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("file", "damage"), _attacks())
def test_the_hints_restore_a_damaged_root(template: Path, tmp_path: Path, file: str, damage: str) -> None:
    print(file, damage, attack(template, tmp_path / damage, file, damage))
