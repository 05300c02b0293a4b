import bz2
import csv
import gzip
import hashlib
import io
import itertools
import json
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.media import resize, tars
from pipeline.media.foreign_tars import TarFaults, read_foreign_tar
from pipeline.shards.shard import Shard
from pipeline.sources.config import DownloadConfig, ShardConfig
from pipeline.sources.detect import open_source
from pipeline.sources.rows import ReadReport
from pipeline.stages.driver import run_stage
from pipeline.stages.types import StageFailed
from pipeline.versions import verify
from tests.pipeline import synthetic, web_server
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.synthetic import encoded, noise

COUNT = 30
DOWNLOAD = DownloadConfig(retries=0, connections=8, timeout=10.0, read_timeout=5.0, allow_hosts=("127.0.0.1",))
PICTURES = {f"{number:02d}.png": encoded(noise(20, 24, number), "PNG") for number in range(COUNT)}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with web_server.serving(PICTURES) as address:
        yield address


def sharded(root, source, **options) -> tuple[Dataset, dict]:
    """A source made into the dataset `x` of small shards, and its manifest; nothing may be wrong with it."""
    dataset = Dataset.parse(str(root), "x")
    settings = {"samples_per_shard": 7, "image_size": 16, "download": DOWNLOAD, "format": "png"} | options
    source = tuple(map(str, source)) if isinstance(source, tuple | list) else str(source)
    manifest = run_stage(Shard(dataset, ShardConfig(source=source, **settings)))
    assert list(verify.find_faults(dataset.root, dataset.path("shards"))) == []
    return dataset, manifest


def packed(dataset: Dataset, manifest: dict) -> list[dict]:
    """The samples of all tars, their JSON read."""
    return [{key: json.loads(value) if key == "json" else value for key, value in sample.items() if key != "__url__"}
            for record in manifest["items"]
            for sample in tars.read(dataset.fetch("shards", {file["name"][-4:]: file for file in record["files"]}[
                ".tar"]))]


def laion(site: str) -> list[dict]:
    """Rows as LAION has them, with what is missing there too."""
    return [{"URL": f"http://{site}/{number:02d}.png", "TEXT": f'picture "{number}",\nof noise' if number % 5 else None,
             "WIDTH": 20, "HEIGHT": 24 if number % 4 else None, "similarity": number / 64,
             "punsafe": None if number == 3 else (number % 10) / 16, "pwatermark": 0.5,
             "hash": number * 2**50 - 2**54} for number in range(COUNT)]


def write_list(path: Path, rows: list[dict], **options) -> Path:
    """Rows as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, _, packing = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return path
    lines = io.StringIO(newline="")
    if kind == "jsonl":
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(lines, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    data = lines.getvalue().encode()
    if packing == "zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes({"": bytes, "gz": gzip.compress, "bz2": bz2.compress}[packing](data))
    return path


# Lists of addresses.

def test_a_list_of_any_kind_gives_the_same_tars(tmp_path, site):
    rows, found, schemas = laion(site), {}, {}
    for kind in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "csv.bz2", "tsv"):
        dataset, manifest = sharded(tmp_path / kind, write_list(tmp_path / f"list.{kind}", rows))
        found[kind] = packed(dataset, manifest)
        schemas[kind] = {pq.read_schema(dataset.fetch("shards", file)) for record in manifest["items"]
                         for file in record["files"] if file["name"].endswith(".parquet")}
    whole = found["parquet"]
    assert [sample["json"]["url"] for sample in whole] == [row["URL"] for row in rows]
    assert [sample["txt"].decode() for sample in whole] == [row["TEXT"] or "" for row in rows]
    assert [[sample["json"][name] for name in ("WIDTH", "HEIGHT", "similarity", "punsafe", "hash")]
            for sample in whole] == [[row[name] for name in ("WIDTH", "HEIGHT", "similarity", "punsafe", "hash")]
                                     for row in rows]
    assert found["jsonl"] == found["jsonl.gz"] == found["jsonl.zst"] == whole
    assert found["csv"] == found["csv.gz"] == found["csv.bz2"] == found["tsv"] == [
        sample | {"json": {key: str(cell) if key in rows[0] and cell is not None else cell  # all that a CSV knows
                           for key, cell in sample["json"].items()}} for sample in whole]
    assert schemas["parquet"] == schemas["jsonl"] and len(schemas["parquet"]) == len(schemas["csv"]) == 1
    for sample in whole:
        pixels = resize.resize(Image.open(io.BytesIO(PICTURES[sample["json"]["url"][-6:]])), 16, "center_crop")
        assert np.array_equal(resize.decode_pixels(sample["png"]), np.asarray(pixels))


def test_lists_may_be_a_folder_a_pattern_and_several_files_anywhere(tmp_path, site, s3):
    rows = laion(site)
    dataset, manifest = sharded(tmp_path / "whole", write_list(tmp_path / "whole.parquet", rows))
    expected = packed(dataset, manifest)
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
        dataset, manifest = sharded(tmp_path / f"{number}", source)
        assert packed(dataset, manifest) == expected, source


def test_columns_may_be_named(tmp_path, site):
    rows = [{"where": row["URL"], "words": row["TEXT"], "url": "not this one", "check": hashlib.md5(
        PICTURES[row["URL"][-6:]]).hexdigest()} for row in laion(site)]
    options = {"url_column": "where", "caption_column": "words", "hash_column": "check"}
    dataset, manifest = sharded(tmp_path, write_list(tmp_path / "list.csv", rows), **options)
    assert [row["caption"] for row in table(dataset, manifest)] == [row["words"] or "" for row in rows]
    assert {row["check"] for row in table(dataset, manifest)} == {row["check"] for row in rows}
    assert manifest["totals"]["samples"] == COUNT
    for name, value in (("url_column", "nowhere"), ("hash_column", "sha"), ("caption_column", "x")):
        with pytest.raises(ValueError, match=f"no column {value} .*\nhint: it has where, words"):
            sharded(tmp_path / "refused", tmp_path / "list.csv", **{name: value})


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.parquet", b"no parquet", "cannot be read as parquet"), ("a.csv", b"a,b\n1,2\n", "has the columns a, b"),
    ("a.csv", b"url\n", "holds no rows"), ("a.jsonl", b'{"url": "x"}\n[]\n', "after row 2: a line that is no JSON obj"),
    ("a.jsonl", b'{"url": "x"}\n{"url": \n', "after row 2"), ("a.csv", b"url\n\xff\n", "cannot be read after row"),
    ("a.csv.gz", b"no gzip", "cannot be read after row 0"), ("a.jsonl", b"[" * 100_000, "after row 1"),
    ("a.jsonl.gz", gzip.compress(b'{"url": "x"}\n' * 9000, mtime=0)[:50], "cannot be read after row"),
])
def test_lists_that_cannot_be_read_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        sharded(tmp_path / "root", tmp_path / name)
    assert not (tmp_path / "root").exists()


def test_sources_that_are_no_source_are_refused(tmp_path, site):
    write_list(tmp_path / "lists" / "a.parquet", laion(site))
    write_list(tmp_path / "lists" / "b.csv", laion(site))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURES["00.png"])
    for options, message in (({"source": tmp_path / "lists"}, "parquet and text lists in one"),
                             ({"source": (tmp_path / "lists", tmp_path / "pictures")}, "of several kinds"),
                             ({"source": tmp_path / "pictures", "kind": "tars"}, r"no files ending in \.tar"),
                             ({"source": tmp_path / "absent", "kind": "list"}, "there is no file or folder"),
                             ({"source": tmp_path / "absent"}, "there is no file or folder"),
                             ({"source": tmp_path / "lists" / "*.txt"}, "no pictures in"),
                             ({"source": (tmp_path / "pictures", tmp_path / "pictures")}, "from one folder, not")):
        with pytest.raises(ValueError, match=message):
            sharded(tmp_path / "root", **options)


def of(path, **options):
    return open_source(ShardConfig(source=str(path), **options))


def read_back(source, folder: Path) -> tuple[list[list[int]], list[int], list[int]]:
    """(source rows of each part, rows that each part says it has, rows left out of each), as a worker reads them."""
    rows, counts, filtered = [], [], []
    parts = []
    for part in source.parts():
        for name, data in part.carries:
            storage.put_bytes(data, storage.join(str(folder), name))
        parts.append(part)
    there = pickle.loads(pickle.dumps(source))
    for part in parts:
        reading = ReadReport()
        rows.append([row.number for row in there.rows(str(folder), part.inputs, folder, reading)])
        counts.append(part.inputs["count"])
        filtered.append(part.inputs["filtered"] + reading.filtered)
    return rows, counts, filtered


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_parts_hold_the_list_in_order_whatever_their_size(tmp_path, kind):
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
                    list(of(folder, samples_per_shard=need, where=where).parts())
                continue
            rows, counts, filtered = read_back(of(folder, samples_per_shard=need, where=where), tmp_path / "plan")
            assert [row for part in rows for row in part] == passing
            assert list(map(len, rows)) == counts
            assert set(counts[:-1]) <= {need} and 1 <= counts[-1] <= need
            assert sum(filtered) == total - len(passing)


def test_a_filter_reads_text_as_numbers_where_it_must(tmp_path, site):
    rows = laion(site)
    where = 'punsafe < 0.3 and similarity > 0.1 and HEIGHT is not None and not contains(TEXT, "17")'
    expected = [number for number, row in enumerate(rows) if row["punsafe"] is not None and row["punsafe"] < 0.3
                and row["similarity"] > 0.1 and row["HEIGHT"] and row["TEXT"] and "17" not in row["TEXT"]]
    assert 3 < len(expected) < 15
    for kind in ("parquet", "csv", "tsv", "jsonl"):
        path = write_list(tmp_path / f"list.{kind}", rows)
        found, _, _ = read_back(of(path, where=where), tmp_path / "plan")
        assert found == [expected], kind
        with pytest.raises(ValueError, match=r"no column Punsafe .*\nhint: it is written punsafe"):
            of(path, where="Punsafe < 1")


def test_filtered_rows_are_counted_in_the_manifest(tmp_path, site):
    dataset, manifest = sharded(tmp_path, write_list(tmp_path / "list.parquet", laion(site), row_group_size=4),
                                where="punsafe < 0.2")
    rows = table(dataset, manifest)
    assert manifest["info"]["filtered"] + len(rows) == COUNT
    assert [row["source_row"] for row in rows] == [
        number for number, row in enumerate(laion(site)) if row["punsafe"] is not None and row["punsafe"] < 0.2]
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
def test_all_shards_have_the_same_types_though_a_column_is_empty_in_one(tmp_path, site, kind):
    count = 21
    columns = {"whole": [None] * 7 + [1] * 14, "mixed": [1] * 7 + [None] * 7 + [0.5] * 7,
               "truth": [None] * 14 + [True] * 7, "words": [None] * 7 + ["x"] * 14, "never": [None] * count,
               "large": [2**63 - 1] * 7 + [None] * 7 + [-(2**63)] * 7, "list": [[1]] * 7 + [None] * 14,
               "odd": [1] * 7 + ["x"] * 7 + [None] * 7}
    rows = [{"url": f"http://{site}/{number:02d}.png", "caption": "x"} | {name: cells[number] for name, cells in
                                                                         columns.items()} for number in range(count)]
    if kind == "parquet":  # of which a file may think a column whole, and another not
        paths = [write_list(tmp_path / "lists" / f"{first}.parquet", rows[first:first + 7]) for first in (0, 7, 14)]
    else:
        paths = [write_list(tmp_path / "list.jsonl", [{name: cell for name, cell in row.items()
                                                       if cell is not None or name == "never"}
                                                      for row in rows])]
    dataset, manifest = sharded(tmp_path, paths)
    schemas = [pq.read_schema(storage.local_path(storage.join(dataset.folder("shards"), f"{number:06d}.parquet")))
               for number in range(3)]
    assert schemas[0] == schemas[1] == schemas[2]
    types = {name: str(schemas[0].field(name).type) for name in columns}
    assert types == {"whole": "int64", "mixed": "double", "truth": "bool", "words": "string", "never": "string",
                     "large": "int64", "list": "string", "odd": "string"}
    assert [row["large"] for row in table(dataset, manifest)] == columns["large"]
    assert [row["mixed"] for row in table(dataset, manifest)] == columns["mixed"]


def test_hostile_cells_do_not_stop_a_shard(tmp_path, site):
    good = f"http://{site}/00.png"
    rows = [{"url": good, "caption": "half an emoji \ud83d", "x\udc00": "\ud83d", "phash": "text"},
            {"url": f"http://{site}/absent\ud83d.png", "caption": ["a", "list"], "phash": {"a": 1}},
            {"url": 5, "caption": 10**40, "phash": 2**80, "status": "ours", "key": "theirs", "source_row": "x"},
            {"url": None}, {"url": "", "mean_colour": "red"}, {"url": "http://[::1", "caption": None},
            {"url": good, "phash": "1e400"}]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    dataset, manifest = sharded(tmp_path, path)
    found = table(dataset, manifest)
    assert [row["status"] for row in found] == ["success", *["failed_to_download"] * 5, "success"]
    assert [row["caption"] for row in found] == ["half an emoji ?", "a", str(10**40), "", "", "", ""]
    assert [row["error_message"].split(":")[0] for row in found[1:6]] == ["http_404", *["bad_url"] * 4]
    assert found[0]["x?"] == "?" and found[0]["phash"] == "text" and found[2]["key"] == "0000000002"
    # Columns of the same names as hashes of duplicates: those of failed rows are theirs, not ours.
    from pipeline.shards.deduplicate import Deduplicate
    from pipeline.shards.deduplicate import deduplicate_shards as sift
    sifted = sift(Deduplicate(Dataset.parse(str(tmp_path), "near"), ShardConfig(
        source=str(path), image_size=16, duplicates="near", download=DOWNLOAD)), run_stage)
    assert sifted["totals"]["samples"] == 1


def test_what_is_known_of_a_column_may_come_late(tmp_path, site):
    rows = [{"url": f"http://{site}/00.png"}, {"url": f"http://{site}/01.png", "TEXT": "words", "md5": "0" * 32}]
    dataset, manifest = sharded(tmp_path, write_list(tmp_path / "list.jsonl", rows))
    first, second = table(dataset, manifest)
    assert first["status"] == "success" and second["error_message"].startswith("hash_mismatch")
    assert second["caption"] == "words"


# Folders of pictures.

@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_of_a_folder_in_any_kind_of_file(tmp_path, kind):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    names = ["a.png", "below/b.png", "c.png"]
    for number, name in enumerate(names):
        (source / name).write_bytes(PICTURES[f"{number:02d}.png"])
    rows = [{"file": name, "caption": "not this", "words": f"{name}, \u2028 in two lines\x85", "year": 1900 + number}
            for number, name in enumerate(names[:2])]
    write_list(source / f"captions.{kind}", rows)
    dataset, manifest = sharded(tmp_path, source, caption_column="words")
    found = {row["url"]: row for row in table(dataset, manifest)}
    assert {name: row["caption"] for name, row in found.items()} == {
        "a.png": rows[0]["words"], "below/b.png": rows[1]["words"], "c.png": ""}
    years = [1900, 1901] if kind != "csv" else ["1900", "1901"]
    assert [row["year"] for row in found.values()] == [*years, None]
    assert manifest["totals"]["noted"] == {"caption_missing": 1}


def test_captions_in_texts_beside_the_pictures(tmp_path, s3):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    texts = {"a.png": "caption of a \n", "below/b.b.png": "\ufeffof b", "c.png": None, "d.png": ""}
    for name, caption in texts.items():
        (source / name).write_bytes(PICTURES["00.png"])
        if caption is not None:
            (source / name).with_suffix(".txt").write_text(caption)
    for name, data in synthetic.files_below(source).items():
        storage.put_bytes(data, storage.join(s3, "source", name))
    for root, place in ((tmp_path / "local", source), (tmp_path / "remote", storage.join(s3, "source"))):
        dataset, manifest = sharded(root, place)
        assert {row["url"]: row["caption"] for row in table(dataset, manifest)} == {
            "a.png": "caption of a", "below/b.b.png": "of b", "c.png": "", "d.png": ""}
        assert [(line["key"], line["reason"]) for line in ledger(dataset, manifest)] == [("c.png", "caption_missing")]


def test_patterns_choose_pictures_of_a_folder(tmp_path, s3):
    source = tmp_path / "source [1]"
    names = ["a.png", "b.jpg", "x/c.png", "x/y/d.png", "x/y/e[2].png"]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(PICTURES["00.png"])
        storage.put_bytes(PICTURES["00.png"], storage.join(s3, name))
    write_list(source / "captions.csv", [{"file": name, "caption": name} for name in [*names, "absent.png"]])
    for pattern, expected in (("*.png", ["a.png", "absent.png"]), ("**/*.png", ["a.png", *names[2:], "absent.png"]),
                              ("x/*.png", ["c.png"]), ("x/**", ["c.png", "y/d.png", "y/e[2].png"]), ("?.*", names[:2]),
                              ("**/e[2]*", names[4:]), ("**/y/?.png", ["x/y/d.png"])):
        for place in (str(source), s3):
            rows = list(of(f"{place}/{pattern}", kind="pictures")._list())
            wanted = [name for name in expected if place != s3 or name != "absent.png"]
            assert [row.name for row in rows] == wanted, (place, pattern)
            if place != s3 and not pattern.startswith("x"):  # names and captions are those of the folder before it
                assert all(row.caption == row.name for row in rows)


# Tables with pictures in them.

def test_pictures_in_parquet_are_taken_from_there(tmp_path, site):
    pictures = [PICTURES[f"{number:02d}.png"] if number not in {2, 5} else None for number in range(9)]
    pictures[7] = b"no picture"
    layouts = {
        "struct": {"image": [{"bytes": data, "path": f"{number}.png"} if number != 5 else None
                             for number, data in enumerate(pictures)]},
        "binary": {"jpg": pictures},
        "large": {"picture": pa.array(pictures, pa.large_binary()), "image_url": [f"http://{site}/00.png"] * 9}}
    found = {}
    for name, columns in layouts.items():
        pq.write_table(pa.table(columns | {"text": [f"text {number}" for number in range(9)], "label": [1] * 9}),
                       tmp_path / f"{name}.parquet", row_group_size=2)
        options = {"image_column": "picture"} if name == "large" else {}
        dataset, manifest = sharded(tmp_path / name, tmp_path / f"{name}.parquet", **options)
        rows = table(dataset, manifest)
        assert [row["error_message"] and row["error_message"].split(":")[0] for row in rows] == [
            None, None, "picture_missing", None, None, "picture_missing", None, "not_a_picture", None]
        assert [row["status"] for row in rows if row["status"] != "success"] == [
            "failed_to_download", "failed_to_download", "failed_to_resize"]
        assert [row["caption"] for row in rows] == [f"text {number}" for number in range(9)]
        assert {row["label"] for row in rows} == {1}
        found[name] = [sample["png"] for sample in packed(dataset, manifest)]
    assert found["struct"] == found["binary"] == found["large"] and len(found["struct"]) == 6
    rows = table(*sharded(tmp_path / "struct", tmp_path / "struct.parquet"))
    assert [row["url"] for row in rows] == [*(f"{number}.png" for number in range(5)), "row 5", "6.png", "7.png",
                                           "8.png"]


def test_what_is_in_the_table_is_not_fetched(tmp_path, site):
    web_server.seen(site)
    rows = [{"image": {"bytes": PICTURES["00.png"], "path": None}, "url": f"http://{site}/01.png"}]
    dataset, manifest = sharded(tmp_path, write_list(tmp_path / "list.parquet", rows))
    assert [row["url"] for row in table(dataset, manifest)] == [f"http://{site}/01.png"]
    assert "requests" not in web_server.seen(site)
    with pytest.raises(ValueError, match="holds int64, not bytes"):
        pq.write_table(pa.table({"number": [1]}), tmp_path / "numbers.parquet")
        of(tmp_path / "numbers.parquet", image_column="number")


# Tars.

def write_tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], ended: bool = True) -> Path:
    """A tar of these members, which may be anything that a tar can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def member(kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


def sample(key: str, number: int, **meta) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", PICTURES[f"{number:02d}.png"]), (f"{key}.txt", f"caption {number}".encode()),
            (f"{key}.json", json.dumps({"score": number} | meta).encode())]


def flat(*samples: list) -> list:
    return [member for one in samples for member in one]


def test_tars_are_filtered_and_resized_anew(tmp_path, s3):
    members = [flat(*(sample(f"{tar}/{number:04d}", number, caption=f"caption {number}", url=f"http://e/{number}")
                      for number in range(tar * 10, tar * 10 + 10))) for tar in range(3)]
    for number, one in enumerate(members):
        write_tar(tmp_path / "tars" / f"{number:05d}.tar", one)
        (tmp_path / "tars" / f"{number:05d}_stats.json").write_text("{}")
        storage.put_bytes((tmp_path / "tars" / f"{number:05d}.tar").read_bytes(), f"{s3}/tars/{number:05d}.tar")
    where = 'score >= 5 and score != 15 and contains(caption, "caption") and url != "http://e/16"'
    expected = [number for number in range(5, 30) if number not in {15, 16}]
    results = []
    for root, source in (("folder", tmp_path / "tars"), ("pattern", tmp_path / "tars" / "*"), ("s3", f"{s3}/tars")):
        dataset, manifest = sharded(tmp_path / root, source, where=where, image_size=8)
        rows = table(dataset, manifest)
        assert [row["score"] for row in rows] == expected
        assert [row["source_key"] for row in rows] == [f"{number // 10}/{number:04d}" for number in expected]
        assert [row["source_row"] for row in rows] == [number // 10 * 10**9 + number % 10 for number in expected]
        assert {(row["width"], row["original_height"]) for row in rows} == {(8, 24)}
        assert manifest["info"]["filtered"] == 7
        assert [record["info"].get("filtered") for record in manifest["items"]] == [5, 2, None]
        results.append(packed(dataset, manifest))
    assert results[0] == results[1] == results[2]
    with pytest.raises(StageFailed, match="can be used: 30 filtered"):
        sharded(tmp_path / "nothing", tmp_path / "tars", where="score > 100")


def test_a_tar_that_is_cut_gives_what_is_whole(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", flat(*(sample(f"{number}", number) for number in range(4))))
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        places = {info.name: (info.offset, info.offset_data, info.size) for info in tar}
    cuts = {"in the picture": (places["3.png"][1] + 100, 3), "in the metadata": (places["3.json"][1] + 3, 3),
            "in a header": (places["3.png"][0] + 100, 3), "before a sample": (places["3.png"][0], 3),
            "in a sample": (places["3.json"][0], 3), "before the end": (places["3.json"][1] + 512, 4),
            "in the first": (places["0.png"][1] + 1, 0), "nothing": (0, 0)}
    for name, (length, _) in cuts.items():
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / f"{name}.tar").write_bytes(data[:length])
    damaged = bytearray(data)
    damaged[places["2.png"][0]:places["2.png"][0] + 200] = b"\xff" * 200
    (tmp_path / "cut" / "zz damaged.tar").write_bytes(damaged)
    dataset, manifest = sharded(tmp_path, tmp_path / "cut")
    names = sorted([*cuts, "zz damaged"])
    assert {name: record["samples"] for name, record in zip(names, manifest["items"], strict=True)} == {
        name: expected for name, (_, expected) in cuts.items()} | {"zz damaged": 2}
    assert manifest["totals"]["skipped"] == {"tar_cut": len(names)} and manifest["totals"]["noted"] == {}
    assert {line["key"] for line in ledger(dataset, manifest)} == {f"{name}.tar" for name in names}
    assert all(sample["txt"] and sample["json"]["score"] is not None for sample in packed(dataset, manifest))


def test_members_that_are_no_part_of_a_sample_are_counted_and_the_rest_taken(tmp_path):
    holes = member(tarfile.GNUTYPE_SPARSE)
    unsafe = {"../outside.png": PICTURES["00.png"], "/absolute.png": PICTURES["00.png"],
              "below/../../outside.png": PICTURES["00.png"], "link.png": member(tarfile.SYMTYPE, "/etc/passwd"),
              "hard.png": member(tarfile.LNKTYPE, "0.png"), "device.png": member(tarfile.CHRTYPE),
              "pipe.png": member(tarfile.FIFOTYPE), "holes.png": holes}
    members = [*sample("0", 0), *unsafe.items(), *sample("below/1", 1), ("folder", member(tarfile.DIRTYPE)),
               ("README", b"no ending"), ("__meta__/x.json", b"{}"), ("below/._2.png", b"of a Mac"),
               ("._2.png", b"of a Mac"), *sample("below/2", 2), ("below/2.png", PICTURES["05.png"]),
               ("3.txt", b"no picture"), ("3.json", b"{}"), ("4.webp", PICTURES["04.png"]), ("4.PNG", b"second"),
               ("5.JPG", PICTURES["05.png"]), ("5.cls", b"7"), ("6.png", b"no picture"), ("7.png", PICTURES["07.png"]),
               ("7.json", b"[" * 100_000), ("8.png", PICTURES["08.png"]), ("8.json", b'{"text": "x", "exif": 1e999}')]
    path = write_tar(tmp_path / "tars" / "a.tar", members)
    dataset, manifest = sharded(tmp_path, tmp_path / "tars", image_size=32)
    rows = table(dataset, manifest)
    assert [row["source_key"] for row in rows] == ["0", "below/1", "below/2", *"345678"]
    assert {row["source_key"]: row["error_message"].split(":")[0] for row in rows if row["error_message"]} == {
        "3": "picture_missing", "6": "not_a_picture"}
    assert [row["caption"] for row in rows] == [*(f"caption {number}" for number in range(3)), "no picture", "", "",
                                               "", "", "x"]
    remarks = {line["key"]: line["reason"] for line in ledger(dataset, manifest) if line["kept"]}
    assert remarks == dict.fromkeys(unsafe, "unsafe_member") | {
        "below/._2.png": "hidden_member", "below/2.png": "repeated_member"}
    assert manifest["totals"]["skipped"] == {"picture_missing": 1, "not_a_picture": 1}
    assert not (tmp_path / "outside.png").exists()
    assert path.exists()


def test_headers_that_lie_about_sizes_cost_no_memory(tmp_path):
    data = write_tar(tmp_path / "good.tar", sample("0", 0) + sample("1", 1)).read_bytes()
    with tarfile.open(tmp_path / "good.tar") as tar:
        place = next(info.offset for info in tar if info.name == "1.png")
    for name, size in (("huge", 1 << 60), ("negative", -512), ("large", 8**11 - 1)):
        info = tarfile.TarInfo("1.png")
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / f"{name}.tar").write_bytes(data[:place] + header + data[place + 512:])
        found = TarFaults()
        tracemalloc.start()
        assert [one["__key__"] for one in read_foreign_tar(tmp_path / f"{name}.tar", found)] == ["0"], name
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.cut and peak < 1 << 20
    (tmp_path / "none.tar").write_bytes(b"\xff" * 5000)
    assert list(read_foreign_tar(tmp_path / "none.tar", found := TarFaults())) == [] and found.cut


def test_types_of_tars_are_those_of_the_parquet_beside_or_of_the_first_samples(tmp_path):
    for number in range(2):
        write_tar(tmp_path / "plain" / f"{number}.tar", sample("0", number, label=None if number else 5))
        write_tar(tmp_path / "beside" / f"{number}.tar", sample("0", number, label=5 if number else None))
        pq.write_table(pa.table({"label": pa.array([5 if number else None], pa.int32()), "score": [1]}),
                       tmp_path / "beside" / f"{number}.parquet")
    for name in ("plain", "beside"):
        dataset, manifest = sharded(tmp_path / f"root-{name}", tmp_path / name, kind="tars")
        schemas = [pq.read_schema(dataset.fetch("shards", file)) for record in manifest["items"]
                   for file in record["files"] if file["name"].endswith(".parquet")]
        assert schemas[0] == schemas[1] and schemas[0].field("label").type == pa.int64()


# Patches.

def test_patches_are_cut_where_they_say_and_always_the_same(tmp_path, site):
    rows = [{"url": f"http://{site}/{number:02d}.png", "caption": f"{number}"} for number in range(9)]
    rows.insert(4, {"url": f"http://{site}/absent.png", "caption": "absent"})
    options = {"patches": 3, "patch_side": 30, "image_size": 11}
    found = {}
    for name, size, listed in (("7", 7, rows), ("2", 2, rows), ("turned", 4, rows[::-1])):
        dataset, manifest = sharded(tmp_path / name, write_list(tmp_path / f"{name}.csv", listed),
                                    samples_per_shard=size, **options)
        samples = packed(dataset, manifest)
        assert len({one["__key__"] for one in samples}) == len(samples) == manifest["totals"]["samples"] == 27
        assert len(table(dataset, manifest)) == 28 and manifest["totals"]["skipped"] == {"http_404": 1}
        found[name] = [(one["json"]["url"], one["json"]["patch_left"], one["json"]["patch_top"], one["png"])
                       for one in samples]
    assert found["7"] == found["2"]
    assert sorted(found["turned"]) == sorted(found["7"])
    places = set()
    for url, left, top, data in found["7"]:
        whole = resize.resize(Image.open(io.BytesIO(PICTURES[url[-6:]])), 30, "keep_ratio")
        assert min(whole.size) == 30
        assert 0 <= left <= whole.width - 11 and 0 <= top <= whole.height - 11
        assert np.array_equal(resize.decode_pixels(data), np.asarray(whole.crop((left, top, left + 11, top + 11))))
        places.add((left, top))
    assert len(places) > 20
    dataset, manifest = sharded(tmp_path / "seed", tmp_path / "7.csv", seed=1, **options)
    assert [(one["json"]["patch_left"], one["json"]["patch_top"]) for one in packed(dataset, manifest)] != [
        (left, top) for _, left, top, _ in found["7"]]
    # Nothing is enlarged, and so there is no room.
    with pytest.raises(StageFailed, match="1 http_404, 9 too_small"):
        sharded(tmp_path / "small", tmp_path / "7.csv", patches=2, patch_side=30, image_size=22, only_if_bigger=True)
