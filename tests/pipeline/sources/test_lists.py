"""Lists as sources: formats, columns, filters, types and bounded memory."""

import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.media import resize
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from tests.pipeline import synthetic, web_server
from tests.pipeline.shards.test_shard import table
from tests.pipeline.sources.list_datasets import (
    COUNT,
    DOWNLOAD,
    PICTURES,
    laion,
    open_path,
    read_back,
    shard_source,
    stored_samples,
    write_list,
)


def test_a_list_of_any_kind_gives_the_same_tars(tmp_path, image_site):
    rows, samples_by_kind, schemas = laion(image_site), {}, {}
    for kind in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.bz2", "tsv"):
        dataset, manifest = shard_source(tmp_path / kind, write_list(tmp_path / f"list.{kind}", rows))
        samples_by_kind[kind] = stored_samples(dataset, manifest)
        schemas[kind] = {pq.read_schema(dataset.fetch("shards", file)) for record in manifest["items"]
                         for file in record["files"] if file["name"].endswith(".parquet")}
    whole = samples_by_kind["parquet"]
    assert [sample["json"]["url"] for sample in whole] == [row["URL"] for row in rows]
    assert [sample["txt"].decode() for sample in whole] == [row["TEXT"] or "" for row in rows]
    assert [[sample["json"][name] for name in ("WIDTH", "HEIGHT", "similarity", "punsafe", "hash")]
            for sample in whole] == [[row[name] for name in ("WIDTH", "HEIGHT", "similarity", "punsafe", "hash")]
                                     for row in rows]
    assert samples_by_kind["jsonl"] == samples_by_kind["jsonl.gz"] == samples_by_kind["jsonl.zst"] == whole
    assert samples_by_kind["csv"] == samples_by_kind["csv.gz"] == samples_by_kind["csv.bz2"]
    assert samples_by_kind["tsv"] == [
        sample | {"txt": sample["txt"].replace(b"\n", b" "),
                  "json": sample["json"] | {"caption": sample["json"]["caption"].replace("\n", " ")}}
        for sample in samples_by_kind["csv"]]
    assert samples_by_kind["csv"] == [
        sample | {"json": {key: str(cell) if key in rows[0] and cell is not None else cell  # the only types of a CSV
                           for key, cell in sample["json"].items()}} for sample in whole]
    assert schemas["parquet"] == schemas["jsonl"] and len(schemas["parquet"]) == len(schemas["csv"]) == 1
    for sample in whole:
        pixels = resize.resize(Image.open(io.BytesIO(PICTURES[sample["json"]["url"][-6:]])), 16, "center_crop")
        assert np.array_equal(resize.decode_pixels(sample["png"]), np.asarray(pixels))


def test_lists_may_be_a_folder_a_pattern_and_several_files_anywhere(tmp_path, image_site, s3):
    rows = laion(image_site)
    dataset, manifest = shard_source(tmp_path / "whole", write_list(tmp_path / "whole.parquet", rows))
    expected = stored_samples(dataset, manifest)
    folder = tmp_path / "parts"
    parts = [write_list(folder / f"part-{number}.parquet", rows[first:last], row_group_size=3)
             for number, (first, last) in enumerate(itertools.pairwise((0, 11, 12, COUNT)))]
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").write_bytes(b"of Spark")
    (folder / "stats.json").write_text("{}")
    for name, data in synthetic.files_below(folder).items():
        storage.put_bytes(data, storage.join(s3, "lists", name))
    for number, source in enumerate((folder, folder / "*.parquet", folder / "part-?.*", f"{tmp_path}/p*/*", parts,
                                     f"{s3}/lists", f"{s3}/lists/part-*")):
        dataset, manifest = shard_source(tmp_path / f"{number}", source)
        assert stored_samples(dataset, manifest) == expected, source


def test_columns_may_be_named(tmp_path, image_site):
    rows = [{"where": row["URL"], "words": row["TEXT"], "url": "not this one", "check": hashlib.md5(
        PICTURES[row["URL"][-6:]]).hexdigest()} for row in laion(image_site)]
    options = {"url_column": "where", "caption_column": "words", "hash_column": "check"}
    dataset, manifest = shard_source(tmp_path, write_list(tmp_path / "list.csv", rows), **options)
    assert [row["caption"] for row in table(dataset, manifest)] == [row["words"] or "" for row in rows]
    assert {row["check"] for row in table(dataset, manifest)} == {row["check"] for row in rows}
    assert manifest["totals"]["samples"] == COUNT
    for name, value in (("url_column", "nowhere"), ("hash_column", "sha"), ("caption_column", "x")):
        with pytest.raises(ValueError, match=f"no column {value} .*\nhint: it has where, words"):
            shard_source(tmp_path / "refused", tmp_path / "list.csv", **{name: value})


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.parquet", b"no parquet", "cannot be read as parquet"), ("a.csv", b"a,b\n1,2\n", "has the columns a, b"),
    ("a.csv", b"url\n", "holds no rows"), ("a.jsonl", b"[]\n[]\n", "none of the first 2 rows .* not a JSON object"),
    ("a.csv", b'url,"cap\nx,y\n', "header .* not closed before"), ("a.csv", b"\xff\xfeu\0r\0l\0", "text is UTF-16"),
    ("a.csv.gz", b"no gzip", "cannot be read after row 0"), ("a.jsonl", b"[" * 100_000, "none of the first 1 rows"),
    ("a.json", b'[{"url": "x"}, {"url": "y"}', "after row 2: the array is not closed"),
    ("a.json", b'[{"url": "x"}, {"url":, "y"}]', "cannot be read .*Expecting value"),
    ("a.txt", b"Apache License\n", "has no URL in its first 1 lines"),
    ("a.txt", b"http://x/y.jpg\ta cat\n" * 3, "has tabs in its lines.*\nhint: --columns url,caption"),
    ("a.csv", b"a cat,http://x/y.jpg\na dog,http://x/z.jpg\n", "has no header.*\nhint: --columns caption,url names"),
    ("a.csv", b"http://x/y.jpg,a cat,3\nhttp://x/z.jpg,a dog,4\n",
     "has no header.*\nhint: --columns url,caption,column3 names"),
    ("a.jsonl.gz", gzip.compress(b'{"url": "x"}\n' * 9000, mtime=0)[:50], "cannot be read after row"),
])
def test_lists_that_cannot_be_read_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        shard_source(tmp_path / "root", tmp_path / name)
    assert not (tmp_path / "root").exists()


def test_invalid_sources_are_refused(tmp_path, image_site):
    write_list(tmp_path / "lists" / "a.parquet", laion(image_site))
    write_list(tmp_path / "lists" / "b.csv", laion(image_site))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURES["00.png"])
    for options, message in (({"source": tmp_path / "lists"}, "parquet and text lists in one"),
                             ({"source": (tmp_path / "lists", tmp_path / "pictures")}, "of several kinds"),
                             ({"source": tmp_path / "pictures", "kind": "tars"}, r"no files ending in \.tar"),
                             ({"source": tmp_path / "absent", "kind": "list"}, "there is no file or folder"),
                             ({"source": tmp_path / "absent"}, "there is no file or folder"),
                             ({"source": tmp_path / "lists" / "*.md"}, "no images in"),
                             ({"source": (tmp_path / "pictures", tmp_path / "pictures")}, "from one folder, not")):
        with pytest.raises(ValueError, match=message):
            shard_source(tmp_path / "root", **options)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_parts_of_any_size_keep_the_order_of_the_list(tmp_path, kind):
    rng = np.random.default_rng(0)
    for number in range(25):
        lengths = rng.integers(0 if kind == "parquet" else 1, 60, rng.integers(1, 4)).tolist()
        total = sum(lengths)
        if not total:
            continue
        # In runs, so that whole row groups fall to the filter by their statistics.
        scores = np.repeat(rng.integers(0, 10, total), rng.integers(1, 30, total))[:total].tolist()
        first, folder = 0, tmp_path / f"{number}"
        for file, length in enumerate(lengths):
            rows = [{"url": f"http://example.org/{row}", "score": scores[row] if scores[row] else None}
                    for row in range(first, first + length)]
            if rows or kind == "parquet":
                write_list(folder / f"{file}.{kind}", rows or [{"url": "", "score": 1}], **(
                    {"row_group_size": int(rng.integers(1, 25))} if kind == "parquet" else {}))
            if not rows:  # a file with columns and no rows
                schema = pa.schema([("url", pa.string()), ("score", pa.int64())])
                pq.write_table(schema.empty_table(), folder / f"{file}.parquet")
            first += length
        for need, least in ((int(rng.integers(1, 40)), 0), (int(rng.integers(1, 40)), 5), (1, 9), (1000, 1)):
            where = f"score >= {least}" if least else ""
            passing = [row for row in range(total) if not least or scores[row] >= least]
            if not passing:
                with pytest.raises(ValueError, match="not one of"):
                    list(open_path(folder, samples_per_shard=need, where=where).parts())
                continue
            source = open_path(folder, samples_per_shard=need, where=where)
            rows, counts, filtered = read_back(source, tmp_path / "plan")
            assert [row for part in rows for row in part] == passing
            assert list(map(len, rows)) == counts
            assert set(counts[:-1]) <= {need} and 1 <= counts[-1] <= need
            assert sum(filtered) == total - len(passing)


def test_a_filter_reads_text_as_numbers_if_needed(tmp_path, image_site):
    rows = laion(image_site)
    where = 'punsafe < 0.3 and similarity > 0.1 and HEIGHT is not None and not contains(TEXT, "17")'
    expected = [number for number, row in enumerate(rows) if row["punsafe"] is not None and row["punsafe"] < 0.3
                and row["similarity"] > 0.1 and row["HEIGHT"] and row["TEXT"] and "17" not in row["TEXT"]]
    assert 3 < len(expected) < 15
    for kind in ("parquet", "csv", "tsv", "jsonl"):
        path = write_list(tmp_path / f"list.{kind}", rows)
        part_rows, _, _ = read_back(open_path(path, where=where), tmp_path / "plan")
        assert part_rows == [expected], kind
        with pytest.raises(ValueError, match=r"no column Punsafe .*\nhint: it is written punsafe"):
            open_path(path, where="Punsafe < 1")


def test_filtered_rows_are_counted_in_the_manifest(tmp_path, image_site):
    path = write_list(tmp_path / "list.parquet", laion(image_site), row_group_size=4)
    dataset, manifest = shard_source(tmp_path, path, where="punsafe < 0.2")
    rows = table(dataset, manifest)
    assert manifest["info"]["filtered"] + len(rows) == COUNT
    assert [row["source_row"] for row in rows] == [
        number for number, row in enumerate(laion(image_site)) if row["punsafe"] is not None and row["punsafe"] < 0.2]
    assert [record["info"]["rows"] for record in manifest["items"]] == [7, 4]
    assert not storage.exists(storage.join(dataset.folder("shards"), "000002.tar"))


MEASURE = """
import sys
from pathlib import Path
from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.plan import prepare

for name, where in (("few.parquet", "score >= 50"), ("many.parquet", "score >= 50"), ("few.csv", ""), ("many.csv", "")):
    config = ShardConfig(source=f"{sys.argv[1]}/{name}", where=where)
    items = prepare(Shard(Dataset.parse(f"{sys.argv[1]}/{name} planned", "x"), config))
    # Not getrusage, which counts in what the process was before it became this one.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(len(items), int(peak.split()[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_list(tmp_path):
    for name, count in (("few", 10_000), ("many", 1_000_000)):
        urls = pa.array(np.char.add("http://example.org/a/picture/of/something/", np.arange(count).astype(str)))
        rows = pa.table({"url": urls, "caption": urls, "score": np.arange(count) % 100})
        pq.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=250_000)
    for name, count in (("few", 2_000), ("many", 60_000)):
        (tmp_path / f"{name}.csv").write_text("url,caption\n" + "".join(
            f"http://example.org/a/picture/of/something/{row},a caption of something or other\n"
            for row in range(count)))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    items, peaks = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert items == (5, 500, 2, 60)
    assert peaks[1] < peaks[0] + 40 and peaks[3] < peaks[1] + 20, peaks


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_that_is_empty_in_one_shard_has_the_same_type(tmp_path, image_site, kind):
    count = 21
    columns = {"whole": [None] * 7 + [1] * 14, "mixed": [1] * 7 + [None] * 7 + [0.5] * 7,
               "truth": [None] * 14 + [True] * 7, "words": [None] * 7 + ["x"] * 14, "never": [None] * count,
               "large": [2**63 - 1] * 7 + [None] * 7 + [-(2**63)] * 7, "list": [[1]] * 7 + [None] * 14,
               "odd": [1] * 7 + ["x"] * 7 + [None] * 7}
    rows = [{"url": f"http://{image_site}/{number:02d}.png", "caption": "x"} | {name: cells[number] for name, cells in
                                                                         columns.items()} for number in range(count)]
    if kind == "parquet":  # of which a file may think a column whole, and another not
        paths = [write_list(tmp_path / "lists" / f"{first}.parquet", rows[first:first + 7]) for first in (0, 7, 14)]
    else:
        paths = [write_list(tmp_path / "list.jsonl", [{name: cell for name, cell in row.items()
                                                       if cell is not None or name == "never"}
                                                      for row in rows])]
    dataset, manifest = shard_source(tmp_path, paths)
    schemas = [pq.read_schema(storage.local_path(storage.join(dataset.folder("shards"), f"{number:06d}.parquet")))
               for number in range(3)]
    assert schemas[0] == schemas[1] == schemas[2]
    types = {name: str(schemas[0].field(name).type) for name in columns}
    assert types == {"whole": "int64", "mixed": "double", "truth": "bool", "words": "string", "never": "string",
                     "large": "int64", "list": "string", "odd": "string"}
    assert [row["large"] for row in table(dataset, manifest)] == columns["large"]
    assert [row["mixed"] for row in table(dataset, manifest)] == columns["mixed"]


def test_hostile_cells_do_not_stop_a_shard(tmp_path, image_site):
    good = f"http://{image_site}/00.png"
    rows = [{"url": good, "caption": "half an emoji \ud83d", "x\udc00": "\ud83d", "phash": "text"},
            {"url": f"http://{image_site}/absent\ud83d.png", "caption": ["a", "list"], "phash": {"a": 1}},
            {"url": 5, "caption": 10**40, "phash": 2**80, "status": "ours", "key": "theirs", "source_row": "x"},
            {"url": None}, {"url": "", "mean_colour": "red"}, {"url": "http://[::1", "caption": None},
            {"url": good, "phash": "1e400"}]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    dataset, manifest = shard_source(tmp_path, path)
    table_rows = table(dataset, manifest)
    assert [row["status"] for row in table_rows] == ["success", *["failed_to_download"] * 5, "success"]
    assert [row["caption"] for row in table_rows] == ["half an emoji ?", "a", str(10**40), "", "", "", ""]
    assert [row["error_message"].split(":")[0] for row in table_rows[1:6]] == ["http_404", *["bad_url"] * 4]
    assert table_rows[0]["x?"] == "?" and table_rows[0]["phash"] == "text" and table_rows[2]["key"] == "0000000002"
    # Columns of the same names as hashes of duplicates: those of failed rows are theirs, not ours.
    from pipeline.shards.deduplicate import Deduplicate
    from pipeline.shards.deduplicate import deduplicate_shards as sift
    sifted = sift(Deduplicate(Dataset.parse(str(tmp_path), "near"), ShardConfig(
        source=str(path), image_size=16, duplicates="near", download=DOWNLOAD)), run_stage)
    assert sifted["totals"]["samples"] == 1


def test_the_type_of_a_column_may_appear_late(tmp_path, image_site):
    rows = [{"url": f"http://{image_site}/00.png"},
            {"url": f"http://{image_site}/01.png", "TEXT": "words", "md5": "0" * 32}]
    dataset, manifest = shard_source(tmp_path, write_list(tmp_path / "list.jsonl", rows))
    first, second = table(dataset, manifest)
    assert first["status"] == "success" and second["error_message"].startswith("hash_mismatch")
    assert second["caption"] == "words"


def test_images_in_parquet_are_read_from_there(tmp_path, image_site):
    pictures = [PICTURES[f"{number:02d}.png"] if number not in {2, 5} else None for number in range(9)]
    pictures[7] = b"no picture"
    layouts = {
        "struct": {"image": [{"bytes": data, "path": f"{number}.png"} if number != 5 else None
                             for number, data in enumerate(pictures)]},
        "binary": {"jpg": pictures},
        "large": {"picture": pa.array(pictures, pa.large_binary()), "image_url": [f"http://{image_site}/00.png"] * 9}}
    images_by_layout = {}
    for name, columns in layouts.items():
        pq.write_table(pa.table(columns | {"text": [f"text {number}" for number in range(9)], "label": [1] * 9}),
                       tmp_path / f"{name}.parquet", row_group_size=2)
        options = {"image_column": "picture"} if name == "large" else {}
        dataset, manifest = shard_source(tmp_path / name, tmp_path / f"{name}.parquet", **options)
        rows = table(dataset, manifest)
        assert [row["error_message"] and row["error_message"].split(":")[0] for row in rows] == [
            None, None, "picture_missing", None, None, "picture_missing", None, "not_a_picture", None]
        assert [row["status"] for row in rows if row["status"] != "success"] == [
            "failed_to_download", "failed_to_download", "failed_to_resize"]
        assert [row["caption"] for row in rows] == [f"text {number}" for number in range(9)]
        assert {row["label"] for row in rows} == {1}
        images_by_layout[name] = [sample["png"] for sample in stored_samples(dataset, manifest)]
    assert images_by_layout["struct"] == images_by_layout["binary"] == images_by_layout["large"]
    assert len(images_by_layout["struct"]) == 6
    rows = table(*shard_source(tmp_path / "struct", tmp_path / "struct.parquet"))
    assert [row["url"] for row in rows] == [*(f"{number}.png" for number in range(5)), "row 5", "6.png", "7.png",
                                           "8.png"]


def test_images_in_the_table_are_not_downloaded(tmp_path, image_site):
    web_server.seen(image_site)
    rows = [{"image": {"bytes": PICTURES["00.png"], "path": None}, "url": f"http://{image_site}/01.png"}]
    dataset, manifest = shard_source(tmp_path, write_list(tmp_path / "list.parquet", rows))
    assert [row["url"] for row in table(dataset, manifest)] == [f"http://{image_site}/01.png"]
    assert "requests" not in web_server.seen(image_site)
    with pytest.raises(ValueError, match="holds int64, not bytes"):
        pq.write_table(pa.table({"number": [1]}), tmp_path / "numbers.parquet")
        open_path(tmp_path / "numbers.parquet", image_column="number")


def test_patches_are_cut_at_their_coordinates_and_deterministic(tmp_path, image_site):
    rows = [{"url": f"http://{image_site}/{number:02d}.png", "caption": f"{number}"} for number in range(9)]
    rows.insert(4, {"url": f"http://{image_site}/absent.png", "caption": "absent"})
    options = {"patches": 3, "patch_side": 30, "image_size": 11}
    patches_by_list = {}
    for name, size, listed in (("7", 7, rows), ("2", 2, rows), ("turned", 4, rows[::-1])):
        dataset, manifest = shard_source(tmp_path / name, write_list(tmp_path / f"{name}.csv", listed),
                                         samples_per_shard=size, **options)
        samples = stored_samples(dataset, manifest)
        assert len({sample["__key__"] for sample in samples}) == len(samples) == manifest["totals"]["samples"] == 27
        assert len(table(dataset, manifest)) == 28 and manifest["totals"]["skipped"] == {"http_404": 1}
        patches_by_list[name] = [(sample["json"]["url"], sample["json"]["patch_left"], sample["json"]["patch_top"],
                                  sample["png"]) for sample in samples]
    assert patches_by_list["7"] == patches_by_list["2"]
    assert sorted(patches_by_list["turned"]) == sorted(patches_by_list["7"])
    places = set()
    for url, x, y, data in patches_by_list["7"]:
        whole = resize.resize(Image.open(io.BytesIO(PICTURES[url[-6:]])), 30, "keep_ratio")
        assert min(whole.size) == 30
        assert 0 <= x <= whole.width - 11 and 0 <= y <= whole.height - 11
        assert np.array_equal(resize.decode_pixels(data), np.asarray(whole.crop((x, y, x + 11, y + 11))))
        places.add((x, y))
    assert len(places) > 20
    dataset, manifest = shard_source(tmp_path / "seed", tmp_path / "7.csv", seed=1, **options)
    samples = stored_samples(dataset, manifest)
    assert [(sample["json"]["patch_left"], sample["json"]["patch_top"]) for sample in samples] != [
        (x, y) for _, x, y, _ in patches_by_list["7"]]
    # Nothing is enlarged, and so there is no room.
    with pytest.raises(StageFailed, match="1 http_404, 9 too_small"):
        shard_source(tmp_path / "small", tmp_path / "7.csv", patches=2, patch_side=30, image_size=22,
                     only_if_bigger=True)
