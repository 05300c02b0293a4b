"""Unusual files of lists: without a header, in folders that name columns, with other columns, with odd cells."""

import base64
import bz2
import json
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.rows.rows import parse_row
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.sources.detect import open_source
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.sources.list_datasets import PICTURES, open_path, read_back, shard_source, write_list
from tests.pipeline.sources.test_tars import write_tar

IMAGES = [PICTURES[f"{number:02d}.png"] for number in range(4)]


def urls(image_site, count=4):
    return [f"http://{image_site}/{number:02d}.png" for number in range(count)]


@pytest.mark.parametrize("where", ["", "width > 1"])
def test_unreadable_rows_are_named(tmp_path, image_site, where):
    first, second, third, _ = urls(image_site)
    path = tmp_path / "list.csv"
    path.write_text(f'url,caption,caption,width\n{first},"open,x,2\n{second},one,two,3\n{third},one\n')
    dataset, manifest = shard_source(tmp_path, path, where=where)
    assert manifest["totals"]["skipped"] == {"bad_row": 2} and manifest["info"]["rows"] == 3
    rows = table(dataset, manifest)
    assert [row["status"] for row in rows] == ["failed_to_download", "success", "failed_to_download"]
    assert (rows[1]["caption"], rows[1]["caption_2"], rows[1]["source_row"]) == ("one", "two", 1)
    lines = {(line["key"], line["reason"], line["kept"]): line["detail"] for line in ledger(dataset, manifest)}
    assert lines["list.csv, row 1, line 2", "bad_row", False].startswith("a quote is not closed")
    assert lines["list.csv, row 3, line 4", "bad_row", False] == "2 cells, and the header has 4"
    assert lines["list.csv, row 1, line 2", "repeated_column", True] == "caption is stored as caption_2"
    # Another try at the failed rows has the same result.
    again, _ = shard_source(tmp_path / "again", path, where=where)
    assert table(again, manifest) == rows


def test_lists_without_a_header_and_lists_of_urls_are_read(tmp_path, image_site):
    files = {"a.tsv": "\n".join(f'"cat {number}\t{url}' for number, url in enumerate(urls(image_site))),
             "a.txt": "\n".join(f"cat {number}\t{url}" for number, url in enumerate(urls(image_site))),
             "a.csv": "\n".join(f'"cat, {number}",{url}' for number, url in enumerate(urls(image_site)))}
    captions = {"a.tsv": '"cat 0', "a.txt": "cat 0", "a.csv": "cat, 0"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        dataset, manifest = shard_source(tmp_path / name[2:], tmp_path / name, columns="caption, url")
        rows = table(dataset, manifest)
        assert [row["url"] for row in rows] == urls(image_site) and rows[0]["caption"] == captions[name]
        assert {row["status"] for row in rows} == {"success"}
    for name, data in (("b.txt.bz2", bz2.compress("\n".join(urls(image_site)).encode())),
                       ("b.json", json.dumps([{"url": url} for url in urls(image_site)]).encode())):
        folder = tmp_path / "folder" / name[2:]
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        (folder / "readme.md").write_text("x")
        dataset, manifest = shard_source(tmp_path / "x" / name, folder)
        assert [row["url"] for row in table(dataset, manifest) if row["status"] == "success"] == urls(image_site)
    with pytest.raises(ValueError, match="--columns names the columns of CSV"):
        open_path(tmp_path / "folder", columns="url")


def test_an_unused_setting_does_not_change_fingerprints(tmp_path):
    dataset = Dataset.parse(str(tmp_path), "x")
    assert "columns" not in Shard(dataset, ShardConfig(source="x")).section()
    assert Shard(dataset, ShardConfig(source="x", columns="url")).section()["columns"] == "url"


@pytest.mark.parametrize("columns", ["url,caption,caption", "url, url", "url,,caption"])
def test_each_column_without_a_header_needs_its_own_name(columns):
    with pytest.raises(ValueError, match="expected another name for each column\nhint: "):
        ShardConfig(source="x", columns=columns)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_folders_named_after_values_give_columns(tmp_path, kind):
    for number, (lang, year) in enumerate((("en", "2024"), ("de", "2023"), ("__HIVE_DEFAULT_PARTITION__", "2024"),
                                           ("a%2Fb", "7"))):
        write_list(tmp_path / "list" / f"lang={lang}" / f"year={year}" / f"part.{kind}", [
            {"url": f"http://x/{number}.jpg", "caption": "x"}])
    source = open_path(tmp_path / "list")
    assert source.column_types() == {"lang": "string", "year": "int64"}
    rows = [row for part in source.parts() for row in rows_of(source, part, tmp_path / "stage")]
    cells = {row.name[-5]: row.columns for row in rows}
    assert cells == {"0": {"lang": "en", "year": 2024}, "1": {"lang": "de", "year": 2023},
                     "2": {"lang": None, "year": 2024}, "3": {"lang": "a/b", "year": 7}}
    filtered = open_path(tmp_path / "list", where='year == 2024 and lang is not None')
    assert len(read_back(filtered, tmp_path / "plan")[0][0]) == 1
    identity, types = source.identity(), source.column_types()
    # The values belong to what the source holds, the place of the source does not.
    (tmp_path / "moved=1").mkdir()
    (tmp_path / "list").rename(tmp_path / "moved=1" / "list")
    moved = open_path(f"{tmp_path}/moved=1/list/*/*/*.{kind}")
    assert moved.identity() == identity and moved.column_types() == types
    (tmp_path / "moved=1/list/lang=en").rename(tmp_path / "moved=1/list/lang=fr")
    assert open_path(tmp_path / "moved=1" / "list").identity() != identity


def rows_of(source, part, stage):
    from pipeline import storage
    from pipeline.rows.rows import ReadReport
    for name, data in part.carries:
        storage.put_bytes(data, storage.join(str(stage), name))
    return source.rows(str(stage), part.inputs, stage, ReadReport())


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_files_of_a_list_may_have_other_columns(tmp_path, kind, image_site):
    first, second, third, fourth = urls(image_site)
    folder = tmp_path / "lists"
    write_list(folder / f"a.{kind}", [{"url": first, "caption": "one", "size": 1}])
    write_list(folder / f"b.{kind}", [{"score": 0.5, "TEXT": "two", "URL": second}])
    write_list(folder / f"c.{kind}", [{"image_url": third, "score": 0.25}, {"image_url": fourth, "score": 0.75}])
    dataset, manifest = shard_source(tmp_path, folder)
    rows = table(dataset, manifest)
    assert [row["url"] for row in rows] == urls(image_site)
    assert [row["caption"] for row in rows] == ["one", "two", "", ""]
    numbers = [None, 0.5, 0.25, 0.75]
    assert [row["score"] for row in rows] == (numbers if kind != "csv" else [n and str(n) for n in numbers])
    assert manifest["totals"]["noted"] == {"caption_missing": 2} and "TEXT" not in rows[1]
    filtered = open_path(folder, where="score > 0.3")
    assert read_back(filtered, tmp_path / "plan")[0] == [[1, 3]]
    with pytest.raises(ValueError, match="no column scor"):
        open_path(folder, where="scor > 0.3")
    if kind == "parquet":
        pq.write_table(pa.table({"image": [IMAGES[0]]}), folder / "d.parquet")
        with pytest.raises(ValueError, match=r"d\.parquet has images as bytes \(image\), and the first .* as url"):
            open_path(folder)


def test_columns_with_reserved_names_are_kept(tmp_path, image_site):
    rows = [{"url": url, "caption": f"c{number}", "key": f"k{number}", "status": "fine", "width": 10 + number,
             "source_width": -1, "sha256": None} for number, url in enumerate(urls(image_site))]
    for kind in ("parquet", "jsonl"):
        dataset, manifest = shard_source(tmp_path / kind, write_list(tmp_path / f"list.{kind}", rows))
        stored = table(dataset, manifest)
        assert [row["source_key"] for row in stored] == ["k0", "k1", "k2", "k3"]
        assert [row["key"] for row in stored] == [f"000000000{number}" for number in range(4)]
        assert [(row["source_status"], row["status"]) for row in stored] == [("fine", "success")] * 4
        assert [(row["width"], row["source_width"], row["source_source_width"]) for row in stored] == [
            (16, -1, 10 + number) for number in range(4)]
    own = {"image_offset": 5, "image_bytes": 6, "phash": "ab", "mean_colour": "red"}
    lists = write_list(tmp_path / "own.jsonl", [{"url": url} | own for url in urls(image_site)])
    for duplicates in ("keep", "near"):
        dataset, manifest = shard_source(tmp_path / duplicates, lists, duplicates=duplicates)
        row = table(dataset, manifest)[0]
        is_reserved = {"image_offset": True, "image_bytes": True} | dict.fromkeys(["phash", "mean_colour"],
                                                                               duplicates == "near")
        assert own == {name: row[f"source_{name}" if reserved else name] for name, reserved in is_reserved.items()}
        assert row["image_offset"] > 500 and row.get("source_phash", "ab") == "ab"
    write_tar(tmp_path / "tars" / "0.tar", [(f"{number}.{kind}", data) for number in range(2) for kind, data in (
        ("png", IMAGES[number]), ("cls", b"7\n"), ("json", json.dumps({"width": 5, "url": "http://e"}).encode()))])
    stored = table(*shard_source(tmp_path / "tar", tmp_path / "tars"))
    assert [(row["cls"], row["width"], row["source_width"], row["source_key"]) for row in stored] == [
        (7, 16, 5, "0"), (7, 16, 5, "1")]
    assert "source_url" not in stored[0]


def test_a_second_image_and_captions_of_any_shape_are_read(tmp_path):
    mask = [np.random.default_rng(number).bytes(200_000) for number in range(4)]
    columns = {"image": [{"bytes": data, "path": None} for data in IMAGES],
               "mask": [{"bytes": data, "path": f"m{number}.png"} for number, data in enumerate(mask)],
               "license": pa.array([b"cc-by", b"cc0", None, b"cc-by"], pa.binary()),
               "phash": pa.array([b"\xff\0", None, b"\1\2", b"\3\4"], pa.binary()),
               "caption": [{"de": "eine Katze", "en": "a cat"}, {"de": "ein Hund", "en": None}, None,
                           {"de": "", "en": ""}]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    dataset, manifest = shard_source(tmp_path, tmp_path / "list.parquet")
    rows = table(dataset, manifest)
    assert [row["mask"] for row in rows] == mask and rows[1]["mask_path"] == "m1.png"
    assert [row["license"] for row in rows] == ["cc-by", "cc0", None, "cc-by"]
    assert [row["phash"] for row in rows] == [b"\xff\0", None, b"\1\2", b"\3\4"]
    assert [row["caption"] for row in rows] == ["a cat", "ein Hund", "", ""]
    assert json.loads(rows[0]["source_caption"]) == {"de": "eine Katze", "en": "a cat"}
    files = [file for record in manifest["items"] for file in record["files"]]
    assert sum(file["bytes"] for file in files) < 1_000_000  # 800,000 of them are the masks
    captions = [["a cat", "one cat"], ["a dog"], [], None]
    pq.write_table(pa.table({"image": IMAGES, "captions": captions}), tmp_path / "lists.parquet")
    rows = table(*shard_source(tmp_path / "lists", tmp_path / "lists.parquet"))
    assert [row["caption"] for row in rows] == ["a cat", "a dog", "", ""]
    assert [row["captions"] for row in rows] == ['["a cat", "one cat"]', '["a dog"]', "[]", None]


@pytest.mark.parametrize(("cells", "noted"), [
    (pa.array(IMAGES).dictionary_encode(), 0), (pa.array(IMAGES, pa.binary_view()), 0),
    (pa.array([list(data) for data in IMAGES], pa.list_(pa.uint8())), 4),
    (pa.array([{"bytes": list(data)} for data in IMAGES], pa.struct([("bytes", pa.large_list(pa.int64()))])), 4),
    (pa.array([{"bytes": base64.b64encode(data).decode(), "path": "a.png"} for data in IMAGES]), 4),
    (pa.StructArray.from_arrays([pa.array(IMAGES).dictionary_encode()], ["bytes"]), 0)])
def test_images_may_be_cells_of_any_type_of_bytes(tmp_path, cells, noted):
    pq.write_table(pa.table({"image": cells, "text": list("abcd")}), tmp_path / "list.parquet")
    dataset, manifest = shard_source(tmp_path, tmp_path / "list.parquet")
    assert manifest["totals"]["samples"] == 4 and manifest["totals"]["noted"] == ({"cell_changed": 4} if noted else {})
    assert len({row["sha256"] for row in table(dataset, manifest)}) == 4
    assert all(line["detail"].startswith("image: ") for line in ledger(dataset, manifest))


def test_rows_with_unreadable_cells_are_skipped(tmp_path):
    columns = {"image": [{"bytes": "no base64!"}, {"bytes": base64.b64encode(IMAGES[0]).decode()}, None]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    dataset, manifest = shard_source(tmp_path, tmp_path / "list.parquet")
    assert manifest["totals"]["samples"] == 1 and manifest["totals"]["skipped"] == {"picture_missing": 2}
    assert {line["detail"] for line in ledger(dataset, manifest) if line["kept"]} == {
        "image: the text is no base64", "image: base64 is read as bytes"}


def test_tables_of_captions_are_read_like_lists(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, data in enumerate(IMAGES):
        (folder / f"{number}.png").write_bytes(data)
    (folder / "captions.csv").write_bytes(b'file,caption,note\n0.png,"open,x\n1.png,caf\xe9,x\n'
                                          b'2.png,three,"two\nlines"\n3.png,a,b,c\n')
    dataset, manifest = shard_source(tmp_path, folder)
    rows = {row["url"]: row for row in table(dataset, manifest)}
    assert {name: row["caption"] for name, row in rows.items() if row["status"] == "success"} == {
        "0.png": "", "1.png": "caf\ufffd", "2.png": "three", "3.png": ""}
    assert rows["2.png"]["note"] == "two\nlines"
    assert manifest["totals"]["skipped"] == {"bad_row": 2}
    assert manifest["totals"]["noted"] == {"caption_missing": 2, "cell_changed": 1}
    assert {line["key"] for line in ledger(dataset, manifest) if not line["kept"]} == {
        "captions.csv, row 1, line 2", "captions.csv, row 4, line 6"}
    long = "x" * 200_000
    (folder / "captions.csv").write_text(f"file,caption\n0.png,{long}\n")
    dataset, manifest = shard_source(tmp_path / "long", folder)
    assert table(dataset, manifest)[0]["caption"] == long


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "b.jsonl"])
def test_captions_and_hashes_may_begin_after_many_rows(tmp_path, name):
    rows = [{"url": f"http://h/{number}.png"} | ({"caption": f"{number}", "md5": f"{number:032x}"} if number > 1030 else
                                                 {"note": {"a": 1}}) for number in range(1040)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / name).write_text(f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines))
    addresses = [str(tmp_path / name)]
    if name == "b.jsonl":
        (tmp_path / "a.jsonl").write_text('{"url": "http://h/first.png"}\n')
        addresses.insert(0, str(tmp_path / "a.jsonl"))
    source = open_source(ShardConfig(source=tuple(addresses), samples_per_shard=2000))
    read = [parse_row(line) for part in source.parts() for line in part.carries[0][1].splitlines()][len(addresses) - 1:]
    assert [row.caption for row in read] == [row.get("caption", "") for row in rows]
    assert [row.digest for row in read] == [row.get("md5", "") for row in rows]
    assert "caption" not in source.column_types() and not any("caption" in row.columns for row in read)
    wanted = ShardConfig(source=(addresses[-1],), caption_column="caption", where="caption == '1035'")
    assert sum(part.inputs["count"] for part in open_source(wanted).parts()) == 1


@pytest.mark.parametrize("captioned", [range(1050, 1100), range(1024), range(5, 1100, 2)])
def test_objects_without_the_caption_are_noted_in_all_rows(tmp_path, captioned):
    rows = [{"url": f"http://h/{number}.png"} | ({"caption": f"c{number}"} if number in captioned else {})
            for number in range(1100)]
    source = open_source(ShardConfig(source=(str(write_list(tmp_path / "a.jsonl", rows)),)))
    read = [row for part in source.parts() for row in rows_of(source, part, tmp_path / "stage")]
    assert [row.caption for row in read] == [row.get("caption", "") for row in rows]
    assert [number for number, row in enumerate(read) if row.remarks != ["caption_missing"]] == [*captioned]


@pytest.mark.parametrize("caption", ["b", "b, with, commas"])
def test_the_command_for_lists_with_semicolons_works(tmp_path, caption):
    (tmp_path / "a.csv").write_text(f"url;caption\nhttp://h/a.png;{caption}\n")
    with pytest.raises(ValueError, match="echo") as error:
        open_path(tmp_path / "a.csv")
    subprocess.run(str(error.value).partition("hint: ")[2], shell=True, cwd=tmp_path, check=True)
    source = open_source(ShardConfig(source=(str(tmp_path / "sep_a.csv"),)))
    assert [row.caption for part in source.parts() for row in rows_of(source, part, tmp_path / "stage")] == [caption]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_unknown_paths_are_refused_and_rows_without_captions_noted(tmp_path, kind):
    rows = [{"url": f"http://h/{number}.png", "meta": {"title": f"t{number}" if number else None}, "n": "x"}
            for number in range(3)]
    path = write_list(tmp_path / f"a.{kind}", [row | {"meta": json.dumps(row["meta"])} if kind == "csv" else row
                                               for row in rows])

    def read(column):
        source = open_source(ShardConfig(source=(str(path),), caption_column=column))
        return [row for part in source.parts() for row in rows_of(source, part, tmp_path / "stage")]

    for column, captions in (("meta.title", ["", "t1", "t2"]), ("{n}: {meta.title}", ["", "x: t1", "x: t2"])):
        assert [row.caption for row in read(column)] == captions
        assert [row.remarks for row in read(column)] == [["caption_missing"], [], []]
    for column in ("meta.nope", "{meta.nope} {n}"):
        with pytest.raises(ValueError, match=r"meta\.nope.*caption_column.*\nhint: "):
            read(column)


def test_an_empty_file_of_a_list_is_named(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("url\nhttp://h/1.png\n")
    (tmp_path / "b.csv").write_text("")
    list(open_source(ShardConfig(source=(str(tmp_path),))).parts())
    assert "b.csv holds no rows" in caplog.text


def test_rows_without_a_url_are_named_by_their_number(tmp_path, image_site):
    path = write_list(tmp_path / "a.jsonl", [{"url": urls(image_site)[0]}, {"url": None}, {"url": " "}])
    lines = ledger(*shard_source(tmp_path / "x", path))
    assert [(line["key"], line["reason"]) for line in lines] == [("row 1", "bad_url"), ("row 2", "bad_url")]
