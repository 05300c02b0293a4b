"""Long lists of items and of records as parquet: a million load in seconds, and take little memory.

Up to `INLINE` of them stand in plan.json and manifest.json themselves, for people to read. More stand in a
file beside it, and the document says which: {"count": n, "file": {"name", "bytes", "sha256"}}.
"""

import bisect
import contextlib
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.hardware.devices import HALVED
from pipeline.storage import DamagedFile

INLINE = 1000
_BATCH = 2048
_GROUP = 1 << 13  # rows of a parquet file that are packed and unpacked together
_COUNTS = pa.map_(pa.string(), pa.int64())
_FILES = pa.list_(pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())]))
RECORDS = pa.schema([("id", pa.string()), ("plan", pa.string()), ("samples", pa.int64()), ("files", _FILES),
                     ("skipped", _COUNTS), ("noted", _COUNTS), ("info", pa.string()), ("run", pa.string())])
ITEMS = pa.schema([("id", pa.string()), ("inputs", pa.string())])
_T = TypeVar("_T")


class Rows(Sequence[_T]):
    """The rows of a parquet file in memory: a group of them is unpacked when one is looked at."""

    def __init__(self, data: bytes, schema: pa.Schema, element: Callable[[dict[str, Any]], _T], url: str = "") -> None:
        self.data, self._schema, self._element, self.url = data, schema, element, url
        self._file = pq.ParquetFile(pa.BufferReader(data))
        rows = self._file.metadata
        self._ends = list(itertools.accumulate(rows.row_group(group).num_rows for group in range(rows.num_row_groups)))
        self._unpacked: tuple[int, pa.Table] | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.data, self._schema, self._element, self.url)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        group = bisect.bisect_right(self._ends, index)
        if self._unpacked is None or self._unpacked[0] != group:
            self._unpacked = group, self._group(group)
        first = self._ends[group - 1] if group else 0
        return self._unpack(self._unpacked[1].slice(index - first, 1))[0]

    def __iter__(self) -> Iterator[_T]:
        for group in self.tables():
            for batch in group.to_batches(max_chunksize=_BATCH):
                yield from self._unpack(batch)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def tables(self, *columns: str) -> Iterator[pa.Table]:
        """The groups one after the other; of these columns, or all."""
        for group in range(len(self._ends)):
            yield self._group(group, *columns)

    def _group(self, group: int, *columns: str) -> pa.Table:
        names = list(columns or self._schema.names)
        schema = pa.schema([self._schema.field(name) for name in names])
        with self._name_damage():
            group_table = self._file.read_row_group(group, names, use_threads=False).cast(schema)
            group_table.validate(full=True)  # text may be no UTF-8
            return group_table

    def _unpack(self, packed: pa.Table | pa.RecordBatch) -> list[_T]:
        with self._name_damage():
            return [self._element(row) for row in packed.to_pylist()]

    @contextlib.contextmanager
    def _name_damage(self) -> Iterator[None]:
        try:
            yield
        # Arrow's errors, JSON that is none, and cells that are empty or of another kind.
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedFile(f"{self.url or 'a list of records'} is damaged: {str(error).partition(chr(10))[0]}\n"
                              f"hint: python -m jobs verify") from error

    def ids(self) -> list[str]:
        """The ids alone, in order."""
        return [item_id for group in self.tables("id") for item_id in group.column("id").to_pylist()]


def records(data: bytes) -> Rows[dict[str, Any]]:
    """The records in the bytes of a parquet file of the schema `RECORDS`."""
    return Rows(data, RECORDS, _record)


def items(data: bytes, element: Callable[[str, dict[str, Any]], _T]) -> Rows[_T]:
    """The planned items in the bytes of a parquet file of the schema `ITEMS`, each made of its id and inputs."""
    return Rows(data, ITEMS, partial(_item, element))


def table(done: Iterable[dict[str, Any]]) -> pa.Table:
    """Records as a table of the schema `RECORDS`."""
    return pa.Table.from_pylist([record | {
        "skipped": list(record["skipped"].items()), "noted": list(record["noted"].items()),
        "info": json.dumps(record["info"]), "run": json.dumps(record["run"])} for record in done], RECORDS)


def _record(row: dict[str, Any]) -> dict[str, Any]:
    if wrong := [file["name"] for file in row["files"]
                 if not (storage.is_file_name(file["name"]) or storage.is_whole_address(file["name"]))]:
        raise ValueError(f"the file {wrong[0]!r} of record {row['id']!r} does not lie in the dataset\n"
                         f"hint: python -m jobs verify")
    return row | {"skipped": dict(row["skipped"]), "noted": dict(row["noted"]),
                  "info": json.loads(row["info"]), "run": json.loads(row["run"])}


def _item(element: Callable[[str, dict[str, Any]], _T], row: dict[str, Any]) -> _T:
    return element(row["id"], json.loads(row["inputs"]))


def to_bytes(tables: Iterable[pa.Table], schema: pa.Schema = RECORDS) -> bytes:
    """Tables, one after the other, as the bytes of a parquet file: the same however they are divided."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        pending = schema.empty_table()
        for part in tables:
            pending = pa.concat_tables([pending, part])
            while pending.num_rows >= _GROUP:
                writer.write_table(pending.slice(0, _GROUP).combine_chunks())
                pending = pending.slice(_GROUP)
        if pending.num_rows:
            writer.write_table(pending.combine_chunks())
    return buffer.getvalue()


def items_to_bytes(planned: Iterable[dict[str, Any]]) -> bytes:
    """Planned items as the bytes of a parquet file of the schema `ITEMS`; no more than a group of them is held."""
    rows = ({"id": item["id"], "inputs": json.dumps(item["inputs"])} for item in planned)
    return to_bytes((pa.Table.from_pylist(batch, ITEMS)
                     for batch in iter(lambda: list(itertools.islice(rows, _BATCH)), [])), ITEMS)


def reference(name: str, data: bytes, count: int) -> dict[str, Any]:
    """The entry of a document for a list that is in the file `name`."""
    return {"count": count, "file": {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def count(listed: Any) -> int:
    """How many elements the `items` of a plan or manifest have."""
    return int(listed["count"]) if isinstance(listed, dict) else len(listed)


def load(folder: str, listed: Any, unpack: Callable[[bytes], Rows[_T]]) -> Rows[_T]:
    """The list that a document in `folder` refers to; ValueError if it is not the one."""
    url = storage.file_below(folder, listed["file"]["name"])
    try:
        rows = unpack(Path(storage.fetch(url, listed["file"], check=True)).read_bytes())
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{url} is damaged: {error}\nhint: python -m jobs verify") from None
    rows.url = url
    if len(rows) != listed["count"]:
        raise DamagedFile(f"{url} is not the list that its document describes\nhint: python -m jobs verify")
    return rows


def content(fingerprint: str, described: Iterable[dict[str, Any]], done: Sequence[dict[str, Any]]) -> str:
    """Hash of what a sealed folder is and holds: its fingerprint, and every file's name and sha256."""
    digest = hashlib.sha256(f"{fingerprint}\n".encode())
    for file in described:
        digest.update(f"{file['name']} {file['sha256']}\n".encode())
    if isinstance(done, Rows):
        for group in done.tables("files"):
            for batch in group.to_batches():
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
        return _column_totals(done)
    result: dict[str, Any] = {"items": 0, "samples": 0, "bytes": 0, "skipped": Counter(), "noted": Counter()}
    for record in done:
        result["items"] += 1
        result["samples"] += record["samples"]
        result["bytes"] += sum(file["bytes"] for file in record["files"])
        result["skipped"].update(record["skipped"])
        result["noted"].update(record["noted"])
    return result | {name: _occurring(result[name]) for name in ("skipped", "noted")}


def _occurring(counts: Counter[str]) -> dict[str, int]:
    """The counts without zeros: a retry may have fixed all rows of a reason."""
    return {reason: count for reason, count in counts.items() if count}


def _column_totals(done: Rows[Any]) -> dict[str, Any]:
    sums = {name: Counter[str]() for name in ("skipped", "noted")}
    samples = length = 0
    for group in done.tables("samples", "files", *sums):
        samples += pc.sum(group.column("samples")).as_py() or 0
        for batch in group.to_batches():
            length += pc.sum(batch.column("files").flatten().field("bytes")).as_py() or 0
            for name, counter in sums.items():
                # The `keys` of a sliced map are those of the whole map, so flatten by the offsets.
                pairs = pc.list_flatten(batch.column(name).cast(pa.list_(pa.struct([("key", pa.string()),
                                                                                     ("value", pa.int64())]))))
                grouped = pa.table({"key": pairs.field("key"), "value": pairs.field("value")}).group_by(
                    "key", use_threads=False)
                for row in grouped.aggregate([("value", "sum")]).to_pylist():
                    counter[row["key"]] += row["value_sum"]
    return {"items": len(done), "samples": samples, "bytes": length,
            **{name: _occurring(counter) for name, counter in sums.items()}}


def seconds(done: Sequence[dict[str, Any]]) -> float:
    """Worker seconds of all records together."""
    if isinstance(done, Rows):
        matches = (pc.extract_regex(group.column("run"), r'"seconds": (?P<s>[0-9.e+-]+)').combine_chunks()
                 for group in done.tables("run"))
        return sum(pc.sum(match.field("s").cast(pa.float64())).as_py() or 0.0 for match in matches)
    return sum(record["run"]["seconds"] for record in done)


def halved(done: Sequence[dict[str, Any]]) -> int:
    """How many records say that a batch was halved after out of memory (`pipeline.devices.HALVED`)."""
    if isinstance(done, Rows):
        counts = (pc.sum(pc.match_substring(group.column("run"), f'"{HALVED}": ')) for group in done.tables("run"))
        return sum(count.as_py() or 0 for count in counts)
    return sum(HALVED in record["run"].get("times", {}) for record in done)


def devices(done: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many records were made on each device; records from before devices were noted are left out."""
    if isinstance(done, Rows):
        counts = Counter[str]()
        for group in done.tables("run"):
            matches = pc.extract_regex(group.column("run"), r'"device": "(?P<device>(?:[^"\\]|\\.)*)"')
            names = pc.value_counts(pc.struct_field(matches.combine_chunks(), "device").drop_null())
            counts.update({json.loads(f'"{row["values"]}"'): row["counts"] for row in names.to_pylist()})
    else:
        counts = Counter(record["run"]["device"] for record in done if record.get("run", {}).get("device"))
    return dict(counts.most_common())


def infos(done: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each `info` that occurs among records, and how often."""
    if isinstance(done, Rows):
        counts = Counter[str]()
        for group in done.tables("info"):
            counts.update({row["values"]: row["counts"] for row in pc.value_counts(group.column("info")).to_pylist()})
        for info, often in counts.items():
            yield json.loads(info), often
    else:
        for record in done:
            yield record["info"], 1


class Collected:
    """Records as they come in, packed as they grow many; `flushed` gets the bytes of each pack."""

    def __init__(self, flushed: Callable[[bytes], None] = lambda packed: None, every: int = 5000) -> None:
        self._flushed, self._every = flushed, every
        self._packs: list[Rows[dict[str, Any]]] = []
        self._loose: list[dict[str, Any]] = []
        self.ids: set[str] = set()

    def add(self, record: dict[str, Any]) -> None:
        """One more record."""
        self._loose.append(record)
        self.ids.add(record["id"])
        if len(self._loose) >= self._every:
            self._packs.append(records(to_bytes([table(self._loose)])))
            self._loose = []
            self._flushed(self._packs[-1].data)

    def add_pack(self, data: bytes) -> None:
        """Records of this plan that were packed before; those that are here already are passed over."""
        self._packs.append(records(data))
        self.ids.update(self._packs[-1].ids())

    def in_order(self, ids: Sequence[str]) -> Sequence[dict[str, Any]]:
        """The records of these items that are there, in the order of `ids`."""
        if not self._packs:
            by_id = {record["id"]: record for record in self._loose}
            return [by_id[item_id] for item_id in ids if item_id in by_id]
        return records(to_bytes(self._ordered(ids)))

    def _ordered(self, ids: Sequence[str]) -> Iterator[pa.Table]:
        """A group at a time: of the packs, which hold all, only those are unpacked that have some of it."""
        packs = [*self._packs, records(to_bytes([table(self._loose)]))]
        there = pa.concat_tables(group for pack in packs for group in pack.tables("id")).column("id")
        place = pc.index_in(pa.array(ids, pa.string()), there.combine_chunks())
        wanted = place.drop_null().to_numpy()
        firsts = np.cumsum([0, *map(len, packs)])
        for start in range(0, len(wanted), _GROUP):
            rows = wanted[start:start + _GROUP]
            pack_of_row = np.searchsorted(firsts, rows, side="right") - 1
            parts, order = [], []
            for pack in np.unique(pack_of_row):
                places = np.flatnonzero(pack_of_row == pack)
                parts.append(pa.concat_tables(packs[pack].tables()).take(pa.array(rows[places] - firsts[pack])))
                order.append(places)
            yield pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order))))
