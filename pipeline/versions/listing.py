"""The listing of a version: a table with one row for each row of its source.

name mark stamp    name of the row, hash of its cells in the source, size and time of its files: the image, then texts
sha256             hash of the fetched bytes
shard row status   item of the shard stage, row of the source at that time, status in the metadata
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.formats import parquet
from pipeline.rows.rows import NOT_IN_FOLDER, hashable_cells
from pipeline.shards import metadata

LISTING, DEAD = "listing.parquet", "dead.txt"
LISTING_SCHEMA = pa.schema([(name, pa.string()) for name in ("name", "mark", "stamp", "sha256", "shard")]
                     + [("row", pa.int64()), ("status", pa.string())])
UNKNOWN_STAMP = "?"
_READERS = 16  # threads that read metadata
_SHARDS_AT_ONCE = 64
_PIECE_ROWS = 1 << 16
_ROW_GROUP_ROWS = 1 << 20  # of a listing on disk; another number gives other bytes
_T = TypeVar("_T")
_R = TypeVar("_R")


def read_listing(version: Dataset, columns: Sequence[str] = tuple(LISTING_SCHEMA.names), *,
                 piece_rows: int = _PIECE_ROWS, readers: int = _READERS) -> pa.Table:
    """The listing of a version, as wide text; of a version that `shard` made, as far as its metadata tell."""
    manifest = version.manifest("shards")
    schema = wide(pa.schema([LISTING_SCHEMA.field(name) for name in columns]))
    for entry in manifest["files"]:
        if entry["name"] == LISTING:
            path = version.fetch("shards", entry)
            return pa.Table.from_batches(list(_pieces(path, schema, piece_rows)), schema)
    tables = map_in_order(lambda record: _listing_of(version, record).select(list(columns)).cast(schema),
                          manifest["items"], readers)
    return pa.concat_tables([schema.empty_table(), *tables])


def wide(schema: pa.Schema) -> pa.Schema:
    """The same columns, with text that may be longer than 2 GB in one array."""
    return pa.schema([field.with_type(pa.large_string()) if field.type == pa.string() else field for field in schema])


def write_listing(listing: pa.Table, path: Path) -> None:
    """Write a listing as one parquet file; equal listings, equal bytes."""
    with pq.ParquetWriter(path, LISTING_SCHEMA) as writer:
        for start in range(0, max(listing.num_rows, 1), _ROW_GROUP_ROWS):
            rows = listing.select(LISTING_SCHEMA.names).slice(start, _ROW_GROUP_ROWS).combine_chunks()
            writer.write_table(rows.cast(LISTING_SCHEMA), row_group_size=_ROW_GROUP_ROWS)


def _pieces(path: Path, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    # Mapped, and in this thread: see `pipeline.formats.parquet.read` on Arrow's own threads.
    with pa.memory_map(str(path)) as file:
        for batch in pq.ParquetFile(file).iter_batches(rows, columns=schema.names, use_threads=False):
            yield batch.select(schema.names).cast(schema)


def _listing_of(version: Dataset, record: dict[str, Any]) -> pa.Table:
    """The part of a listing that the metadata of one shard tell."""
    table = read_metadata(version, record)
    first, telling = rows_of_source(table)
    others = [name for name in table.column_names if name not in metadata.COLUMNS | metadata.IMAGE_COLUMNS]
    # Without the number among rows of one name, and what a list says of hashes: rows with those are new.
    marks = [storage.digest([row["url"], row["caption"] or "", hashable_cells({name: row[name] for name in others}),
                             "", "", 0])
             for row in table.select(["url", "caption", *others]).take(first).to_pylist()]
    about = table.select(["original_sha256", "source_row", "status", "error_message"]).take(telling)
    count = len(first)
    return pa.table([table["url"].take(first), pa.array(marks, pa.string()),
                     pa.array([UNKNOWN_STAMP] * count, pa.string()), pc.fill_null(about["original_sha256"], ""),
                     pa.array([record["id"]] * count, pa.string()), about["source_row"], row_statuses(about)],
                    schema=LISTING_SCHEMA)


def row_statuses(table: pa.Table) -> pa.ChunkedArray:
    """The statuses of rows in a listing, from their `status` and `error_message` in the metadata."""
    messages = pc.fill_null(table["error_message"], "")
    return pc.if_else(pc.ends_with(messages, f": {NOT_IN_FOLDER}"), metadata.MISSING, table["status"])


def rows_of_source(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """For each row of the source that metadata are about: its first row in the table, and the row that counts.

    Both in the order of the first rows. The first success counts, else the last failure.
    """
    numbers, order = table["source_row"].to_numpy(), np.arange(table.num_rows)
    succeeded = pc.equal(table["status"], metadata.SUCCESS).to_numpy()
    rank = np.where(succeeded, 2 * len(order) - order, order)
    by_row = np.lexsort((rank, numbers))
    last = np.append(np.diff(numbers[by_row]) != 0, True)[:len(order)]
    first = np.unique(numbers, return_index=True)[1]  # as `last`, in the order of the numbers
    appearance = np.argsort(first)
    return first[appearance], by_row[last][appearance]


def read_metadata(dataset: Dataset, record: dict[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of the metadata of a shard, those that it has; by default all."""
    data = dataset.fetch("shards", file_of(record, ".parquet")).read_bytes()
    if columns is not None:
        there = pq.read_schema(pa.BufferReader(data)).names
        return parquet.read(data, [name for name in columns if name in there])
    return parquet.read(data)


def succeeded_rows(table: pa.Table) -> pa.Table:
    """The rows of metadata that are samples."""
    return table.filter(pc.equal(table["status"], metadata.SUCCESS))


def reference(base: Dataset, stage_name: str, dataset: Dataset, entry: dict[str, Any]) -> dict[str, Any]:
    """A file of another version as one of this: its name leads there from the stage folder."""
    full = storage.manifest_file_url(base.folder(stage_name), entry["name"])
    versions = storage.join(dataset.root, "datasets", dataset.name) + "/"
    return entry | {"name": f"../../{full.removeprefix(versions)}" if full.startswith(versions) else full}


def groups(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """`size` of them at a time."""
    rest = iter(values)
    while group := list(islice(rest, size)):
        yield group


def map_in_order(function: Callable[[_T], _R], values: Iterable[_T], readers: int = _READERS) -> Iterator[_R]:
    """The results of a function in the order of its values, computed by threads a few dozen ahead."""
    with ThreadPoolExecutor(readers) as pool:
        for group in groups(values, _SHARDS_AT_ONCE):
            yield from pool.map(function, group)
