"""The base class of sources, and the files that an address stands for."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import storage
from pipeline.media.sample_names import system_folder
from pipeline.rows import img2dataset
from pipeline.rows.rows import BAD_ROW, LICENSE, NO_LICENSE, Part, ReadReport, Row, read_rows, write_rows
from pipeline.sources.patterns import is_pattern, match_pattern
from pipeline.tables.names import LOOSE_TABLES, TABLES

if TYPE_CHECKING:
    from pipeline.rows.row_filter import RowFilter
    from pipeline.sources.config import ShardConfig

_log = logging.getLogger(__name__)
LISTS = TABLES
PACKED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
TARS = (".tar", *PACKED_TARS)


class Source(ABC):
    """A corpus to shard."""

    fetch: Literal["file", "url", "none"]
    """How the bytes of a row's image are obtained; none: they are in the row."""
    kind: Literal["pictures", "list", "tars", ""] = ""
    """The kind of its files, a value of `--kind`. Empty: another source."""
    addresses: list[str]
    """The files that are lists or tars."""
    ignored: Counter[str]
    """Files beside those of the source that are of no use, by suffix or by folder."""
    earlier_failures: int
    """Rows whose image was not to be had when another program looked for it, and which are no rows of this source."""

    def __init__(self, config: ShardConfig) -> None:
        self.config = config
        self.addresses = []
        self.ignored = Counter()
        self.earlier_failures = 0

    def summary(self) -> dict[str, Any]:
        """The kind of the source, the number of its files, and counts of everything that gives no row."""
        return {"kind": self.kind, "files": self.count_files(), **self._rows_of_tars, **self.left_out()}

    @cached_property
    def _rows_of_tars(self) -> dict[str, int]:
        """The rows of tars, if each has a table of img2dataset beside it. Without these they must be read to know."""
        tables = [f"{address[:-4]}.parquet" for address in self.addresses if address.lower().endswith(".tar")]
        if self.kind != "tars" or len(tables) < len(self.addresses):
            return {}
        counts = storage.map_urls(img2dataset.count_rows, tables)
        known = [count for count in counts if count]
        if len(known) < len(counts):
            return {}
        good, failed = map(sum, zip(*known, strict=True))
        return {"rows": good, "earlier_failures": failed} if failed else {"rows": good}

    def left_out(self) -> dict[str, Any]:
        """Counts of files of no use, and of rows whose image another program could not get."""
        earlier_failures = self.earlier_failures or self._rows_of_tars.get("earlier_failures", 0)
        return {name: value for name, value in (("ignored_files", dict(self.ignored.most_common())),
                                                ("earlier_failures", earlier_failures)) if value}

    def count_files(self) -> int:
        """How many files of the kind the source has."""
        return len(self.addresses)

    @abstractmethod
    def identity(self) -> str:
        """A hash that stands for what the source holds, wherever it lies."""

    def column_types(self) -> dict[str, str]:
        """Types of the columns of the source, so that all shards have the same. Cells decide the other types."""
        return {}

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """The source in parts, in order."""

    @abstractmethod
    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        """The rows of a part, in order."""

    def columns_of(self, row: Row) -> Mapping[str, Any]:
        """The columns of a row, as the worker stores them."""
        return row.columns

    def allowed_rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: ReadReport,
                     ) -> Iterator[Row]:
        """The rows of a part whose license is allowed, and those that cannot be read, in order."""
        rows = self.rows(stage_folder, inputs, scratch, reading)
        if not self.config.licenses:
            return rows
        from pipeline.rows.licenses import Licenses, license_of  # the list of SPDX, needed only with this filter
        licenses = Licenses(self.config.licenses)

        def is_allowed(row: Row) -> bool:
            if row.reason == BAD_ROW:
                return True
            spdx = license_of(self.columns_of(row)).spdx
            if licenses.allow(spdx):
                return True
            reading.filtered += 1
            reading.filtered_by[LICENSE if spdx else NO_LICENSE] += 1
            return False

        return filter(is_allowed, rows)

    def retry_part(self, stage_folder: str, wanted: list[tuple[dict[str, Any], list[int]]], number: int) -> Part:
        """A part of some rows of other parts: (inputs of the part, numbers of the rows) each."""
        rows: list[Row] = []
        for inputs, numbers in wanted:
            chosen = set(numbers)
            rows += [row for row in read_rows(stage_folder, inputs) if row.number in chosen]
        return write_rows(rows, number, len(rows))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"addresses": []}  # long, and the parts have them


def parse_row_filter(config: ShardConfig) -> RowFilter | None:
    """The row filter of the settings, None without one."""
    if not config.where:
        return None
    from pipeline.rows.row_filter import RowFilter  # 50 MB, needed only with a filter
    return RowFilter.parse(config.where)


def list_all_files(sources: Sequence[str], kind: str) -> list[str]:
    """The files of a kind in several sources, each once."""
    files = [url for source in sources for url in list_source_files(source, kind)]
    unique = list(dict.fromkeys(files))
    if len(unique) < len(files):
        _log.warning("%s: %d files are named twice and taken once", ", ".join(sources), len(files) - len(unique))
    return unique


def list_source_files(source: str, kind: str) -> list[str]:
    """The files of a kind that an address stands for: itself, those in the folder, or those that match."""
    suffixes = TARS if kind == "tars" else LISTS
    if is_pattern(source):
        matches = match_pattern(source)
        # As in folders; a pattern that names other endings means them.
        return [address for address in matches if address.lower().endswith(suffixes)] or matches
    if storage.is_file(source):
        return [storage.normalize(source)]
    try:
        names = [name for name, length in sorted(storage.walk(source))
                 if length is not None and not system_folder(name)]
    except FileNotFoundError:
        raise ValueError(f"there is no file or folder {source}") from None
    chosen = [name for name in names if name.lower().endswith(suffixes)]
    if not chosen and kind == "list":
        chosen = [name for name in names if name.lower().endswith(LOOSE_TABLES)]
    return [storage.join(storage.normalize(source), name) for name in chosen]
