"""Long lists of items and of records as parquet: a million load in seconds, and take little memory.

Up to `INLINE` of them stand in plan.json and manifest.json themselves, for people to read. More stand in a
file beside it, and the document says which: {"count": n, "file": {"name", "bytes", "sha256"}}.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage

INLINE = 1000
_BATCH = 2048
_GROUP = 1 << 17  # rows of a parquet file that are put together at a time
_COUNTS = pa.map_(pa.string(), pa.int64())
_FILES = pa.list_(pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())]))
RECORDS = pa.schema([("id", pa.string()), ("plan", pa.string()), ("samples", pa.int64()), ("files", _FILES),
                     ("skipped", _COUNTS), ("noted", _COUNTS), ("info", pa.string()), ("run", pa.string())])
ITEMS = pa.schema([("id", pa.string()), ("inputs", pa.string())])
_T = TypeVar("_T")


class Rows(Sequence[_T]):
    """A table of one row per element; elements are made when they are looked at."""

    def __init__(self, table: pa.Table, element: Callable[[dict[str, Any]], _T]) -> None:
        self.table, self._element = table, element

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._element(self.table.slice(index % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[_T]:
        for batch in self.table.to_batches(max_chunksize=_BATCH):
            yield from map(self._element, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def ids(self) -> list[str]:
        """The ids alone, in order."""
        return self.table.column("id").to_pylist()


def records(table: pa.Table) -> Rows[dict[str, Any]]:
    """The records in a table of the schema `RECORDS`."""
    return Rows(table, _record)


def table(done: Iterable[dict[str, Any]]) -> pa.Table:
    """Records as a table of the schema `RECORDS`."""
    return pa.Table.from_pylist([record | {
        "skipped": list(record["skipped"].items()), "noted": list(record["noted"].items()),
        "info": json.dumps(record["info"]), "run": json.dumps(record["run"])} for record in done], RECORDS)


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"skipped": dict(row["skipped"]), "noted": dict(row["noted"]),
                  "info": json.loads(row["info"]), "run": json.loads(row["run"])}


def to_bytes(table_: pa.Table) -> bytes:
    """A table as the bytes of a parquet file, the same however it is divided in memory."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table_.schema, compression="zstd") as writer:
        for first in range(0, max(1, table_.num_rows), _GROUP):
            writer.write_table(table_.slice(first, _GROUP).combine_chunks())
    return buffer.getvalue()


def from_bytes(data: bytes) -> pa.Table:
    """The records in the bytes of a parquet file that `to_bytes` wrote."""
    return pq.read_table(pa.BufferReader(data), schema=RECORDS)


def items_table(items: Iterable[dict[str, Any]]) -> pa.Table:
    """Planned items as a table of the schema `ITEMS`."""
    return pa.Table.from_pylist([one | {"inputs": json.dumps(one["inputs"])} for one in items], ITEMS)


def items_to_bytes(tables: Sequence[pa.Table]) -> tuple[bytes, int]:
    """Tables of planned items as the bytes of a parquet file, and how many they are."""
    whole = pa.concat_tables(tables)
    return to_bytes(whole), whole.num_rows


def reference(name: str, data: bytes, count: int) -> dict[str, Any]:
    """What stands in a document in place of a list that is kept in the file `name`."""
    return {"count": count, "file": {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def count(listed: Any) -> int:
    """How many elements the `items` of a plan or manifest have."""
    return int(listed["count"]) if isinstance(listed, dict) else len(listed)


def load(folder: str, listed: Any, schema: pa.Schema) -> pa.Table:
    """The table that a document in `folder` refers to; ValueError if it is not the one."""
    url = storage.join(folder, listed["file"]["name"])
    path = storage.fetch(url, listed["file"], check=True)
    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url} is damaged: {error}\nhint: python -m jobs verify") from None
    if found.schema.names != schema.names or found.num_rows != listed["count"]:
        raise ValueError(f"{url} is not the list that its document describes\nhint: python -m jobs verify")
    return found.cast(schema)


def content(fingerprint: str, described: Iterable[dict[str, Any]], done: Sequence[dict[str, Any]]) -> str:
    """Hash of what a sealed folder is and holds: its fingerprint, and every file's name and sha256."""
    digest = hashlib.sha256(f"{fingerprint}\n".encode())
    for file in described:
        digest.update(f"{file['name']} {file['sha256']}\n".encode())
    if isinstance(done, Rows):
        for batch in done.table.select(["files"]).to_batches(max_chunksize=_BATCH):  # a million lines are much memory
            files = batch.column("files").flatten()
            lines = pc.binary_join_element_wise(files.field("name"), files.field("sha256"), " ")
            digest.update("".join(f"{line}\n" for line in lines.to_pylist()).encode())
    else:
        for record in done:
            for file in record["files"]:
                digest.update(f"{file['name']} {file['sha256']}\n".encode())
    return digest.hexdigest()


def totals(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items, samples, bytes, and counts by reason over records."""
    if isinstance(done, Rows):
        return _column_totals(done.table)
    result: dict[str, Any] = {"items": 0, "samples": 0, "bytes": 0, "skipped": Counter(), "noted": Counter()}
    for record in done:
        result["items"] += 1
        result["samples"] += record["samples"]
        result["bytes"] += sum(file["bytes"] for file in record["files"])
        result["skipped"].update(record["skipped"])
        result["noted"].update(record["noted"])
    return result | {name: _occurring(result[name]) for name in ("skipped", "noted")}


def _occurring(counts: Counter[str]) -> dict[str, int]:
    """Without what another try has mended to the last one."""
    return {reason: count for reason, count in counts.items() if count}


def _column_totals(of: pa.Table) -> dict[str, Any]:
    sums = {name: Counter[str]() for name in ("skipped", "noted")}
    length = 0
    for batch in of.to_batches():
        length += pc.sum(batch.column("files").flatten().field("bytes")).as_py() or 0
        for name, counter in sums.items():
            # Of a map that has been sliced, `keys` are those of the whole: flatten by the offsets instead.
            pairs = pc.list_flatten(batch.column(name).cast(pa.list_(pa.struct([("key", pa.string()),
                                                                                 ("value", pa.int64())]))))
            grouped = pa.table({"key": pairs.field("key"), "value": pairs.field("value")}).group_by("key")
            for row in grouped.aggregate([("value", "sum")]).to_pylist():
                counter[row["key"]] += row["value_sum"]
    return {"items": of.num_rows, "samples": pc.sum(of.column("samples")).as_py() or 0, "bytes": length,
            **{name: _occurring(counter) for name, counter in sums.items()}}


def seconds(done: Sequence[dict[str, Any]]) -> float:
    """Worker seconds of all records together."""
    if isinstance(done, Rows):
        return pc.sum(pc.extract_regex(done.table.column("run"), r'"seconds": (?P<s>[0-9.e+-]+)')
                      .combine_chunks().field("s").cast(pa.float64())).as_py() or 0.0
    return sum(record["run"]["seconds"] for record in done)


def infos(done: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each `info` that occurs among records, and how often."""
    if isinstance(done, Rows):
        for one in pc.value_counts(done.table.column("info")).to_pylist():
            yield json.loads(one["values"]), one["counts"]
    else:
        for record in done:
            yield record["info"], 1


class Collected:
    """Records as they come in, packed as they grow many; `flushed` gets each table that is packed."""

    def __init__(self, flushed: Callable[[pa.Table], None] = lambda packed: None, every: int = 5000) -> None:
        self._flushed, self._every = flushed, every
        self._tables: list[pa.Table] = []
        self._loose: list[dict[str, Any]] = []
        self.ids: set[str] = set()

    def add(self, record: dict[str, Any]) -> None:
        """One more record."""
        self._loose.append(record)
        self.ids.add(record["id"])
        if len(self._loose) >= self._every:
            self._tables.append(table(self._loose))
            self._loose = []
            self._flushed(self._tables[-1])

    def add_table(self, packed: pa.Table) -> None:
        """Records of this plan that were packed before; those that are here already are passed over."""
        new = [one not in self.ids for one in packed.column("id").to_pylist()]
        packed = packed.filter(pa.array(new))
        self._tables.append(packed)
        self.ids.update(packed.column("id").to_pylist())

    def in_order(self, ids: Sequence[str]) -> Sequence[dict[str, Any]]:
        """The records of these items that are there, in the order of `ids`."""
        if not self._tables:
            by_id = {record["id"]: record for record in self._loose}
            return [by_id[one] for one in ids if one in by_id]
        whole = pa.concat_tables([*self._tables, table(self._loose)])
        place = pc.index_in(pa.array(ids, pa.string()), whole.column("id").combine_chunks())
        wanted = place.filter(place.is_valid())
        if wanted.equals(pa.array(np.arange(whole.num_rows, dtype=np.int32))):
            return records(whole)
        return records(whole.take(wanted))
