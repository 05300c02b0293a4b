"""Where rows come from: a folder of pictures, lists of addresses, tables with pictures in them, tars.

A source tells what it is (`identity`), cuts itself into parts of so many rows (`parts`, on the driver) and reads
a part (`rows`, on a worker). None of them holds more than a part in memory, but for the names in a folder.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from pipeline import images, storage
from pipeline.stage import name_by_content

if TYPE_CHECKING:
    from pipeline.shard import ShardConfig
    from pipeline.sources.row_filter import RowFilter

Kind = Literal["auto", "pictures", "list", "tars"]
LISTS = tuple(f".{kind}{packed}" for kind in ("parquet", "pq", "csv", "tsv", "jsonl", "ndjson")
              for packed in ("", ".gz", ".zst", ".bz2"))
CAPTION_COLUMNS = ("caption", "TEXT", "text", "captions", "alt_text")


@dataclass
class Row:
    """One row of a source: what its picture is called and where it is, and what is known of it."""

    number: int
    """Its place in the source; what is left out by a filter counts."""
    name: str
    """URL, name in the folder, or key in a tar."""
    caption: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    """Hash that the picture's bytes must have, in hexadecimal."""
    remarks: list[str] = field(default_factory=list)
    caption_file: str = ""
    missing: str = ""
    """Why there is no picture to be had, as far as the listing knows."""
    data: bytes | None = None


@dataclass(frozen=True)
class Part:
    """A piece of a source for one item: names and ranges, and the small files that hold lists."""

    inputs: dict[str, Any]
    carries: tuple[tuple[str, bytes], ...] = ()


@dataclass
class Reading:
    """What a worker learns while it reads a part."""

    filtered: int = 0
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, reason, detail) of what is no row: members of tars that nothing can be made of."""


class Types:
    """The type of each column that suits all its cells, whatever part they are in."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def see(self, cells: Mapping[str, Any]) -> None:
        """The cells of one more row."""
        for name, value in cells.items():
            self._of(name).add(_type_of(value))

    def see_schema(self, schema: pa.Schema) -> None:
        """The columns of one more file of parquet."""
        for field_ in schema:
            kind = field_.type.value_type if pa.types.is_dictionary(field_.type) else field_.type
            # As `plain` and JSON have them: 64 bits without a sign become text.
            found = ("none" if pa.types.is_null(kind) else "bool" if pa.types.is_boolean(kind) else
                     "double" if pa.types.is_floating(kind) else
                     "int64" if pa.types.is_integer(kind) and kind != pa.uint64() else "string")
            self._of(field_.name).add(found)

    def _of(self, name: str) -> set[str]:
        return self._seen.setdefault(sound(name), set())

    def found(self) -> dict[str, str]:
        """Columns and their types, by the names that Arrow has for them."""
        return {name: _common(kinds - {"none"}) for name, kinds in sorted(self._seen.items())}


def _type_of(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool | float):
        return "bool" if isinstance(value, bool) else "double"
    if isinstance(value, int):
        # float64 has whole numbers up to 2**53.
        return "int64" if abs(value) <= 1 << 53 else "large" if -(1 << 63) <= value < 1 << 63 else "string"
    return "string"


def _common(kinds: set[str]) -> str:
    for wide, parts in (("bool", {"bool"}), ("int64", {"int64", "large"}), ("double", {"int64", "double"})):
        if kinds and kinds <= parts:
            return wide
    return "string"


class Source(ABC):
    """A corpus to shard."""

    fetch: ClassVar[Literal["file", "url", "none"]]
    """How the bytes of a row's picture are come by; none: they are in the row."""

    def __init__(self, config: ShardConfig) -> None:
        self.config = config

    @abstractmethod
    def identity(self) -> str:
        """A hash that stands for what the source holds, wherever it lies."""

    def types(self) -> dict[str, str]:
        """Types of the columns of its own, so that all shards have the same; those left out are told by the cells."""
        return {}

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """The source in pieces of so many rows, in order."""

    @abstractmethod
    def rows(self, stage_folder: str, inputs: dict[str, Any], scratch: Path, reading: Reading) -> Iterator[Row]:
        """The rows of a part, in order."""

    def again(self, stage_folder: str, wanted: list[tuple[dict[str, Any], list[int]]], number: int) -> Part:
        """A part of some rows of other parts: (inputs of the part, numbers of the rows) each."""
        rows: list[Row] = []
        for inputs, numbers in wanted:
            chosen = set(numbers)
            rows += [row for row in listed_rows(stage_folder, inputs) if row.number in chosen]
        return listed(rows, number, len(rows))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"addresses": []}  # long, and the parts have them


def listed(rows: Iterable[Row], number: int, count: int, more: dict[str, Any] | None = None) -> Part:
    """A part that brings its rows along, as lines of JSON in a file beside the plan."""
    lines = "".join(json.dumps({key: value for key, value in vars(row).items() if value or key == "number"},
                               sort_keys=True) + "\n" for row in rows).encode()
    name = name_by_content(f"rows/{number:06d}.jsonl", lines)
    return Part({"rows": name, "count": count} | (more or {}), ((name, lines),))


def listed_rows(stage_folder: str, inputs: dict[str, Any]) -> Iterator[Row]:
    """The rows that `listed` wrote."""
    for line in storage.read_bytes(storage.join(stage_folder, inputs["rows"])).splitlines():
        row = Row(**({"name": ""} | json.loads(line)))
        yield row


def of(config: ShardConfig) -> Source:
    """The source that the settings name; ValueError if there is none, or it cannot be told what it is."""
    from pipeline.sources.folder import Folder
    from pipeline.sources.lists import Lists
    from pipeline.sources.tars import Tars
    if not config.source:
        raise ValueError("shard needs a source\nhint: --source FOLDER, or a list of addresses, or tars")
    kind = config.kind if config.kind != "auto" else _guess(config.source)
    if kind == "pictures":
        return Folder(config)
    addresses = [address for source in config.source for address in addresses_of(source, kind)]
    if not addresses:
        wanted = {"list": ", ".join(LISTS[::4]), "tars": ".tar"}[kind]
        raise ValueError(f"no files ending in {wanted} in {', '.join(config.source)}")
    return Lists(config, addresses) if kind == "list" else Tars(config, addresses)


def where_of(config: ShardConfig) -> RowFilter | None:
    """The row filter of the settings, None without one."""
    if not config.where:
        return None
    from pipeline.sources.row_filter import RowFilter  # 50 MB, needed only with a filter
    return RowFilter.parse(config.where)


def addresses_of(source: str, kind: str) -> list[str]:
    """The files of a kind that an address stands for: itself, those in the folder, or those that match."""
    suffixes = (".tar",) if kind == "tars" else LISTS
    if "*" in source or "?" in source:
        found = storage.glob(source)
        # As in folders; a pattern that names other endings means them.
        return [address for address in found if address.lower().endswith(suffixes)] or found
    if storage.exists(source):
        return [storage.normal(source)]
    try:
        return [storage.join(storage.normal(source), name) for name, length in sorted(storage.walk(source))
                if name.lower().endswith(suffixes) and length is not None]
    except FileNotFoundError:
        raise ValueError(f"there is no file or folder {source}") from None


def _guess(sources: tuple[str, ...]) -> str:
    kinds = set()
    for source in sources:
        names: Iterable[str] = [source]
        if ("*" in source or "?" in source) and not source.lower().endswith((".tar", *LISTS, *images.SUFFIXES)):
            names = storage.glob(source)
        elif not source.lower().endswith((".tar", *LISTS, *images.SUFFIXES)) and not storage.exists(source):
            try:
                names = [name for name, _ in storage.walk(source)]
            except FileNotFoundError:
                raise ValueError(f"there is no file or folder {source}") from None
        endings = [name.lower() for name in names]
        for kind, suffixes in (("pictures", images.SUFFIXES), ("tars", (".tar",)), ("list", LISTS)):
            if any(name.endswith(suffixes) for name in endings):
                kinds.add(kind)
                break
        else:
            raise ValueError(f"no pictures in {source}\nhint: files ending in {', '.join(images.SUFFIXES)} are looked "
                             f"for, in folders below it too; or .tar; or lists, ending in {', '.join(LISTS[::4])}")
    if len(kinds) != 1:
        raise ValueError(f"the sources are of several kinds: {', '.join(sorted(kinds))}\n"
                         f"hint: make a dataset of each")
    return kinds.pop()


def plain(value: Any) -> Any:
    """A cell as JSON can hold it, which has no infinity and no NaN."""
    if isinstance(value, str):
        return sound(value)
    if isinstance(value, float) and (value != value or value in {float("inf"), float("-inf")}):
        return None
    return value if isinstance(value, int | float | bool | None) else sound(str(value))


def sound(text_: str) -> str:
    """Text that UTF-8 can hold: halves of characters, as in emoji that somebody cut, become question marks."""
    return text_ if text_.isascii() else text_.encode("utf-8", "replace").decode()


def cells_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Cells that are carried along, as JSON can hold them, without passwords in addresses."""
    usual = {sound(name): plain(value) for name, value in document.items()}
    return {name: storage.without_credentials(value) if isinstance(value, str) and "://" in value else value
            for name, value in usual.items()}


def text(value: Any) -> str:
    """A cell as one text: nothing is the empty text, of a list the first counts."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    usual = plain(value)
    return "" if usual is None else str(usual)
