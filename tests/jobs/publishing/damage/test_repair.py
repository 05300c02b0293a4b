"""Damaged pointers, missing parts of a published version, and the way back."""

import json
import os
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.publishing.rebuild import run_rebuild
from jobs.publishing.repair import repair
from pipeline import storage
from pipeline.datasets.metadata import metadata
from pipeline.datasets.pointer import DamagedPointer
from pipeline.releases import published
from pipeline.releases.published import Published
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.takedowns import hidden_rows
from tests.jobs.publishing.published_art import NAME, make_rebuild, paint, pointer, published_dataset, rebuild


def _keys(root: Path) -> list[str]:
    dataset = published_dataset(root)
    return [row["key"] for record in dataset.manifest("shards")["items"] for row in metadata(dataset, record, ["key"])]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe"])
def test_a_damaged_pointer_is_refused_and_repaired(second: Path, content: bytes) -> None:
    root = str(second / "root")
    pointer(second).write_bytes(content)
    with pytest.raises(DamagedPointer, match=r"current\.json is damaged\nhint: python -m jobs repair drawn"):
        published_dataset(root)
    assert repair(root, NAME, dry_run=True) == {"dataset": NAME, "dry_run": True, "published": "v2",
                                                "pointer": "restored"}
    assert pointer(second).read_bytes() == content
    assert repair(root, NAME) == {"dataset": NAME, "published": "v2", "pointer": "restored"}
    assert published_dataset(root).version == "v2"


def test_every_verb_refuses_a_missing_pointer(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    pointer(second).unlink()
    for verb in (["neighbors", NAME, "--local"], ["rollback", NAME], ["versions", NAME], ["gc", NAME],
                 ["rebuild", NAME, "--source", str(second / "source"), "--local"]):
        assert main([*verb, "--root", root]) == 1, verb
        error = capsys.readouterr().err
        assert "current.json is " in error and f"hint: python -m jobs repair {NAME} --root {root}" in error, verb
    assert main(["verify", "--quick", "--root", root]) == 1
    assert "current.json is " in capsys.readouterr().out
    assert main(["status", "--root", root]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(["repair", NAME, "--root", root]) == 0
    assert json.loads(capsys.readouterr().out) == {"dataset": NAME, "published": "v2", "pointer": "restored"}
    assert published_dataset(second / "root").version == "v2"
    assert main(["verify", "--root", root]) == 0
    assert rebuild(second / "root", second / "source")["unchanged"]


def test_a_valid_pointer_stays(second: Path) -> None:
    data = pointer(second).read_bytes()
    assert repair(str(second / "root"), NAME)["pointer"] == "in order"
    assert pointer(second).read_bytes() == data
    with pytest.raises(ValueError, match="nothing of other is published"):
        repair(str(second / "root"), "other")


def test_an_older_pointer_is_refused(second: Path) -> None:
    assert published_dataset(second / "root").version == "v2"
    pointer(second).write_bytes((second / "root" / "published" / NAME / "000001.json").read_bytes())
    with pytest.raises(DamagedPointer, match="is an older one: it has number 1, and the history goes up to 2"):
        published_dataset(second / "root")
    shutil.copytree(second / "root", second / "copy")
    (second / "root" / "published" / NAME / "000002.json").unlink()  # a more careful attacker
    with pytest.raises(DamagedPointer, match="is an older one: it has number 1, and this machine has seen 2"):
        published_dataset(second / "root")
    # The history of the copy still has both.
    assert repair(str(second / "copy"), NAME)["published"] == "v2"


def test_a_pointer_with_another_release_than_the_history_is_refused(second: Path) -> None:
    document = json.loads(pointer(second).read_bytes())
    pointer(second).write_text(json.dumps(document | {"release": "0" * 64}))
    with pytest.raises(DamagedPointer, match="is not publication 2 of the history"):
        published_dataset(second / "root")


def test_another_root_at_the_same_place_is_accepted(first: Path, second: Path) -> None:
    assert published_dataset(second / "root").version == "v2"
    (second / "root").rename(second / "old")
    shutil.copytree(first / "root", second / "root")
    history = second / "root" / "published" / NAME / "000001.json"
    document = json.loads(pointer(second).read_text()) | {"published": 1.0}
    for path in (history, pointer(second)):
        path.write_bytes(storage.json_bytes(document))
    assert published_dataset(second / "root").version == "v1"


def test_repair_takes_the_newest_version_that_is_whole(second: Path) -> None:
    pointer(second).unlink()
    tar = next((second / "root" / "datasets" / NAME / "v2" / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    assert repair(str(second / "root"), NAME)["published"] == "v1"
    assert published_dataset(second / "root").version == "v1"
    # A damaged publication in the history costs only itself.
    pointer(second).write_text("{}")
    (second / "root" / "published" / NAME / "000003.json").write_text("{")
    assert repair(str(second / "root"), NAME)["published"] == "v1"


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_repair_uses_the_releases_if_the_history_is_missing(second: Path, damage: str) -> None:
    shutil.rmtree(second / "root" / "published")
    if damage == "cut":
        pointer(second).write_text("{")
    else:
        pointer(second).unlink()
    with pytest.raises(DamagedPointer):
        published_dataset(second / "root")
    assert repair(str(second / "root"), NAME)["published"] == "v2"
    assert published_dataset(second / "root").version == "v2"


@pytest.mark.parametrize("lost", ["shards/manifest.json", "embeddings/000001.npy", "release.json"])
def test_a_rebuild_replaces_a_damaged_version(place: Path, lost: str, caplog: pytest.LogCaptureFixture) -> None:
    (place / "root" / "datasets" / NAME / "v1" / lost).unlink()
    done = rebuild(place / "root", place / "source")
    assert done["published"] == "v2" and done["reused"] == 0
    assert "is damaged (" in caplog.text and "every image is read again" in caplog.text
    assert main(["verify", "--only", f"datasets/{NAME}/v2", "--root", str(place / "root")]) == 0


def test_if_no_version_is_whole_the_newest_is_named_and_replaced(place: Path) -> None:
    pointer(place).unlink()
    (place / "root" / "datasets" / NAME / "v1" / "index" / "manifest.json").unlink()
    with pytest.raises(StageFailed, match="no published version of drawn is whole; v1 is the newest: 1 file missing"):
        repair(str(place / "root"), NAME)
    assert rebuild(place / "root", place / "source")["published"] == "v2"


@pytest.mark.parametrize("lost", ["tombstones", "tombstones/manifest.json"])
def test_missing_tombstones_do_not_bring_images_back(place: Path, lost: str) -> None:
    first = sorted((place / "source").rglob("*.png"))[3]
    first.unlink()
    rebuild(place / "root", place / "source")
    assert len(hidden_rows.read_hidden_rows(published_dataset(place / "root"))) == 1
    path = place / "root" / "datasets" / NAME / "v2" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (NAME, f"{NAME}@v2"):
        with pytest.raises(ValueError, match="tombstones is part of the published drawn@v2 and has no manifest"):
            hidden_rows.read_hidden_rows(published.open_dataset(str(place / "root"), name))
    assert main(["verify", "--quick", "--root", str(place / "root")]) == 1


@pytest.mark.parametrize("lost", [["forgotten.json"], [f"datasets/{NAME}/v1/forgotten.json"],
                                  ["forgotten.json", f"datasets/{NAME}/v1/forgotten.json"]])
def test_missing_takedowns_do_not_bring_images_back(place: Path, lost: list[str],
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    root = str(place / "root")
    keys = _keys(place / "root")
    for key in (keys[4], keys[9]):
        assert main(["forget", "--key", f"{NAME}/{key}", "--root", root]) == 0
    assert list(hidden_rows.read_hidden_rows(published_dataset(place / "root"))) == [4, 9]
    for name in lost:
        (place / "root" / name).unlink()
    with pytest.raises(ValueError, match=r"forgotten\.json is missing or was replaced: expected "):
        hidden_rows.read_hidden_rows(published_dataset(place / "root"))
    assert main(["verify", "--quick", "--root", root]) == 1
    capsys.readouterr()
    assert main(["repair", NAME, "--root", root]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["takedown_list"] == ("restored" if lost[0] == "forgotten.json" else "in order")
    assert list(hidden_rows.read_hidden_rows(published_dataset(place / "root"))) == [4, 9]
    assert main(["verify", "--root", root]) == 0
    done = rebuild(place / "root", place / "source")
    assert (done["published"], done["forgotten"]) == ("v2", 2)
    assert main(["verify", "--root", root]) == 0


def test_verify_finds_rows_of_the_takedown_list_that_searches_still_find(place: Path,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:
    root = str(place / "root")
    assert main(["forget", "--key", f"{NAME}/{_keys(place / 'root')[4]}", "--root", root]) == 0
    path = place / "root" / "datasets" / NAME / "v1" / "forgotten.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": []}))
    assert main(["verify", "--root", root]) == 1
    assert "forgotten.json was changed, or is of other shards" in capsys.readouterr().out
    assert 4 in hidden_rows.read_hidden_rows(published_dataset(root))  # searches look for the rows then
    path.write_text('{"rows": [], "through": 1}')  # as earlier versions of this program wrote it
    assert main(["verify", "--root", root]) == 1
    assert "it does not hide 1 images of the takedown list, the first is row 4" in capsys.readouterr().out
    assert 4 in hidden_rows.read_hidden_rows(published_dataset(root))
    assert main(["repair", NAME, "--root", root]) == 0
    assert main(["verify", "--root", root]) == 0


def test_verify_reads_plans(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "root" / "datasets" / NAME / "v1" / "shards" / "plan.json"
    plan = json.loads(path.read_text())
    path.write_bytes(storage.json_bytes(plan | {"items": plan["items"][:1]}))
    assert main(["verify", "--root", str(place / "root")]) == 1
    assert "shards/plan.json: lists other items than the manifest" in capsys.readouterr().out
    path.unlink()
    assert main(["verify", "--root", str(place / "root")]) == 1


def test_a_takedown_during_a_rebuild_holds_in_the_new_version(place: Path) -> None:


    root, key = str(place / "root"), _keys(place / "root")[4]
    paint(place / "source" / "added.png", 1)
    started = make_rebuild(root, place / "source")

    def seal(stage):  # type: ignore[no-untyped-def]
        manifest = run_stage(stage)
        if stage.name == "embed":  # the shards of the new version are made, and hold the image
            assert main(["forget", "--key", f"{NAME}@v1/{key}", "--root", root]) == 0
        return manifest
    assert run_rebuild(started, seal)["published"] == "v2"
    hidden = hidden_rows.read_hidden_rows(published_dataset(root))
    assert [_keys(place / "root")[row] for row in hidden] == [key]
    assert Published.load(root, NAME).document["takedowns"] == 1


def test_a_removed_takedown_list_does_not_start_empty(place: Path) -> None:
    root, keys = str(place / "root"), _keys(place / "root")
    assert main(["forget", "--key", f"{NAME}/{keys[4]}", "--root", root]) == 0
    (place / "root" / "forgotten.json").unlink()
    with pytest.raises(ValueError, match=r"forgotten\.json is missing or was replaced: expected 1 requests, got 0"):
        rebuild(place / "root", place / "source")
    assert main(["forget", "--key", f"{NAME}/{keys[9]}", "--root", root]) == 0
    assert len(json.loads((place / "root" / "forgotten.json").read_text())["requests"]) == 2
    assert list(hidden_rows.read_hidden_rows(published_dataset(place / "root"))) == [4, 9]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 3, "requests": {}}'])
def test_damaged_takedown_files_are_repaired(place: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, key = str(place / "root"), _keys(place / "root")[4]
    assert main(["forget", "--key", f"{NAME}/{key}", "--root", root]) == 0
    for name in ("forgotten.json", f"datasets/{NAME}/v1/forgotten.json"):
        (place / "root" / name).write_text(content)
        assert main(["verify", "--quick", "--root", root]) == 1
        assert main(["neighbors", NAME, "--local", "--root", root]) == 1
        assert "forgotten.json is " in capsys.readouterr().err
        assert repair(root, NAME)["published"] == "v1"
        assert list(hidden_rows.read_hidden_rows(published_dataset(place / "root"))) == [4]


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_damaged_history_entry_affects_no_other(second: Path, content: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    (second / "root" / "published" / NAME / "000001.json").write_text(content)
    (second / "root" / "published" / NAME / ".DS_Store").write_text("x")
    assert main(["versions", NAME, "--root", root]) == 0
    assert rebuild(second / "root", second / "source")["unchanged"]
    assert main(["verify", "--quick", "--root", root]) == 1
    assert f"published/{NAME}/000001.json: is no publication" in capsys.readouterr().out
    # The newest entry: the pointer itself is in order, so its version is restored.
    (second / "root" / "published" / NAME / "000002.json").write_text(content)
    with pytest.raises(DamagedPointer):
        published_dataset(root)
    assert repair(root, NAME)["published"] == "v2"
    assert main(["verify", "--quick", "--root", root]) == 0


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_a_history_entry_that_is_no_file_is_named(second: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, entry = str(second / "root"), second / "root/published" / NAME / "000002.json"
    entry.unlink()
    {"pipe": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to("/nonexistent/x")}[kind](entry)
    for verb in (["neighbors", NAME, "--local"], ["verify", "--quick"], ["repair", NAME],
                 ["rebuild", NAME, "--source", str(second / "source"), "--local"]):
        assert main([*verb, "--root", root]) == 1, verb
        out, err = capsys.readouterr()
        assert "000002.json is a " in out + err and f"hint: remove {entry}; then python -m jobs repair" in err, verb
    entry.rmdir() if kind == "folder" else entry.unlink()
    paint(second / "source" / "more.png", 2)
    assert rebuild(root, second / "source")["published"] == "v3"
    assert entry.is_file() and main(["verify", "--quick", "--root", root]) == 0


@pytest.mark.parametrize("repaired", [False, True])
def test_a_version_without_an_entry_in_the_history_keeps_its_hashes(second: Path, repaired: bool) -> None:
    root = str(second / "root")
    assert main(["forget", "--key", f"{NAME}@v1/{_keys(second / 'root')[4]}", "--root", root]) == 0
    (second / "root/published" / NAME / "000001.json").unlink()
    if repaired:
        assert main(["repair", NAME, "--root", root]) == 0
    (second / "root/datasets" / NAME / "v1/forgotten.json").unlink()
    dataset = published.open_dataset(root, f"{NAME}@v1")
    assert dataset.trusted
    with pytest.raises(ValueError, match=r"v1/forgotten\.json is missing or was replaced"):
        hidden_rows.read_hidden_rows(dataset)
    assert main(["verify", "--quick", "--root", root]) == 1
    assert main(["repair", NAME, "--root", root]) == 0
    assert len(hidden_rows.read_hidden_rows(dataset)) == 1 and main(["verify", "--root", root]) == 0


def test_repair_writes_the_newest_entry_of_the_history_again(second: Path) -> None:
    root, entry = str(second / "root"), second / "root/published" / NAME / "000002.json"
    content = json.loads(entry.read_bytes())
    entry.unlink()  # as if the publisher was killed before it wrote this
    assert main(["verify", "--quick", "--root", root]) == 0
    restored = {"published": "v2", "pointer": "in order", "history": "restored"}
    assert repair(root, NAME, dry_run=True) == {"dataset": NAME, "dry_run": True} | restored and not entry.exists()
    assert repair(root, NAME) == {"dataset": NAME} | restored
    assert json.loads(entry.read_bytes()) == content
    assert "history" not in repair(root, NAME)


def test_lost_entries_of_the_history_do_not_bring_an_older_version_back(second: Path) -> None:
    root = str(second / "root")
    assert published_dataset(root).version == "v2"
    history = second / "root" / "published" / NAME
    (history / "000002.json").unlink()
    pointer(second).write_bytes((history / "000001.json").read_bytes())
    assert repair(root, NAME)["published"] == "v2"


def test_a_damaged_mark_or_release_blocks_nothing(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    for name in ("v1/mark.json", "v2/mark.json", "v1/release.json"):
        (second / "root" / "datasets" / NAME / name).write_text("{")
    assert main(["versions", NAME, "--root", root]) == 0
    assert "v1" in capsys.readouterr().out
    assert main(["gc", NAME, "--root", root]) == 0
    paint(second / "source" / "more.png", 2)
    assert rebuild(second / "root", second / "source")["published"] == "v3"


def test_repair_and_gc_say_that_the_published_version_is_damaged(second: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    root = str(second / "root")
    (second / "root" / "datasets" / NAME / "v2" / "index" / "manifest.json").unlink()
    for verb in (["repair"], ["gc", "--keep", "0", "--lease", "0"]):
        assert main([verb[0], NAME, *verb[1:], "--root", root]) == 1
        error = capsys.readouterr().err
        assert "v2 is damaged: 1 file missing or changed" in error
        assert f"hint: python -m jobs rollback {NAME} --to v1 --root {root}; or " in error
    assert main(["rollback", NAME, "--root", root]) == 0
    assert published_dataset(root).version == "v1"


@pytest.mark.parametrize("full", [False, True])
def test_a_rebuild_replaces_a_version_with_changed_bytes_of_equal_size(place: Path, full: bool) -> None:
    index = place / "root" / "datasets" / NAME / "v1" / "index" / "knn.index"
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 0xff
    index.write_bytes(data)
    if full:  # a plain rebuild reads only files that are newer than their manifest
        os.utime(index, (0, 0))
        assert rebuild(place / "root", place / "source")["unchanged"]
    assert rebuild(place / "root", place / "source", full=full)["published"] == "v2"
    assert main(["verify", "--root", str(place / "root"), "--against", "current"]) == 0


def test_files_that_are_newer_than_their_manifest_are_read_and_taken_over(place: Path,
                                                                          caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    for path in (place / "root" / "datasets" / NAME / "v1" / "shards").glob("*.tar"):
        os.utime(path)
    assert rebuild(place / "root", place / "source")["unchanged"]
    assert "files are newer than their manifests and were read again" in caplog.text


def test_versions_of_an_unpublished_dataset_are_listed(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(second / "root" / "datasets" / NAME / "v1" / "shards", second / "root" / "datasets/plain/v1/shards")
    assert main(["versions", "plain", "--root", str(second / "root")]) == 0
    assert "not published" in capsys.readouterr().out
