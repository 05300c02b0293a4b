"""A text that is too long for memory costs only itself, in every kind of source."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.media import tars
from pipeline.media.foreign_tars.samples import MOST_JSON_BYTES, MOST_SAMPLE_BYTES
from pipeline.tables.cells import MOST_LETTERS
from tests.laws.rows.row_accounting import PICTURES, shard_source
from tests.pipeline.shards.test_shard import ledger, table

pytestmark = pytest.mark.usefixtures("private_cache")

LONG = "T" * (MOST_LETTERS + 1)
NAMES = ("00.png", "01.png", "02.png")
CAPTIONS = ("first", LONG, "last")


def _make_source(kind: str, folder: Path) -> Path:
    if kind in {"tar", "tar with --caption-key"}:
        suffix = "txt" if kind == "tar" else "note"
        tars.write(folder / "in.tar", [{"__key__": name[:-4], "png": PICTURES[name], suffix: caption.encode()}
                                       for name, caption in zip(NAMES, CAPTIONS, strict=True)])
        return folder / "in.tar"
    if kind == "parquet":
        pq.write_table(pa.table({"image": [PICTURES[name] for name in NAMES], "caption": CAPTIONS, "note": CAPTIONS}),
                       folder / "in.parquet")
        return folder / "in.parquet"
    (folder / "in").mkdir()
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / "in" / name).write_bytes(PICTURES[name])
        if kind == "text files":
            (folder / "in" / name).with_suffix(".txt").write_text(caption)
    if kind == "metadata.jsonl":
        (folder / "in" / kind).write_text("".join(json.dumps({"file_name": name, "text": caption}) + "\n"
                                                  for name, caption in zip(NAMES, CAPTIONS, strict=True)))
    return folder / "in"


def _make_sparse(path: Path, length: int) -> None:
    with open(path, "wb") as file:
        file.truncate(length)


def test_huge_files_beside_images_are_not_read(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in NAMES:
        (source / name).write_bytes(PICTURES[name])
        _make_sparse((source / name).with_suffix(".txt"), 1 << 40)  # no memory holds it
    _make_sparse(source / "03.png", MOST_SAMPLE_BYTES + 1)
    _make_sparse(source / "00.json", MOST_JSON_BYTES + 1)
    dataset, manifest = shard_source(tmp_path / "root", source)
    assert [row["status"] for row in table(dataset, manifest)] == ["success"] * 3 + ["failed_to_download"]
    reasons = Counter((entry["key"], entry["reason"]) for entry in ledger(dataset, manifest))
    assert reasons == Counter({("03.png", "too_large"): 1, ("00.png", "json_unreadable"): 1,
                               **{(name, "cell_changed"): 1 for name in NAMES},
                               **{(name, "caption_missing"): 1 for name in ("01.png", "02.png", "03.png")}})


@pytest.mark.parametrize(("kind", "reasons"), [
    ("tar", {"too_large", "caption_missing"}), ("tar with --caption-key", {"cell_changed", "caption_missing"}),
    ("parquet", {"cell_changed"}), ("text files", {"cell_changed", "caption_missing"}),
    ("metadata.jsonl", {"cell_changed", "caption_missing"})])
def test_a_text_that_is_too_long_is_left_out_and_noted(kind: str, reasons: set[str], tmp_path: Path) -> None:
    options = {"caption_key": "note"} if "key" in kind else {}
    dataset, manifest = shard_source(tmp_path / "root", _make_source(kind, tmp_path), **options)
    rows = table(dataset, manifest)
    assert [row["status"] for row in rows] == ["success"] * 3
    assert [row["caption"] for row in rows] == ["first", "", "last"]
    entries = ledger(dataset, manifest)
    assert {entry["reason"] for entry in entries} == reasons
    if kind == "parquet":
        assert [row["note"] for row in rows] == ["first", None, "last"]
        assert {entry["detail"].split(":")[0] for entry in entries} == {"caption", "note"}
