"""Captions and metadata beside the images of a folder, as other tools write them."""

import json
import logging
import unicodedata
from pathlib import Path

import pytest

from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, open_path, shard_source, write_list


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURES[f"{number:02d}.png"])
    return folder


def captions(folder: Path, **options) -> dict[str, str]:
    return {row.name: row.caption for row in open_path(folder, **options)._rows()}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_may_be_at_the_top_or_in_each_split(tmp_path, kind):
    top = write_images(tmp_path / "top", "train/a.png", "test/b.png", "c.png")
    write_list(top / f"metadata.{kind}", [{"file_name": "train/a.png", "text": "of a", "additional": "1"},
                                          {"file_name": "test\\b.png", "text": "of b", "additional": "2"}])
    dataset, manifest = shard_source(tmp_path / "x", top)
    assert {row["url"]: (row["caption"], row["additional"]) for row in table(dataset, manifest)} == {
        "train/a.png": ("of a", "1"), "test/b.png": ("of b", "2"), "c.png": ("", None)}
    assert manifest["totals"]["noted"] == {"caption_missing": 1}
    splits = write_images(tmp_path / "splits", "train/a.png", "train/deep/b.png", "test/a.png", "images/d.png")
    write_list(splits / "train" / f"metadata.{kind}", [{"file_name": "a.png", "text": "train a"},
                                                       {"file_name": "./deep/b.png", "text": "train b"},
                                                       {"file_name": "absent.png", "text": "gone"}])
    write_list(splits / "test" / f"metadata.{kind}", [{"file_name": "a.png", "text": "test a"},
                                                      {"file_name": "../images/d.png", "text": "beside"}])
    assert captions(splits) == {"images/d.png": "beside", "test/a.png": "test a", "train/a.png": "train a",
                                "train/deep/b.png": "train b", "train/absent.png": "gone"}
    assert captions(splits, only_captioned=True, caption_column="text").keys() == captions(splits).keys()


def test_files_beside_images_may_spell_accents_in_another_way(tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    source = write_images(tmp_path / "source", f"{apart}.png", f"1/{composed}.png", f"2/{apart}.png",
                          f"2/{composed}.png", f"3/{composed}.png", f"4/{apart}.jpg")
    for name, text in ((composed, "zero"), (f"1/{apart}", "one"), (f"2/{apart}", "two apart"),
                       (f"2/{composed}", "two composed"), (f"3/{apart}", "other"), (f"3/{composed}", "three")):
        (source / f"{name}.txt").write_text(text)
    (source / "4" / f"{composed}.jpg.json").write_text('{"caption": "four"}')
    dataset, manifest = shard_source(tmp_path / "x", source)
    assert {row["url"]: row["caption"] for row in table(dataset, manifest)} == {
        f"{apart}.png": "zero", f"1/{composed}.png": "one", f"2/{apart}.png": "two apart",
        f"2/{composed}.png": "two composed", f"3/{composed}.png": "three", f"4/{apart}.jpg": "four"}
    assert manifest["info"]["ignored_files"] == {".txt": 1}


@pytest.mark.parametrize("column", ["text", "Caption", " caption ", "txt", "PROMPT", "Title", "Alt Text", "alt-text"])
def test_caption_columns_have_many_spellings(tmp_path, column):
    source = write_images(tmp_path / "source", "a.png")
    write_list(source / "metadata.csv", [{"File Name": "a.png", column: "words", "year": 1900}])
    [row] = open_path(source)._rows()
    # The title of a work is also kept as such.
    assert (row.caption, row.columns) == ("words", {"year": "1900"} | ({"Title": "words"} if column == "Title" else {}))


def test_metadata_without_captions_is_taken_and_its_columns_are_named(tmp_path, caplog):
    source = write_images(tmp_path / "source", "a.png", "b.png")
    (source / "a.txt").write_text("from the text")
    write_list(source / "metadata.csv", [{"file_name": "a.png", "label": "cat"}])
    rows = {row["url"]: row for row in table(*shard_source(tmp_path / "x", source))}
    assert (rows["a.png"]["caption"], rows["a.png"]["label"]) == ("from the text", "cat")
    assert "metadata.csv: no column is a caption; it has file_name, label" in caplog.text
    caplog.clear()
    write_list(source / "metadata.csv", [{"name": "a.png", "label": "cat"}])
    assert all(row.columns == {} for row in open_path(source)._rows())
    assert "metadata.csv is not used: no column names the images; it has name, label" in caplog.text
    with pytest.raises(ValueError, match=r"has the columns file_name, label; wanted is one of words\nhint: "):
        write_list(source / "metadata.csv", [{"file_name": "a.png", "label": "cat"}])
        captions(source, caption_column="words")


def test_a_path_or_template_names_the_caption_in_tables_and_json(tmp_path):
    source = write_images(tmp_path / "source", "a.png", "b.png")
    for name in "ab":
        (source / f"{name}.json").write_text(json.dumps({"meta": {"cap": f"deep {name}"}, "n": 1}))
    rows = table(*shard_source(tmp_path / "x", source, caption_column="meta.cap"))
    assert [(row["caption"], row["meta"]) for row in rows] == [("deep a", '{"cap": "deep a"}'),
                                                               ("deep b", '{"cap": "deep b"}')]
    tables = write_images(tmp_path / "tables", "a.png", "b.png")
    for kind in ("csv", "parquet"):
        write_list(tables / f"metadata.{kind}", [{"file_name": "a.png", "style": "Cubism", "artist": "Gris"},
                                                 {"file_name": "b.png", "style": "Cubism", "artist": None}])
        assert captions(tables, caption_column="{style}, {artist}") == {"a.png": "Cubism, Gris", "b.png": ""}
        (tables / f"metadata.{kind}").unlink()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_empty_caption_in_a_table_is_noted(tmp_path, kind):
    source = write_images(tmp_path / "source", "a.png", "b.png", "c.png")
    (source / "c.txt").write_text("from the text")
    write_list(source / f"metadata.{kind}", [{"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": "b"},
                                             {"file_name": "c.png", "text": ""}])
    assert [row.remarks for row in open_path(source)._rows()] == [
        ["caption_missing: the table has an empty text"], [], []]


def test_text_files_beside_images_may_have_any_spelling(tmp_path):
    source = write_images(tmp_path / "source", "a.png", "b.png", "c.jpg", "d.png")
    texts = {"a.caption": "kohya", "b.TXT": "large letters", "c.caption": "not this", "c.txt": "this"}
    for name, text in texts.items():
        (source / name).write_text(text)
    write_list(source / "captions.csv", [{"file": "d.png", "caption": "listed"}])
    rows = {row["url"]: row["caption"] for row in table(*shard_source(tmp_path / "x", source))}
    assert rows == {"a.png": "kohya", "b.png": "large letters", "c.jpg": "this", "d.png": "listed"}


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption", ".json"])
def test_an_image_without_a_text_is_named_if_others_have_one(tmp_path, suffix):
    source = write_images(tmp_path / "source", "a.png", "b.png")
    (source / f"a{suffix}").write_text('{"caption": "a"}' if suffix == ".json" else "a")
    assert [row.remarks for row in open_path(source)._rows()] == [[], ["caption_missing"]]


def test_the_first_text_that_is_not_empty_counts_and_changed_bytes_are_noted(tmp_path):
    source = write_images(tmp_path / "source", *(f"{name}.png" for name in "abcde"))
    for name, data in {"a.txt": b"", "a.caption": b"kohya", "b.txt": b" \n", "b.caption": b"", "c.txt": b"caf\xe9",
                       "d.txt": b"", "d.json": b'{"caption": "in JSON", "n": 1, "n": 2, "t": "\\ud800"}',
                       "e.txt": b"", "e.json": b'{"caption": "\\ud83d\\ude00"}'}.items():
        (source / name).write_bytes(data)
    dataset, manifest = shard_source(tmp_path / "x", source)
    rows = {row["url"]: row for row in table(dataset, manifest)}
    assert {name: row["caption"] for name, row in rows.items()} == {
        "a.png": "kohya", "b.png": "", "c.png": "caf\ufffd", "d.png": "in JSON", "e.png": "\U0001f600"}
    assert (rows["d.png"]["n"], rows["d.png"]["t"]) == (2, "?")
    assert sorted((entry["key"], entry["reason"], entry["detail"]) for entry in ledger(dataset, manifest)) == [
        ("b.png", "caption_missing", ""), ("c.png", "cell_changed", "caption: bytes that are not UTF-8"),
        ("d.png", "cell_changed", "n: an object has it several times; the last one counts"),
        ("d.png", "cell_changed", "t: halves of characters")]


def test_files_of_img2dataset_with_json_beside_images_are_read(tmp_path, s3, caplog):
    caplog.set_level(logging.INFO)
    source = write_images(tmp_path / "source", "00000/000000000.png", "00000/000000002.png", "00001/000010000.png")
    lines = []
    for number, key in enumerate(["000000000", "000000001", "000000002", "000010000"]):
        good = number != 1
        meta = {"url": f"http://example.org/{key}", "caption": f"caption {number}", "similarity": number / 4,
                "key": key, "status": "success" if good else "failed_to_download", "width": 20, "height": 24,
                "error_message": None if good else "gone", "original_width": 40, "original_height": 48,
                "license": None, "sha256": "0" * 64}
        lines.append(meta)
        if good:
            (source / key[:5] / f"{key}.json").write_text(json.dumps(meta, indent=4))
    (source / "00000/000000000.txt").write_text("from the text")
    (source / "00001/000010000.json").write_text("{broken")
    write_list(source / "00000.parquet", lines[:3])
    write_list(source / "00001.parquet", lines[3:])
    (source / "00000_stats.json").write_text("{}")
    dataset, manifest = shard_source(tmp_path / "x", source)
    rows = {row["url"]: row for row in table(dataset, manifest)}
    assert [(row["caption"], row["similarity"]) for row in rows.values()] == [
        ("from the text", 0.0), ("caption 2", 0.5), ("", None)]
    first = rows["00000/000000000.png"]
    assert "source_caption" not in first and first["license"] is None
    assert first["source_url"] == "http://example.org/000000000" and first["source_width"] == 20
    assert rows["00000/000000000.png"]["width"] == 16 and rows["00000/000000000.png"]["original_width"] == 20
    assert {(line["key"], line["reason"]) for line in ledger(dataset, manifest)} == {
        ("00001/000010000.png", "json_unreadable")}
    assert manifest["info"]["ignored_files"] == {".json": 1} and manifest["info"]["earlier_failures"] == 1


def test_ignored_files_are_counted_and_thumbnails_are_not_images(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = write_images(tmp_path / "source", "a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/b.png",
                          "Thumbs/c.png", ".thumbnails/d.png", ".git/e.png", "below/@eaDir/f.png", "eaDir/g.png")
    for name in ("README.md", "b.psd", "below/c.PSD", "notes.txt", "Makefile"):
        (source / name).write_text("x")
    dataset, manifest = shard_source(tmp_path / "x", source)
    assert [row["url"] for row in table(dataset, manifest)] == ["a.png", "eaDir/g.png"]
    assert manifest["info"]["ignored_files"] == {"@eaDir/": 2, ".psd": 2, "__MACOSX/": 1, "Thumbs/": 1, ".md": 1,
                                                 ".txt": 1, "makefile": 1}
    assert "files that are ignored: 2 @eaDir/, 2 .psd, " in caplog.text or "2 .psd, 2 @eaDir/" in caplog.text
    for name in ("a.png", "eaDir/g.png", "notes.txt"):
        (source / name).unlink()
    with pytest.raises(ValueError, match=r"no images in .*source; it has .*2 \.psd"):
        shard_source(tmp_path / "y", source)
