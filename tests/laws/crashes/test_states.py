"""Equal results are one state, so that the tests of crashes check them once. Any other result is another state."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.laws.crashes.roots import NAME, Place, copy_place
from tests.laws.crashes.states import describe_state

_CHANGES: dict[str, Callable[[Path], object]] = {
    "a changed file": lambda root: _replace(root / "datasets/plain/v1/shards/000000.tar", b"0.json", b"0.jsoN"),
    "a missing file": lambda root: (root / "datasets/plain/v1/shards/000000.parquet").unlink(),
    "a leftover file": lambda root: (root / "datasets/.index.0123456789abcdef").write_bytes(b""),
    "a manifest that does not fit its release": lambda root: _replace(
        root / f"datasets/{NAME}/v3/index/manifest.json", b'"run"', b'"run" '),
    "a release that does not fit its pointer": lambda root: _replace(
        root / f"datasets/{NAME}/v3/release.json", b'"name"', b'"name" '),
    "an older pointer": lambda root: (root / f"datasets/{NAME}/current.json").write_bytes(
        (root / f"published/{NAME}/000002.json").read_bytes()),
    "a record with another count": lambda root: _replace(
        root / "datasets/plain/v1/shards/records/000000.json", b'"samples": 4', b'"samples": 5'),
}


def _replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data, path
    path.write_bytes(data.replace(old, new))


@pytest.fixture(scope="module")
def rebuilt(template: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = copy_place(template, tmp_path_factory.mktemp("rebuilt") / "place")
    place.run(place.arguments("rebuild"))
    place.run(place.arguments("forget"))
    return place


def test_equal_results_are_one_state(template: Place, rebuilt: Place, tmp_path: Path) -> None:
    again = copy_place(template, tmp_path / "again")
    again.run(again.arguments("rebuild"))
    again.run(again.arguments("forget"))
    pointers = [Path(place.root, f"datasets/{NAME}/current.json").read_bytes() for place in (rebuilt, again)]
    assert pointers[0] != pointers[1]  # the times differ, and so do all hashes of files with times
    assert describe_state(rebuilt.root, rebuilt.folder) == describe_state(again.root, again.folder)


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_any_other_result_is_another_state(rebuilt: Place, tmp_path: Path, change: Callable[[Path], object]) -> None:
    place = copy_place(rebuilt, tmp_path / "place")
    before = describe_state(place.root, place.folder)
    change(Path(place.root))
    assert describe_state(place.root, place.folder) != before
