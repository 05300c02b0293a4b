"""Takedown requests without a list and a copy, and versions whose pointer and history are lost."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.datasets.pointer import DamagedPointer
from pipeline.storage import DamagedFile
from pipeline.takedowns.hidden_rows import read_hidden_rows
from tests.jobs.publishing.published_art import NAME, paint, published_dataset, rebuild

_SHA256 = "c" * 64


def _rows(root: Path, version: str) -> list[dict[str, str]]:
    dataset = Dataset(str(root), NAME, version)
    return [row for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record)]


@pytest.mark.parametrize(("lost", "numbers"), [(["takedowns/000002.json", "forgotten.json"], "2..2"),
                                               (["takedowns/000001.json", "forgotten.json"], "1..1"),
                                               (["takedowns", "forgotten.json"], "1..2")])
def test_a_new_request_does_not_reuse_the_number_of_a_lost_one(place: Path, lost: list[str], numbers: str,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    root = place / "root"
    at = ["--root", str(root)]
    forgotten = [_rows(root, "v1")[row]["sha256"] for row in (4, 9)]
    for sha256 in forgotten:
        assert main(["forget", "--sha256", sha256, *at]) == 0
    for name in lost:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    paint(place / "source" / "added.png", 1)
    capsys.readouterr()
    repairing = ["repair", NAME, *at]
    for verb in (["forget", "--sha256", _SHA256, *at], repairing, [*repairing, "--dry-run"],
                 ["rebuild", NAME, "--source", str(place / "source"), "--local", "--full", *at]):
        assert main(verb) == 1, verb
        error = capsys.readouterr().err
        assert f"requests {numbers} of {root}/forgotten.json are lost" in error, verb
        assert f"python -m jobs repair {NAME} --accept-lost-requests --root {root}" in error, verb
    assert not (root / "forgotten.json").exists()
    assert main([*repairing, "--accept-lost-requests"]) == 0
    assert json.loads(capsys.readouterr().out)["accepted_lost_requests"] == list(
        range(int(numbers[0]), int(numbers[-1]) + 1))
    requests = json.loads((root / "forgotten.json").read_text())["requests"]
    assert [request["lost"] for request in requests if "lost" in request]
    assert main(["forget", "--sha256", _SHA256, *at]) == 0
    assert json.loads((root / "takedowns" / "000003.json").read_text())["sha256"] == [_SHA256]
    assert main(["verify", "--quick", *at]) == 0
    # The versions still know which images they hide.
    assert rebuild(root, place / "source")["forgotten"] == 2
    assert not {row["sha256"] for row in _rows(root, "v2")} & set(forgotten)


@pytest.mark.parametrize("versions", [2, 1])
def test_a_lost_pointer_with_its_history_is_named(two_versions: Path, first: Path, tmp_path: Path, versions: int,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    place = shutil.copytree(two_versions if versions == 2 else first, tmp_path / "place")
    root = place / "root"
    at = ["--root", str(root)]
    shutil.rmtree(root / "published" / NAME)
    (root / "datasets" / NAME / "current.json").unlink()
    assert main(["status", *at]) == 0
    assert "current.json is missing, and v" in capsys.readouterr().out
    assert main(["verify", "--quick", *at]) == 1
    assert "current.json is missing, and v" in capsys.readouterr().out
    if versions == 2:
        paint(place / "source" / "third.png", 2)
        with pytest.raises(DamagedPointer, match=f"v2 was built on .*\nhint: python -m jobs repair {NAME} --root"):
            rebuild(root, place / "source")
    assert main(["repair", NAME, *at]) == 0
    if versions == 2:
        assert rebuild(root, place / "source")["published"] == "v3"
    assert main(["verify", "--quick", *at]) == 0


@pytest.mark.parametrize("restored", ["root", "requests"])
def test_a_backup_from_before_a_request_does_not_bring_images_back(place: Path, restored: str,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    root, at = place / "root", ["--root", str(place / "root")]
    shutil.copytree(root, place / "backup")
    assert main(["forget", "--sha256", _rows(root, "v1")[4]["sha256"], *at]) == 0
    assert list(read_hidden_rows(published_dataset(root))) == [4]
    if restored == "requests":
        shutil.copytree(root / "takedowns", place / "backup/takedowns")
    shutil.rmtree(root)
    shutil.copytree(place / "backup", root)
    with pytest.raises(DamagedFile, match="expected 1 requests, got 0"):
        read_hidden_rows(published_dataset(root))
    assert main(["verify", *at]) == 1
    if restored == "root":
        assert main(["repair", NAME, *at]) == 1
        assert "current.json, as this machine has seen it, counts them" in capsys.readouterr().err
    assert main(["repair", NAME, *at, *(["--accept-lost-requests"] if restored == "root" else [])]) == 0
    assert list(read_hidden_rows(published_dataset(root))) == ([4] if restored == "requests" else [])
    assert main(["verify", *at]) == 0
    shutil.rmtree(root)  # another root at the same place has another history
    rebuild(root, place / "source")
    assert list(read_hidden_rows(published_dataset(root))) == []
