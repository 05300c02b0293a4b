"""One damaged file of a published root: every verb ends as documented, and the hints lead to a root without faults.

RDM_ATTACKS names other kinds of damage than the three that are tried by default (`DAMAGE` has all), with commas.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.jobs.publishing.damage.attacks import DAMAGE, follow, make_place, run
from tests.jobs.publishing.published_art import NAME, rebuild

_VERSIONS = f"datasets/{NAME}"
_FILES = (f"{_VERSIONS}/current.json", f"published/{NAME}/000001.json", f"published/{NAME}/000002.json",
          f"{_VERSIONS}/v1/release.json", f"{_VERSIONS}/v2/release.json", f"{_VERSIONS}/v3/release.json",
          f"{_VERSIONS}/v1/shards/manifest.json", f"{_VERSIONS}/v1/shards/000000.tar",
          f"{_VERSIONS}/v2/embeddings/manifest.json", f"{_VERSIONS}/v3/index/knn.index",
          f"{_VERSIONS}/v2/forgotten.json", "forgotten.json", "takedowns/000001.json")
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


@pytest.mark.parametrize("file", _FILES)
def test_the_hints_restore_a_damaged_root(template: Path, tmp_path: Path, file: str) -> None:
    faults = []
    for damage in os.environ.get("RDM_ATTACKS", "edited,removed,pipe").split(","):
        try:
            print(file, damage, attack(template, tmp_path / damage, file, damage))
        except AssertionError as error:
            faults.append(f"{damage}: {error}")
    assert not faults, "\n\n".join(faults)
