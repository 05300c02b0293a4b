"""Lists of URLs, and tables that hold the images themselves: the base class of both kinds of files."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline import storage
from pipeline.rows.column_types import ColumnTypes
from pipeline.sources.list_columns import Columns, choose_columns, describe_layout
from pipeline.sources.patterns import is_pattern
from pipeline.sources.source import Source, parse_row_filter
from pipeline.tables.partitions import partition_cells, partition_types

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig

_log = logging.getLogger(__name__)

class ListSource(Source):
    """Rows of tables. A file may have other columns than the first, and folders may be named `column=value`."""

    kind = "list"
    columns: Columns
    """The columns of the first file that has rows."""

    def __init__(self, config: ShardConfig, addresses: list[str]) -> None:
        super().__init__(config)
        self.addresses = addresses
        self.where = parse_row_filter(config)
        self.partitions = partition_types(map(self._path, addresses))
        self.text_kinds: dict[str, str] = {}
        self.columns = self._first_columns()
        if description := describe_layout(self.columns):
            _log.info("%s %s", addresses[0], description)
        if not self.columns.caption and self.columns.others:
            _log.warning("%s: no column is a caption; it has %s\nhint: --caption-column NAME", addresses[0],
                         ", ".join(self.columns.others))
        self.fetch = "url" if self.columns.kind == "url" else "none"

    def identity(self) -> str:
        summaries = self._summaries()
        if self.partitions:
            summaries += [json.dumps(self._partition_cells(address)) for address in self.addresses]
        return hashlib.sha256("\n".join(summaries).encode()).hexdigest()

    def column_types(self) -> dict[str, str]:
        types = ColumnTypes()
        for name, kind in self.partitions.items():
            types.add(name, kind)
        for columns in self._add_types(types):
            for name, _ in columns.added:
                types.add(name, "string")
        return types.by_column()

    @abstractmethod
    def _add_types(self, types: ColumnTypes) -> Iterator[Columns]:
        """Add the types of the stored columns. Yields what the columns of each file are."""

    @abstractmethod
    def _summaries(self) -> list[str]:
        """A text for each file that stands for what it holds."""

    @abstractmethod
    def _first_columns(self) -> Columns:
        """The columns of the first file that has rows."""

    def _choose_columns(self, schema: pa.Schema, address: str, first: Columns | None = None,
                        before: Columns | None = None) -> Columns:
        """The columns of a file. `first`: those of the list; `before`: those of earlier rows, with the same image."""
        config = self.config
        if before:
            config = (replace(config, url_column=before.image) if before.kind == "url" else
                      replace(config, image_column=before.image))
        return choose_columns(self._with_partitions(schema, address), address, config, first, self.text_kinds)

    def _with_partitions(self, schema: pa.Schema, address: str) -> pa.Schema:
        """A schema with the columns that the folders of a file add to its own."""
        for name in self._partition_cells(address):
            if name not in schema.names:
                schema = schema.append(pa.field(name, self._partition_type(name)))
        return schema

    def _partition_type(self, name: str) -> pa.DataType:
        return pa.int64() if self.partitions[name] == "int64" else pa.string()

    def _partition_cells(self, address: str) -> dict[str, int | str | None]:
        return partition_cells(self._path(address), self.partitions) if self.partitions else {}

    def _path(self, address: str) -> str:
        """The path of a file below the source that it belongs to, "" if the source is the file itself."""
        for source in self.config.source:
            parts = source.split("/")
            first = len(parts) if not is_pattern(source) else next(
                number for number, part in enumerate(parts) if glob.has_magic(part) or "{" in part)
            base = storage.normalize("/".join(parts[:first]) or ("/" if source.startswith("/") else "."))
            if address.startswith(base.rstrip("/") + "/"):
                return address[len(base.rstrip("/")) + 1:]
        return ""
