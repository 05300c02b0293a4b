"""Where rows come from: a folder of pictures, lists of addresses, tables with pictures in them, tars.

A source tells what it is (`identity`), cuts itself into parts of so many rows (`parts`, on the driver) and reads
a part (`rows`, on a worker). None of them holds more than a part in memory, but for the names in a folder.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipeline import images, storage
from pipeline.stage import name_by_content
from pipeline.where import Where

if TYPE_CHECKING:
    from pipeline.shard import ShardConfig

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


class Source(ABC):
    """A corpus to shard."""

    fetch: ClassVar[Literal["file", "url", "none"]]
    """How the bytes of a row's picture are come by; none: they are in the row."""

    def __init__(self, config: ShardConfig) -> None:
        self.config = config

    @abstractmethod
    def identity(self) -> str:
        """A hash that stands for what the source holds, wherever it lies."""

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
    lines = "".join(json.dumps({key: value for key, value in asdict(row).items() if value or key == "number"},
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


def where_of(config: ShardConfig) -> Where | None:
    """The filter that the settings ask for, None without one."""
    return Where.parse(config.where) if config.where else None


def addresses_of(source: str, kind: str) -> list[str]:
    """The files of a kind that an address stands for: itself, those in the folder, or those that match."""
    if "*" in source or "?" in source:
        return storage.glob(source)
    suffixes = (".tar",) if kind == "tars" else LISTS
    if storage.exists(source):
        return [storage.normal(source)]
    return [storage.join(storage.normal(source), name) for name, length in sorted(storage.walk(source))
            if name.lower().endswith(suffixes) and length is not None]


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
    if isinstance(value, float) and (value != value or value in {float("inf"), float("-inf")}):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def text(value: Any) -> str:
    """A cell as one text: nothing is the empty text, of a list the first counts."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    usual = plain(value)
    return "" if usual is None else str(usual)
