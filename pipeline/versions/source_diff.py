"""Changes of a source since a version: compare the rows of the source with the listing of the version."""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.rows.rows import TAKEDOWN, ReadReport, Row, hashable_cells, parse_row, redact_cells, row_line
from pipeline.shards.metadata import FORGOTTEN, MISSING, SUCCESS
from pipeline.shards.transform import old_source_name, source_name
from pipeline.sources.config import ShardConfig
from pipeline.sources.detect import open_source
from pipeline.sources.source import Source
from pipeline.stages.scratch import scratch_folder
from pipeline.takedowns.takedown_list import Forgotten
from pipeline.versions.listing import LISTING_SCHEMA, UNKNOWN_STAMP, groups, wide

_ROWS, _SOURCE = "rows.jsonl", "source.arrow"
# old_name and old_mark: as versions up to 0.1 stored a row, null where that is the same.
_SOURCE_SCHEMA = wide(pa.schema([(name, pa.string()) for name in ("name", "mark", "old_name", "old_mark", "stamp")]
                                + [("missing", pa.bool_()), ("offset", pa.int64())]))
_PIECE_ROWS = 1 << 14


@dataclass(frozen=True)
class Hashes:
    """The sha256 of files that were read again: (N,) int64 numbers of their rows, and (N,) text."""

    numbers: np.ndarray
    sha256: pa.Array

    @classmethod
    def none(cls) -> "Hashes":
        """The hashes of no file."""
        return cls(np.zeros(0, np.int64), pa.array([], pa.large_string()))


@dataclass(frozen=True)
class SourceDiff:
    """The rows of a source, and what they are beside those of the last version.

    The rows lie in files of a scratch folder, which the driver maps into memory. So the object is small, and a stage
    that holds it can be sent to workers. Only the driver can read the rows.
    """

    folder: str
    source: Source
    """To read files from; without the list of them."""
    types: dict[str, str]
    """Types of the columns of the source."""
    forgotten: Forgotten
    """Rows of these names are no rows of the source."""
    digest: str
    """A hash of what the source is seen to hold."""
    count: int
    """Rows of the source."""
    counts: Counter[str]
    """kept, added, changed, removed, forgotten: rows of the source; the last two: images of the last version.

    A row whose image was missing in the last version too is in none of them.
    """
    listing_file: str
    filtered_by: Counter[str]
    """Rows that `--licenses` filtered, by LICENSE and NO_LICENSE, and those that the takedown list names, TAKEDOWN."""

    @classmethod
    def read(cls, config: ShardConfig, forgotten: Forgotten, folder: str) -> "SourceDiff":
        """Read a source into an empty folder; every row counts as added."""
        source = open_source(config)
        if source.fetch == "none":
            raise ValueError(f"{', '.join(config.source)} holds its images itself, so its changes are unknown\n"
                             f"hint: rebuild takes a folder of images, or lists of URLs")
        with Path(folder, _ROWS).open("w+b") as lines:
            reading = ReadReport()
            table = _number_names(_read_source(source, forgotten, lines, reading), lines)
        _write_table(table, Path(folder, _SOURCE))
        # A copy of a source is what workers get: it does not have the list of all its files.
        diff = cls(folder, copy(source), source.column_types(), forgotten, _digest(table, forgotten), table.num_rows,
                   Counter(), "", reading.filtered_by)
        return diff.against(wide(LISTING_SCHEMA).empty_table(), Hashes.none())

    def rows(self, numbers: np.ndarray) -> Iterator[Row]:
        """The rows of these numbers."""
        offsets = self._table(_SOURCE)["offset"].take(pa.array(numbers, pa.int64())).to_numpy()
        with Path(self.folder, _ROWS).open("rb") as lines:
            for offset in offsets.tolist():
                yield _row_at(lines, offset)

    def suspects(self, before: pa.Table) -> np.ndarray:
        """Numbers of the rows that have another look than in the last version, and nothing else new."""
        source = self._table(_SOURCE)
        old = _matches(source, before, ["stamp", "sha256"])
        return np.flatnonzero(_bools(pc.not_equal(source["stamp"], old["stamp"]))
                              & ~_texts_differ(source["stamp"], old["stamp"])
                              & _bools(pc.not_equal(old["sha256"], "")))

    def against(self, before: pa.Table, hashes: Hashes) -> "SourceDiff":
        """The same source beside the listing of a version; `hashes` are those of the files that were read again."""
        source = self._table(_SOURCE)
        old = _matches(source, before, ["stamp", "sha256", "shard", "row", "status"])
        # No hash is known of an image that could not be read then: its look alone tells.
        same = _bools(pc.equal(source["stamp"], old["stamp"]))
        then = old["sha256"].take(pa.array(hashes.numbers, pa.int64()))
        known = _bools(pc.not_equal(then, ""))
        same[hashes.numbers[known]] = _bools(pc.equal(then, hashes.sha256))[known]
        if self.source.fetch == "url":  # a server that failed may answer now
            same &= _bools(pc.equal(old["status"], SUCCESS))
        was_forgotten = _bools(pc.equal(old["status"], FORGOTTEN))
        refused = pa.array(sorted(self.forgotten.sha256), pa.large_string())
        left_out = same & (was_forgotten | _bools(pc.is_in(old["sha256"], value_set=refused)))
        kept = same & ~left_out
        images = before["name"].filter(pc.not_equal(before["status"], MISSING))
        counts = _count_by_name(source["name"], _redact_names(images), same, _bools(source["missing"]), self.forgotten)
        if kept_images := int((kept & ~_bools(pc.equal(old["status"], MISSING))).sum()):
            counts["kept"] = kept_images
        if left_out.any():  # those that were left out before were counted then
            counts["forgotten"] += int((left_out & ~was_forgotten).sum())
        listing = pa.table({
            "name": source["name"], "mark": source["mark"], "stamp": source["stamp"],
            "sha256": _choose(same, old["sha256"], ""), "shard": _choose(kept, old["shard"], ""),
            "row": _choose(kept, old["row"], -1),
            "status": _choose(~left_out, _choose(kept, old["status"], ""), FORGOTTEN), "fresh": pa.array(~same)})
        name = f"listing-{uuid.uuid4().hex}.arrow"
        _write_table(listing, Path(self.folder, name))
        return replace(self, counts=counts, listing_file=name)

    def listing(self) -> pa.Table:
        """The listing of the next version, wide; `fresh` tells rows that have no shard yet."""
        return self._table(self.listing_file)

    def fresh_numbers(self) -> np.ndarray:
        """Numbers of the rows that are new or changed, ascending."""
        return np.flatnonzero(_bools(self.listing()["fresh"]))

    def live_rows(self, *, failed: bool = False) -> dict[str, np.ndarray]:
        """For each shard of the last version the rows that became samples and stay, ascending; empty ones left out.

        `failed`: instead the rows that gave no sample and stay.
        """
        listing = self.listing().select(["shard", "row", "status", "fresh"])
        is_chosen = (pc.not_equal if failed else pc.equal)(listing["status"], SUCCESS)
        listing = listing.filter(pc.and_(pc.invert(listing["fresh"]), pc.and_(
            is_chosen, pc.not_equal(listing["shard"], ""))))
        shards = pc.unique(listing["shard"])
        codes, rows = pc.index_in(listing["shard"], value_set=shards).to_numpy(), listing["row"].to_numpy()
        order = np.lexsort((rows, codes))
        bounds = np.searchsorted(codes[order], np.arange(1, len(shards)))
        return dict(zip(shards.to_pylist(), np.split(rows[order], bounds), strict=True)) if len(shards) else {}

    def _table(self, name: str) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(Path(self.folder, name)))).read_all()


def _read_source(source: Source, forgotten: Forgotten, lines: BinaryIO, reading: ReadReport) -> pa.Table:
    """The columns of all rows of a source; each row goes to `lines`. A mark is that of the first row of its name."""
    stamps = _list_stamps(source.base) if source.fetch == "file" else {}  # type: ignore[attr-defined]
    tables, number = [_SOURCE_SCHEMA.empty_table()], 0
    for rows in groups(_source_rows(source, reading), _PIECE_ROWS):
        cells: list[tuple[str, str, str | None, str | None, str, bool, int]] = []
        for row in rows:
            name = source_name(row)
            if forgotten.has_name(name):
                reading.filtered_by[TAKEDOWN] += 1
                continue
            row.number, number = number, number + 1
            files = filter(None, (row.name, row.caption_file, *row.more_files))
            stamp = ":".join(stamps.get(file, "") for file in files)
            old_name = old_source_name(row)
            is_same = old_name == name and redact_cells(row.columns) == row.columns
            cells.append((name, _mark(row, 0), old_name if old_name != name else None,
                          None if is_same else _old_mark(row, 0), stamp,
                          bool(row.missing) and not row.reason, lines.tell()))
            lines.write(row_line(row).encode() + b"\n")
        if cells:
            tables.append(pa.table([pa.array(column, field.type) for column, field in
                                    zip(zip(*cells, strict=True), _SOURCE_SCHEMA, strict=True)], _SOURCE_SCHEMA))
    return pa.concat_tables(tables)


def _list_stamps(folder: str) -> dict[str, str]:
    try:
        return storage.list_stamps(folder)
    except FileNotFoundError:
        raise ValueError(f"there is no folder {folder}") from None


def _texts_differ(stamps: pa.ChunkedArray, before: pa.ChunkedArray) -> np.ndarray:
    """Whether files beside the image look other than they did, whose words no hash of a version tells; (N,) bool."""
    texts, old_texts = (pc.replace_substring_regex(each, "^[^:]*", "") for each in (stamps, before))
    return _bools(pc.not_equal(texts, old_texts)) & _bools(pc.not_equal(before, UNKNOWN_STAMP))


def _source_rows(source: Source, reading: ReadReport) -> Iterator[Row]:
    with scratch_folder("source") as scratch:
        folder = str(scratch)
        for part in source.parts():
            for name, data in part.carries:
                storage.put_bytes(data, storage.join(folder, name))
            yield from source.allowed_rows(folder, part.inputs, Path(folder), reading)


def _mark(row: Row, position: int) -> str:
    """A hash of what the source says of a row; `position` is its place among the rows of its name."""
    cells = hashable_cells(redact_cells(row.columns))
    return storage.digest([source_name(row), row.caption, cells, row.digest, row.caption_file,
                           *row.more_files, position])


def _old_mark(row: Row, position: int) -> str:
    """The mark that versions up to 0.1 gave a row."""
    cells = hashable_cells(row.columns)
    return storage.digest([old_source_name(row), row.caption, cells, row.digest, row.caption_file, position])


def _number_names(table: pa.Table, lines: BinaryIO) -> pa.Table:
    """The table with other marks for rows whose name came before."""
    positions = _positions(table["name"])
    table = _replace_marks(table, "mark", positions, positions > 0, lines, _mark)
    old_positions = positions
    if table["old_name"].null_count < table.num_rows:
        old_positions = _positions(pc.coalesce(table["old_name"], table["name"]))
    differ = _bools(pc.is_valid(table["old_mark"])) | (old_positions != positions)
    return _replace_marks(table, "old_mark", old_positions, differ & ((old_positions > 0) | (positions > 0)), lines,
                          _old_mark)


def _positions(names: pa.ChunkedArray) -> np.ndarray:
    """The place of each row among the rows of its name, (N,) int64."""
    codes = pc.index_in(names, value_set=pc.unique(names)).to_numpy()
    order = np.argsort(codes, kind="stable")
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order)) - np.searchsorted(codes[order], codes[order])
    return positions


def _replace_marks(table: pa.Table, column: str, positions: np.ndarray, chosen: np.ndarray, lines: BinaryIO,
                   mark: Callable[[Row, int], str]) -> pa.Table:
    """The table with marks for the positions of the chosen rows, which are read again."""
    if not chosen.any():
        return table
    marks = [mark(_row_at(lines, offset), position) for offset, position in
             zip(table["offset"].to_numpy()[chosen].tolist(), positions[chosen].tolist(), strict=True)]
    replaced = pc.replace_with_mask(table[column].combine_chunks(), pa.array(chosen),
                                    pa.array(marks, pa.large_string()))
    return table.set_column(table.column_names.index(column), column, replaced)


def _row_at(lines: BinaryIO, offset: int) -> Row:
    lines.seek(offset)
    return parse_row(lines.readline())


def _digest(table: pa.Table, forgotten: Forgotten) -> str:
    digest = hashlib.sha256(forgotten.digest.encode())
    for batch in table.select(["mark", "stamp"]).to_batches(_PIECE_ROWS):
        for mark, stamp in zip(batch["mark"].to_pylist(), batch["stamp"].to_pylist(), strict=True):
            digest.update(b"\n" + json.dumps([mark, stamp]).encode())
    return digest.hexdigest()


def _write_table(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _matches(source: pa.Table, before: pa.Table, columns: list[str]) -> pa.Table:
    """For each row of a source the row of a listing that has its mark, null where none has; the last one counts."""
    backwards = before["mark"].take(pa.array(np.arange(before.num_rows)[::-1]))
    positions = pc.index_in(source["mark"], value_set=backwards)
    if source["old_mark"].null_count < source.num_rows:
        positions = pc.coalesce(positions, pc.index_in(source["old_mark"], value_set=backwards))
    rows = pc.subtract(pa.scalar(before.num_rows - 1, pa.int64()), positions.cast(pa.int64()))
    return before.select(columns).take(rows)


def _redact_names(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names of a listing as this version would store them."""
    suspects = _bools(pc.match_substring_regex(names, "[?#@;]"))
    if not suspects.any():
        return names
    redacted = [storage.redact_url(name) for name in names.filter(pa.array(suspects)).to_pylist()]
    return pa.chunked_array([pc.replace_with_mask(names.combine_chunks(), pa.array(suspects),
                                                  pa.array(redacted, pa.large_string()))])


def _count_by_name(names: pa.ChunkedArray, before: pa.ChunkedArray, same: np.ndarray,
                   missing: np.ndarray, forgotten: Forgotten) -> Counter[str]:
    """How many rows are changed and added, and how many of the last version are removed and forgotten.

    A row that is not the same is a changed one while the last version has rows of its name that no row of the source
    stands for. If its file is `missing`, it is a removed one. Rows of one name are numbered in their marks, so the
    order of rows is of no matter.
    """
    every = pc.unique(pa.chunked_array([*before.chunks, *names.chunks], pa.large_string()))
    codes = pc.index_in(names, value_set=every).to_numpy()
    there, stay, fresh, gone = (np.bincount(group, minlength=len(every)) for group in (
        pc.index_in(before, value_set=every).to_numpy(), codes[same], codes[~same & ~missing], codes[~same & missing]))
    vacant = np.maximum(there - stay, 0)
    changed = np.minimum(vacant, fresh)
    removed = vacant - changed
    counts: Counter[str] = Counter()
    added = fresh - changed + np.maximum(gone - removed, 0)
    for name, count in (("changed", changed.sum()), ("added", added.sum())):
        if count:
            counts[name] = int(count)
    if len(names):
        counts["removed"] = 0
    positions = np.flatnonzero(removed)
    for start in range(0, len(positions), _PIECE_ROWS):
        piece = positions[start:start + _PIECE_ROWS]
        for name, count in zip(every.take(pa.array(piece)).to_pylist(), removed[piece].tolist(), strict=True):
            counts["forgotten" if forgotten.has_name(name) else "removed"] += count
    return counts


def _bools(values: pa.ChunkedArray) -> np.ndarray:
    """A column of truth values, (N,) bool; null is false."""
    return pc.fill_null(values, False).to_numpy().copy()


def _choose(condition: np.ndarray, values: pa.ChunkedArray, other: str | int) -> pa.ChunkedArray:
    """`values` where the condition holds, else the other."""
    return pc.if_else(pa.array(condition), values, pa.scalar(other, values.type))
