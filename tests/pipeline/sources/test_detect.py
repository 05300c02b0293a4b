"""The kind of a source: one kind is used, several kinds are an error that names them."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.media import tars
from tests.pipeline.sources.list_datasets import PICTURES, open_path, shard_source, write_list

ROWS = [{"url": "http://example.org/a.png", "caption": "x"}]
DESCRIPTIONS = [{**ROWS[0], "file_name": "a.png"}]
IMG2DATASET = [{**ROWS[0], "key": "0", "status": "success", "error_message": None, "original_width": 1,
                "original_height": 1}]


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            tars.write(path, [{"__key__": "0", "png": PICTURES["00.png"]}])
        elif name.endswith((".parquet", ".csv", ".jsonl")):
            is_described = name.rpartition("/")[2].startswith(("metadata.", "captions."))
            write_list(path, DESCRIPTIONS if is_described else IMG2DATASET if name.startswith("0") else ROWS)
        else:
            path.write_bytes(PICTURES["00.png"])
    return folder


@pytest.mark.parametrize(("names", "message"), [
    (["assets/logo.png", "data/a.parquet", "data/b.parquet", "data/c.parquet"],
     r"several kinds: 3 lists \(data/a.parquet, data/b.parquet, \.\.\.\), 1 images \(assets/logo.png\)\nhint: --capt"),
    (["logo.jpg", "0.tar", "1.tar"], r"several kinds: 2 tars \(0.tar, 1.tar\), 1 images \(logo.jpg\)"),
    (["0.tar", "urls.parquet"], r"several kinds: 1 (tars|lists)"),
    (["metadata.parquet", "data/a.parquet", "a.png", "0.tar"], r"1 lists \(data/a.parquet\), 1 .*, 1 "),
])
def test_ambiguous_sources_are_named_and_not_guessed(tmp_path, s3, names, message):
    folder = write_files(tmp_path / "source", *names)
    for name in names:
        storage.put_bytes((folder / name).read_bytes(), storage.join(s3, name))
    for place in (folder, s3):
        with pytest.raises(ValueError, match=message):
            open_path(place)
        for kind in ("pictures", "list", "tars"):
            suffixes = {"pictures": ("png", "jpg"), "list": ("parquet", "csv"), "tars": ("tar",)}[kind]
            count = sum(name.endswith(suffixes) for name in names)
            if count:
                assert open_path(place, kind=kind).summary()["files"] == count


@pytest.mark.parametrize(("names", "kind", "files", "ignored"), [
    (["a.png", "metadata.csv"], "pictures", 1, {".csv": 1}),
    (["train/a.png", "train/metadata.jsonl", "test/metadata.csv"], "pictures", 1, {".jsonl": 1, ".csv": 1}),
    (["00000.tar", "00000.parquet", "00000_stats.json"], "tars", 1, {".parquet": 1, ".json": 1}),
    (["00000/0.png", "00000.parquet", "00001/1.png", "00001.parquet"], "pictures", 2, {".parquet": 2}),
    (["shards/0.tar", "shards/0.parquet", "shards/ledger/0.jsonl", "shards/rows/0.jsonl", "shards/plan.json"], "tars",
     1, {".parquet": 1, ".jsonl": 2, ".json": 1}),
    (["flat/a.png", "train.csv", "heldout.csv", "plan.json", "manifest.json"], "pictures", 1, {".csv": 2}),
    (["metadata.parquet", "README.md", "@eaDir/a.png"], "list", 1, {".md": 1, "@eaDir/": 1}),
    (["a.parquet", "b.parquet"], "list", 2, {}),
])
def test_files_of_a_layout_are_no_source_themselves(tmp_path, names, kind, files, ignored):
    source = open_path(write_files(tmp_path / "source", *names))
    assert (source.kind, source.count_files()) == (kind, files)
    if kind != "pictures":  # a folder of images ignores only what it does not read
        assert dict(source.ignored) == ignored


@pytest.mark.parametrize(("names", "rows"), [
    (["metadata.parquet", "logo.png"], ROWS), (["captions.csv", "logo.png"], ROWS),
    (["metadata.parquet", "logo.png"], [{"image": {"bytes": PICTURES["00.png"], "path": "0.png"}, "text": "x"}]),
    (["train.parquet", "train/preview.png"], ROWS), (["00000.parquet", "00000/0.png"], ROWS),
    (["0.parquet", "0.tar"], [{"image": PICTURES["00.png"], "caption": "x"}]),
])
def test_tables_with_images_do_not_describe_other_images(tmp_path, names, rows):
    folder = write_files(tmp_path / "source", names[1])
    write_list(folder / names[0], rows)
    with pytest.raises(ValueError, match=rf"several kinds: .*1 lists \({names[0]}\)"):
        open_path(folder)
    assert open_path(folder, kind="list").count_files() == 1


def test_a_file_that_is_named_twice_is_read_once(tmp_path, caplog):
    folder = write_files(tmp_path / "source", "0.tar", "1.tar")
    source = open_path(f"{folder}/*.tar", f"{folder}/0.tar")
    assert [address.rpartition("/")[2] for address in source.addresses] == ["0.tar", "1.tar"]
    assert "1 files are named twice and taken once" in caplog.text


def test_tables_beside_tars_give_the_number_of_rows(tmp_path):
    folder = write_files(tmp_path / "source", "0.tar", "1.tar")
    rows = [{"url": "x", "key": f"{number}", "status": "success" if number else "failed_to_download",
             "error_message": None, "original_width": 1, "original_height": 1} for number in range(4)]
    write_list(folder / "0.parquet", rows)
    assert open_path(folder).summary() == {"kind": "tars", "files": 2, "ignored_files": {".parquet": 1}}
    write_list(folder / "1.parquet", rows[1:])
    assert open_path(folder).summary() == {"kind": "tars", "files": 2, "rows": 6, "earlier_failures": 1,
                                           "ignored_files": {".parquet": 2}}
    assert open_path(folder).left_out()["earlier_failures"] == 1  # for the manifest


def test_patterns_of_lists_are_no_patterns_of_images(tmp_path):
    folder = write_files(tmp_path / "source", "a/x.png", "b/x.png")
    with pytest.raises(ValueError, match=r"there is no folder .*/\{a,b\}\nhint: in a source of images only"):
        open_path(folder / "{a,b}" / "*.png").count_files()


def test_captions_that_are_named_choose_the_images(tmp_path):
    folder = write_files(tmp_path / "source", "a.png", "wikiart.parquet")
    write_list(folder / "list.csv", [{"path": "a.png", "caption": "words"}])
    assert [row.caption for row in open_path(folder, captions=str(folder / "list.csv"))._rows()] == ["words"]
    assert shard_source(tmp_path / "x", folder, kind="pictures")[1]["info"]["ignored_files"] == {
        ".parquet": 1, ".csv": 1}
