"""Entries of the history that were swapped or removed together with releases: what the rest of a root still tells."""

import os
import shutil
import time
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.publishing.releases import list_versions
from pipeline.releases.published import Published
from tests.jobs.publishing.published_art import NAME, paint, rebuild


@pytest.fixture(scope="module")
def three_versions(two_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = shutil.copytree(two_versions, tmp_path_factory.mktemp("three") / "place")
    paint(place / "source" / "third.png", 3)
    assert rebuild(place / "root", place / "source")["published"] == "v3"
    return place


@pytest.fixture
def third(three_versions: Path, tmp_path: Path) -> Path:
    """A root with three published versions, and its source."""
    return shutil.copytree(three_versions, tmp_path / "third")


def _entry(place: Path, number: int) -> Path:
    return place / "root/published" / NAME / f"{number:06d}.json"


def _release(place: Path, version: str) -> Path:
    return place / "root/datasets" / NAME / version / "release.json"


def _table(root: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The state of each version as `versions` prints it."""
    capsys.readouterr()
    assert main(["versions", NAME, "--root", root]) == 0
    rows = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    return {version: next(cell for cell in cells if cell).strip() for version, *cells in rows}


@pytest.mark.parametrize("pair", [(1, 2), (2, 3)])
def test_entries_that_were_swapped_are_put_back(third: Path, pair: tuple[int, int],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    root, (left, right) = str(third / "root"), (_entry(third, number) for number in pair)
    before = left.read_bytes(), right.read_bytes()
    left.write_bytes(before[1])
    right.write_bytes(before[0])
    assert main(["verify", "--quick", "--root", root]) == 1
    out, err = capsys.readouterr()
    if 3 in pair:
        assert "current.json: " in out and "is not publication 3 of the history" in out
    else:
        assert "000001.json: is publication 2: another one was here" in out and "is missing" not in out
    assert f"hint: python -m jobs repair {NAME} --root {root}" in err
    assert main(["repair", NAME, "--root", root]) == 0
    assert (left.read_bytes(), right.read_bytes()) == before
    assert Published.load(root, NAME).document["sequence"] == 3
    assert main(["verify", "--quick", "--root", root]) == 0


def test_a_copy_in_the_place_of_an_entry_does_not_stand_for_it(third: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, first = str(third / "root"), _entry(third, 1).read_bytes()
    _entry(third, 2).write_bytes(first)
    assert main(["verify", "--quick", "--root", root]) == 1
    assert "000002.json: is publication 1: another one was here" in capsys.readouterr().out
    assert main(["repair", NAME, "--root", root]) == 0
    assert _entry(third, 1).read_bytes() == first and not _entry(third, 2).exists()
    assert main(["verify", "--quick", "--root", root]) == 0
    assert _table(root, capsys) == {"v1": "earlier", "v2": "not in the history", "v3": "published"}
    assert [version["in_history"] for version in list_versions(root, NAME)] == [True, False, True]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_version_without_release_and_entry_was_published(third: Path, version: str,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    root, number = str(third / "root"), int(version[1:])
    _release(third, version).unlink()
    _entry(third, number).unlink()
    fault = f"{version}/release.json: is missing: publication {number + 1} took its place"
    assert main(["verify", "--quick", "--root", root]) == 1
    out = capsys.readouterr().out
    assert fault in out and f"published/{NAME}/{number:06d}.json: is missing" in out
    assert main(["repair", NAME, "--root", root]) == 0
    assert _table(root, capsys)[version] == "damaged"
    assert main(["verify", "--quick", "--root", root]) == 1
    out, err = capsys.readouterr()
    assert fault in out and f"hint: python -m jobs gc {NAME} --lease 0 --root {root}" in err
    hours_ago = time.time() - 2 * 3600  # gc waits for an hour for the publisher of a version without an entry
    os.utime(_release(third, version).with_name("mark.json"), (hours_ago, hours_ago))
    assert main(["gc", NAME, "--lease", "0", "--keep", "0", "--root", root]) == 0
    assert main(["verify", "--root", root]) == 0


def test_an_older_pointer_is_noticed_by_a_machine_that_has_seen_none(
        third: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(third / "root")
    (third / "root/datasets" / NAME / "current.json").write_bytes(_entry(third, 1).read_bytes())
    for number in (2, 3):
        _entry(third, number).unlink()
    monkeypatch.setenv("RDM_CACHE", str(tmp_path / "cache"))
    assert main(["verify", "--quick", "--root", root]) == 1
    out, err = capsys.readouterr()
    assert "current.json: is an older one: v3 was built on it, and no publication names v2" in out
    assert f"hint: python -m jobs repair {NAME} --root {root}" in err
    assert main(["repair", NAME, "--root", root]) == 0
    assert Published.load(root, NAME).version == "v3"
    assert main(["verify", "--quick", "--root", root]) == 0
    assert rebuild(root, third / "source")["unchanged"]


def test_a_release_that_was_never_published_is_no_fault(third: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rebuild that was killed before it published leaves such a release."""
    root, release = third / "root", _release(third, "v4")
    shutil.copytree(root / "datasets" / NAME / "v3", release.parent)
    release.parent.joinpath("mark.json").unlink()
    assert main(["verify", "--quick", "--root", str(root)]) == 0
    assert _table(str(root), capsys)["v4"] == "not in the history"
