"""A damaged manifest of one version: `forget` and `gc` do what they can, and name it."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.datasets.metadata import metadata
from pipeline.takedowns import hidden_rows, takedown_list
from tests.jobs.publishing.published_art import NAME, published_dataset
from tests.laws.file_rights import closed


def _image(place: Path) -> str:
    dataset = published_dataset(place / "root")
    return next(row["sha256"] for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record))


def _damage(place: Path, name: str) -> None:
    shutil.copytree(place / "root/datasets" / NAME / "v1", place / "root/datasets/other/v1", dirs_exist_ok=True)
    (place / "root/datasets/other/v1" / name).write_bytes(b"")


@pytest.mark.parametrize("name", ["shards/manifest.json", "shards/000000.parquet"])
def test_forget_works_beside_a_damaged_version(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, image = str(place / "root"), _image(place)
    _damage(place, name)
    assert main(["forget", "--sha256", image, "--root", root]) == 1
    out, err = capsys.readouterr()
    assert f"{NAME}@v1: 1 image, " in out and takedown_list.count_requests(root) == (1, 1)
    assert ("the request is recorded, and its images are hidden elsewhere, but 1 place cannot be read and may still "
            "have such images: other@v1 (") in err
    assert f"hint: python -m jobs shard other --source FOLDER --overwrite --root {root}; or remove" in err
    assert list(hidden_rows.read_hidden_rows(published_dataset(root))) == [0]
    assert main(["gc", NAME, "--root", root]) == 0
    shutil.rmtree(place / "root/datasets/other")  # the second way of the hint
    assert main(["forget", "--sha256", image, "--root", root]) == 0


@pytest.mark.parametrize("name", ["datasets/other", "datasets/other/v1", "datasets/other/v1/shards/manifest.json",
                                  "datasets/other/v1/shards/000000.parquet", "runs"])
def test_forget_works_beside_what_this_user_may_not_read(place: Path, name: str, capsys) -> None:
    root, image = str(place / "root"), _image(place)
    shutil.copytree(place / "root/datasets" / NAME / "v1", place / "root/datasets/other/v1")
    (place / "root/runs").mkdir()
    with closed(place / "root" / name):
        assert main(["forget", "--sha256", image, "--root", root]) == 1
        out, err = capsys.readouterr()
        assert f"{NAME}@v1: 1 image, " in out and takedown_list.count_requests(root) == (1, 1)
        assert list(hidden_rows.read_hidden_rows(published_dataset(root))) == [0]
        assert "the request is recorded, and its images are hidden elsewhere, but 1 place cannot be read" in err
        assert "(this user may not " in err and f"hint: let this user read and write {root}/{name[:17]}" in err
        assert "damaged" not in err and "rebuild" not in err.partition("hint: ")[2]
    assert main(["forget", "--sha256", image, "--root", root]) == 0
    assert json.loads((place / "root/datasets/other/v1/forgotten.json").read_bytes())["rows"] == [0]


def test_gc_removes_an_unreadable_version(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, image = str(second / "root"), _image(second)
    (second / "root/datasets" / NAME / "v1/shards/manifest.json").write_bytes(b"")
    assert main(["forget", "--sha256", image, "--root", root]) == 1
    assert f"hint: python -m jobs gc {NAME} --lease 0 --root {root}; then the same" in capsys.readouterr().err
    assert main(["gc", NAME, "--keep", "3", "--json", "--root", root]) == 0  # the lease
    assert [entry["kept"] for entry in json.loads(capsys.readouterr().out)] == ["leased", "published"]
    assert main(["gc", NAME, "--keep", "3", "--lease", "0", "--json", "--root", root]) == 0
    removed = json.loads(capsys.readouterr().out)
    assert [entry["kept"] for entry in removed] == ["", "published"] and removed[0]["removed_files"] > 0
    assert main(["forget", "--sha256", image, "--root", root]) == 0
    assert main(["verify", "--only", f"datasets/{NAME}/v2", "--root", root]) == 0


def test_verify_names_the_command_that_restores(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    next((second / "root/datasets" / NAME / "v2/index").glob("knn.index")).write_bytes(b"")
    assert main(["verify", "--root", root]) == 1
    assert (f"hint: python -m jobs rollback {NAME} --to v1 --root {root}; or python -m jobs rebuild {NAME} "
            f"--source SOURCE --root {root}"
            in capsys.readouterr().err)
    assert main(["rollback", NAME, "--root", root]) == 0
    assert main(["verify", "--against", "current", "--root", root]) == 0
    assert main(["verify", "--root", root]) == 1  # the damaged version is there, and no longer published
    assert f"hint: python -m jobs gc {NAME} --lease 0 --root {root}" in capsys.readouterr().err
