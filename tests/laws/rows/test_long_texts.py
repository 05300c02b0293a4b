"""A text that is too long for memory costs only itself, in every kind of source."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.media import tars
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
