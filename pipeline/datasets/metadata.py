"""Captions, hashes and other columns of a shard, one value for each sample."""

import hashlib
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.formats import parquet

NO_NUMBER = np.uint16(0x7C00)  # the exponent of NaN and infinity in float16
_HASH = re.compile("[0-9a-f]{64}")


def metadata(dataset: Dataset, record: dict[str, Any], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The parquet rows of one shard's samples, in the order of its tar; failed rows left out."""
    return _successful_rows(dataset, record, columns).to_pylist()


def _successful_rows(dataset: Dataset, record: dict[str, Any], columns: list[str] | None) -> pa.Table:
    data = dataset.fetch("shards", file_of(record, ".parquet")).read_bytes()
    table = parquet.read(data, columns=None if columns is None else [*columns, "status"])
    return table.filter(pc.equal(table["status"], "success"))


def labels(dataset: Dataset, record: dict[str, Any]) -> np.ndarray:
    """Two hashes of each image of a shard, (N_i, 2) uint64: of the stored bytes and of the fetched bytes.

    Patches of one image share the second. If the fetched bytes are unknown, the second equals the first.
    """
    columns = {"sha256", "original_sha256"} & set(_schema(dataset, record))
    table = _successful_rows(dataset, record, sorted(columns))
    stored = fetched = table["sha256"].to_pylist()
    if "original_sha256" in columns:  # empty or None if unknown
        originals = table["original_sha256"].to_pylist()
        fetched = [original or other for original, other in zip(originals, stored, strict=True)]
    return np.stack([_first_bytes(stored), _first_bytes(fetched)], 1)


def perceptual_hashes(dataset: Dataset, record: dict[str, Any]) -> np.ndarray:
    """The perceptual hashes of a shard, (N_i,) uint64; ValueError if it was packed without."""
    if "phash" not in _schema(dataset, record):
        raise ValueError(f"the shards of {dataset.label} have no perceptual hashes\n"
                         f"hint: shard it with --duplicates near, or do without --copy-bits")
    return np.array([row["phash"] or 0 for row in metadata(dataset, record, ["phash"])], np.uint64)


def _first_bytes(texts: list[str]) -> np.ndarray:
    """A number for each text, (N,) uint64: the first bytes of a sha256, or of the hash of another text."""
    if all(map(_HASH.fullmatch, texts)):
        return np.frombuffer(bytes.fromhex("".join(text[:16] for text in texts)), "<u8").astype(np.uint64)
    return np.array([int.from_bytes(bytes.fromhex(text[:16]) if _HASH.fullmatch(text)
                                    else hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
                     for text in texts], np.uint64)


def _schema(dataset: Dataset, record: dict[str, Any]) -> list[str]:
    return pq.read_schema(dataset.fetch("shards", file_of(record, ".parquet"))).names
