"""Compare a source with the last version of its dataset."""

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.takedowns import Forgotten
from pipeline.media.types import BadImage
from pipeline.shards import metadata
from pipeline.shards.transform import source_name
from pipeline.sources.config import ShardConfig
from pipeline.sources.detect import open_source
from pipeline.sources.rows import ReadReport, Row, read_rows, write_rows
from pipeline.sources.source import Source
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output
from pipeline.storage import parquet

LISTING, DEAD = "listing.parquet", "dead.txt"
LISTING_SCHEMA = pa.schema([(name, pa.string()) for name in ("name", "mark", "stamp", "sha256", "shard")]
                     + [("row", pa.int64()), ("status", pa.string())])
_READ_AT_ONCE = 1000
_READERS = 16
_T = TypeVar("_T")


@dataclass
class Known:
    """What became of a row of the source: how it looked, and where it is."""

    name: str
    mark: str
    stamp: str
    sha256: str = ""
    shard: str = ""
    row: int = -1
    status: str = ""


@dataclass
class Change:
    """What the rows of a source are beside those of the last version."""

    known: list[Known]
    """One for each row of the source, in order; those of new rows have no shard yet."""
    fresh: list[Row] = field(default_factory=list)
    live: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Of each shard of the last version the rows that are still in the source."""
    counts: Counter[str] = field(default_factory=Counter)
    """kept, added, changed, removed, forgotten: rows of the source; pictures of the last version: before."""


class Sought:
    """The rows of a source as they are now."""

    def __init__(self, config: ShardConfig, forgotten: Forgotten) -> None:
        source = open_source(config)
        if source.fetch == "none":
            raise ValueError(f"{', '.join(config.source)} holds the pictures themselves: what changed in it cannot be "
                             f"told\nhint: rebuild takes a folder of pictures, or lists of addresses")
        self.config, self.source, self.forgotten = config, source, forgotten
        stamps = storage.list_stamps(source.base) if source.fetch == "file" else {}  # type: ignore[attr-defined]
        self.rows: list[Row] = []
        self.known: list[Known] = []
        seen: Counter[str] = Counter()
        for row in _rows(source):
            name = source_name(row)
            if forgotten.named(name):
                continue
            mark = storage.digest([name, row.caption, row.columns, row.digest, row.caption_file, seen[name]])
            seen[name] += 1
            stamp = ":".join(stamps.get(one, "") for one in (row.name, row.caption_file) if one)
            row.number = len(self.rows)
            self.rows.append(row)
            self.known.append(Known(name, mark, stamp))

    @property
    def digest(self) -> str:
        """A hash of what the source is seen to hold."""
        lines = (json.dumps([one.mark, one.stamp]) for one in self.known)
        return hashlib.sha256("\n".join([self.forgotten.digest, *lines]).encode()).hexdigest()

    def suspects(self, before: Sequence[Known]) -> list[int]:
        """Numbers of the rows that have another look than in the last version, and nothing else new."""
        there = {one.mark: one for one in before}
        return [number for number, one in enumerate(self.known)
                if (old := there.get(one.mark)) and old.stamp != one.stamp and old.sha256]

    def against(self, before: Sequence[Known], hashes: Mapping[int, str]) -> Change:
        """What changed since; `hashes` are those of the bytes of rows that were read, by their number."""
        there = {one.mark: one for one in before}
        names = Counter(one.name for one in before)
        change = Change([])
        for number, (row, one) in enumerate(zip(self.rows, self.known, strict=True)):
            old = there.get(one.mark)
            # Of a picture that could not be read then, no hash is known: its look alone tells.
            same = old is not None and (hashes[number] == old.sha256 if number in hashes and old.sha256
                                        else one.stamp == old.stamp)
            if same and old and old.status != metadata.SUCCESS and self.source.fetch == "url":
                same = False  # a server that failed may answer now
            if same and old and (old.status == metadata.FORGOTTEN or old.sha256 in self.forgotten.sha256):
                names[one.name] -= 1
                change.counts["forgotten"] += old.status != metadata.FORGOTTEN  # that was counted once
                change.known.append(Known(one.name, one.mark, one.stamp, old.sha256, status=metadata.FORGOTTEN))
                continue
            if same and old:
                names[one.name] -= 1
                change.counts["kept"] += 1
                change.known.append(Known(one.name, one.mark, one.stamp, old.sha256, old.shard, old.row, old.status))
                if old.shard:
                    change.live[old.shard].add(old.row)
                continue
            change.counts["changed" if names[one.name] > 0 else "added"] += 1
            names[one.name] -= names[one.name] > 0
            change.known.append(one)
            change.fresh.append(row)
        for name, count in names.items():
            change.counts["forgotten" if self.forgotten.named(name) else "removed"] += max(count, 0)
        return change


def _rows(source: Source) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for part in source.parts():
            for name, data in part.carries:
                storage.put_bytes(data, storage.join(folder, name))
            yield from source.rows(folder, part.inputs, Path(folder), ReadReport())


def listing(base: Dataset) -> list[Known]:
    """The rows of the source that a version was made from; of one that `shard` made, as far as its metadata tell."""
    manifest = base.manifest("shards")
    for entry in manifest["files"]:
        if entry["name"] == LISTING:
            table = parquet.read(base.fetch("shards", entry))
            return [Known(**row) for row in table.to_pylist()]
    found = []
    for record in manifest["items"]:
        known: dict[int, Known] = {}
        for row in read_metadata(base, record).to_pylist():
            extra = {name: cell for name, cell in row.items() if name not in metadata.COLUMNS}
            # Without the number among rows of one name, and what a list says of hashes: rows with those are new.
            mark = storage.digest([row["url"], row["caption"] or "", extra, "", "", 0])
            one = known.setdefault(row["source_row"], Known(row["url"], mark, "?"))
            if one.status != metadata.SUCCESS:
                one.sha256, one.shard, one.row = row["original_sha256"] or "", record["id"], row["source_row"]
                one.status = row["status"]
        found += known.values()
    return found


def read_metadata(dataset: Dataset, record: dict[str, Any]) -> pa.Table:
    return parquet.read(dataset.fetch("shards", file_of(record, ".parquet")))


def reference(base: Dataset, stage_name: str, dataset: Dataset, entry: dict[str, Any]) -> dict[str, Any]:
    """A file of another version as one of this: its name leads there from the stage folder."""
    full = storage.manifest_file_url(base.folder(stage_name), entry["name"])
    versions = storage.join(dataset.root, "datasets", dataset.name) + "/"
    return entry | {"name": f"../../{full.removeprefix(versions)}" if full.startswith(versions) else full}


class Compare(Stage):
    """The stage that reads the files which look other than they did; their hashes."""

    name = "compare"

    def __init__(self, dataset: Dataset, sought: Sought, numbers: Sequence[int]) -> None:
        super().__init__(dataset.root, dataset.path("compare"), None)
        self.dataset, self.source, self.numbers, self.digest = dataset, sought.source, numbers, sought.digest
        self.sought: Sought | None = sought

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"sought": None, "numbers": ()}

    @property
    def command(self) -> str:
        return f"python -m jobs rebuild {self.dataset.name} --root {self.root}"

    def section(self) -> dict[str, Any]:
        return {}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return {"pictures": {"path": "", "digest": self.digest}}

    def plan(self) -> Iterator[Item]:
        assert self.sought
        for number, some in enumerate(groups(self.numbers, _READ_AT_ONCE)):
            part = write_rows((self.sought.rows[one] for one in some), number, len(some))
            yield Item(f"{number:06d}", part.inputs, part.carries)

    def process(self, item: Item, scratch: Path) -> Output:
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._hash, read_rows(self.folder, item.inputs)))
        out = scratch / "hashes.json"
        out.write_bytes(storage.json_bytes(found))
        return Output(len(found), {f"{item.id}.json": out})

    def _hash(self, row: Row) -> tuple[int, str]:
        try:
            return row.number, hashlib.sha256(self.source.read(row)).hexdigest()  # type: ignore[attr-defined]
        except BadImage:
            return row.number, ""

    def hashes(self, manifest: dict[str, Any]) -> dict[int, str]:
        """The hash of each row that was read, by its number; empty where it could not be."""
        return {number: hashed for record in manifest["items"]
                for number, hashed in storage.read_json(storage.join(self.folder, file_of(record, ".json")["name"]))}


def row_counts(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["info"].items() if name in {"rows", "filtered"}}


def groups(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """`size` of them at a time."""
    left = iter(values)
    while part := list(islice(left, size)):
        yield part


def succeeded_rows(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["status"], metadata.SUCCESS))
