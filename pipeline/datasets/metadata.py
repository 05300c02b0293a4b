"""Captions, hashes and other columns of a shard, one value for each sample."""

import hashlib
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.storage import parquet

NO_NUMBER = np.uint16(0x7C00)  # the exponent of NaN and infinity in float16
_HASH = re.compile("[0-9a-f]{64}")


def metadata(dataset: Dataset, record: dict[str, Any], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The parquet rows of one shard's samples, in the order of its tar; failed rows left out."""
    return _succeeded(dataset, record, columns).to_pylist()


def _succeeded(dataset: Dataset, record: dict[str, Any], columns: list[str] | None) -> pa.Table:
    data = dataset.fetch("shards", file_of(record, ".parquet")).read_bytes()
    table = parquet.read(data, columns=None if columns is None else [*columns, "status"])
    return table.filter(pc.equal(table["status"], "success"))


def labels(dataset: Dataset, record: dict[str, Any]) -> np.ndarray:
    """What tells the pictures of a shard from others, (N_i, 2) uint64: of the bytes stored, of the bytes fetched.

    Patches of one picture have the second in common. Where it is not known what was fetched, it is the first.
    """
    columns = {"sha256", "original_sha256"} & set(_schema(dataset, record))
    table = _succeeded(dataset, record, sorted(columns))
    stored = fetched = table["sha256"].to_pylist()
    if "original_sha256" in columns:  # empty or none where it is not known
        fetched = [one or other for one, other in zip(table["original_sha256"].to_pylist(), stored, strict=True)]
    return np.stack([_labels(stored), _labels(fetched)], 1)


def perceptual_hashes(dataset: Dataset, record: dict[str, Any]) -> np.ndarray:
    """The perceptual hashes of a shard, (N_i,) uint64; ValueError if it was packed without."""
    if "phash" not in _schema(dataset, record):
        raise ValueError(f"the shards of {dataset.label} have no perceptual hashes\n"
                         f"hint: shard it with --duplicates near, or do without --copy-bits")
    return np.array([row["phash"] or 0 for row in metadata(dataset, record, ["phash"])], np.uint64)


def _labels(texts: list[str]) -> np.ndarray:
    """A number for each text, (N,) uint64: the first bytes of a hash, or of the hash of what is none."""
    if all(map(_HASH.fullmatch, texts)):
        return np.frombuffer(bytes.fromhex("".join(text[:16] for text in texts)), "<u8").astype(np.uint64)
    return np.array([int.from_bytes(bytes.fromhex(text[:16]) if _HASH.fullmatch(text)
                                    else hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
                     for text in texts], np.uint64)


def _schema(dataset: Dataset, record: dict[str, Any]) -> list[str]:
    return pq.read_schema(dataset.fetch("shards", file_of(record, ".parquet"))).names
