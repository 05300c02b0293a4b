"""A dataset made from its last version and a source that changed: only what is new is fetched and embedded.

    shards/   of shards that stay, the files of the last version, by name; shards that lost too much, or something that
              is to be forgotten, written again without it; new and changed pictures in shards of their own
              listing.parquet: every row of the source, how it looked, and which shard it is in
              dead.txt: keys that are still in the bytes and have no row in the source any more
    embeddings/   those of the last version, row by row, and those of the new shards

A row of the source is the one of the last version if it has the same name, caption and columns, and the file behind it
looks as it did (size and time, or ETag), or else the same bytes: those are read where it does not.
"""

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets import hidden_rows
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.takedowns import Forgotten
from pipeline.embeddings.embed import Embed, EmbedCaptions, EmbedConfig
from pipeline.media import tars
from pipeline.media.types import BadPicture
from pipeline.shards import metadata
from pipeline.shards.shard import Shard
from pipeline.shards.transform import source_name
from pipeline.sources.config import ShardConfig
from pipeline.sources.detect import open_source
from pipeline.sources.rows import Reading, Row, read_rows, write_rows
from pipeline.sources.source import Source
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output
from pipeline.storage import name_by_content, parquet

LISTING, DEAD = "listing.parquet", "dead.txt"
_LISTING = pa.schema([(name, pa.string()) for name in ("name", "mark", "stamp", "sha256", "shard")]
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
        stamps = storage.stamps(source.base) if source.fetch == "file" else {}  # type: ignore[attr-defined]
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
            yield from source.rows(folder, part.inputs, Path(folder), Reading())


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
        for row in _parquet(base, record).to_pylist():
            extra = {name: cell for name, cell in row.items() if name not in metadata.COLUMNS}
            # Without the number among rows of one name, and what a list says of hashes: rows with those are new.
            mark = storage.digest([row["url"], row["caption"] or "", extra, "", "", 0])
            one = known.setdefault(row["source_row"], Known(row["url"], mark, "?"))
            if one.status != metadata.SUCCESS:
                one.sha256, one.shard, one.row = row["original_sha256"] or "", record["id"], row["source_row"]
                one.status = row["status"]
        found += known.values()
    return found


def _parquet(dataset: Dataset, record: dict[str, Any]) -> pa.Table:
    return parquet.read(dataset.fetch("shards", file_of(record, ".parquet")))


def reference(base: Dataset, stage_name: str, dataset: Dataset, entry: dict[str, Any]) -> dict[str, Any]:
    """A file of another version as one of this: its name leads there from the stage folder."""
    full = storage.place(base.folder(stage_name), entry["name"])
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
        for number, some in enumerate(_some(self.numbers, _READ_AT_ONCE)):
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
        except BadPicture:
            return row.number, ""

    def hashes(self, manifest: dict[str, Any]) -> dict[int, str]:
        """The hash of each row that was read, by its number; empty where it could not be."""
        return {number: hashed for record in manifest["items"]
                for number, hashed in storage.read_json(storage.join(self.folder, file_of(record, ".json")["name"]))}


class Update(Shard):
    """The stage from a changed source and the last version (None: there is none) to the shards of the next."""

    def __init__(self, dataset: Dataset, config: ShardConfig, last: Dataset | None, sought: Sought, change: Change,
                 rewrite: float) -> None:
        """Shards of which a share of more than `rewrite` is gone are written again."""
        super().__init__(dataset, config)
        self.last, self.rewrite, self.refused = last, rewrite, sought.forgotten.sha256
        self._seen: tuple[Sought, Change] | None = (sought, change)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seen": None}

    @property
    def command(self) -> str:
        return f"python -m jobs rebuild {self.dataset.name} --source {' '.join(self.config.source)} --root {self.root}"

    def section(self) -> dict[str, Any]:
        return super().section() | {"rewrite": self.rewrite}

    @staticmethod
    def section_of(config: ShardConfig) -> dict[str, Any]:
        """What shards must have in common with those of the last version to stay."""
        return Shard(Dataset("", "any"), config).section()

    def inputs(self) -> dict[str, dict[str, Any]]:
        assert self._seen
        found = {"pictures": {"path": "", "digest": storage.digest([self._seen[0].digest, self._origins()])}}
        if self.last:
            # Without its path: what is taken from it is known by hash, and the rest of it may go.
            found["last"] = {"path": "", "digest": storage.digest([
                self.last.manifest("shards")["content"], hidden_rows.rows(self.last).tolist()])}
        return found

    def plan(self) -> Iterator[Item]:
        assert self._seen
        sought, change = self._seen
        taken, next_ = [], 0
        if self.last:
            gone, offset = set(hidden_rows.rows(self.last).tolist()), 0
            for record in self.last.manifest("shards")["items"]:
                dead = [row - offset for row in range(offset, offset + record["samples"]) if row in gone]
                taken.append(self._taken(record, dead, change.live.get(record["id"], set())))
                offset += record["samples"]
                next_ = max(next_, int(record["id"]) + 1)
        yield from (item for item in taken if item)
        types = sought.source.types()
        data = storage.json_bytes(types)
        carried = ((name_by_content("rows/types.json", data), data),) if types else ()
        more = {"types": carried[0][0]} if types else {}
        for number, some in enumerate(_some(change.fresh, self.config.rows_per_shard)):
            part = write_rows(some, next_ + number, len(some))
            yield Item(f"{next_ + number:06d}", part.inputs | more, (*part.carries, *carried))
            carried = ()

    def _taken(self, record: dict[str, Any], dead: list[int], live: set[int]) -> Item | None:
        """What becomes of a shard of the last version: it stays, is written again, or goes."""
        assert self.last
        table = _succeeded(_parquet(self.last, record))
        columns = {"sha256", "original_sha256", "url"} & set(table.column_names)
        forgotten = self._seen[0].forgotten if self._seen else Forgotten()
        burning = [number for number, row in enumerate(table.select(sorted(columns)).to_pylist())
                   if forgotten.has(row)] if forgotten else []
        gone = sorted({*dead, *burning, *(number for number, row in enumerate(table["source_row"].to_pylist())
                                          if row not in live)})
        if len(gone) == record["samples"]:
            return None
        base = self.last.version
        inputs = {"last": record, "version": base, "count": record["info"].get("rows", record["samples"])}
        if not gone:
            return Item(record["id"], inputs)
        sift = bool(burning) or len(gone) > self.rewrite * record["samples"]
        data = json.dumps(gone).encode()
        name = name_by_content(f"rows/gone-{record['id']}.json", data)
        return Item(record["id"], inputs | {"gone": name, "sift": sift}, ((name, data),))

    def process(self, item: Item, scratch: Path) -> Output:
        if "last" not in item.inputs:
            return super().process(item, scratch)
        record, base = item.inputs["last"], Dataset(self.root, self.dataset.name, item.inputs["version"])
        gone = (json.loads(storage.read_bytes(storage.join(self.folder, item.inputs["gone"])))
                if "gone" in item.inputs else [])
        if item.inputs.get("sift"):
            return self._sifted(item, base, record, set(gone), scratch)
        keys = [row["key"] for row in _succeeded(_parquet(base, record)).select(["key"]).to_pylist()] if gone else []
        return Output(record["samples"], info=_info(record) | {"kept": record["samples"]}
                      | ({"dead": [keys[row] for row in gone]} if gone else {}),
                      counted=(record["skipped"], record["noted"]),
                      elsewhere=[reference(base, "shards", self.dataset, entry) for entry in record["files"]])

    def _sifted(self, item: Item, base: Dataset, record: dict[str, Any], gone: set[int], scratch: Path) -> Output:
        """A shard without some of its samples, and without a trace of them."""
        tar, parquet = scratch / "shard.tar", scratch / "shard.parquet"
        there = base.fetch("shards", file_of(record, ".tar"), check=True)
        tars.write(tar, ({key: value for key, value in sample.items() if key != "__url__"}
                         for row, sample in enumerate(tars.read(there)) if row not in gone))
        table = _succeeded(_parquet(base, record))
        pq.write_table(table.take([row for row in range(table.num_rows) if row not in gone]), parquet)
        return Output(record["samples"] - len(gone), {f"{item.id}.tar": tar, f"{item.id}.parquet": parquet},
                      info={"rows": record["samples"] - len(gone), "sifted": record["samples"] - len(gone),
                            "of": file_of(record, ".tar")["sha256"]})

    def _rows(self, inputs: dict[str, Any], scratch: Path, reading: Reading) -> Iterator[Row]:
        return read_rows(self.folder, inputs)

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        output = super().finish(records, scratch)
        assert self._seen
        change = self._seen[1]
        by_number = {row.number: change.known[row.number] for row in change.fresh}
        for record in records:
            if "kept" in record["info"] or "sifted" in record["info"]:
                continue
            table = parquet.read(self.dataset.fetch("shards", file_of(record, ".parquet")),
                                columns=["source_row", "original_sha256", "status", "error_message"])
            for row in table.to_pylist():
                one = by_number[row["source_row"]]
                if one.status != metadata.SUCCESS:
                    one.sha256, one.shard, one.row = row["original_sha256"] or "", record["id"], row["source_row"]
                    left_out = (row["error_message"] or "").startswith(f"{metadata.FORGOTTEN}:")
                    one.status = metadata.FORGOTTEN if left_out else row["status"]
        pq.write_table(pa.Table.from_pylist([vars(one) for one in change.known], _LISTING), scratch / LISTING)
        output.files[LISTING] = scratch / LISTING
        dead = [key for record in records for key in record["info"].get("dead", ())]
        if dead:
            (scratch / DEAD).write_text("".join(f"{key}\n" for key in dead))
            output.files[DEAD] = scratch / DEAD
        output.info |= {"change": dict(change.counts), "dead": len(dead)}
        return output


def _info(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["info"].items() if name in {"rows", "filtered"}}


def _some(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """`size` of them at a time."""
    left = iter(values)
    while part := list(islice(left, size)):
        yield part


def _succeeded(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["status"], metadata.SUCCESS))


class Reuse(Embed):
    """The stage that embeds a version, and takes from the last one the vectors of shards that stayed."""

    def __init__(self, dataset: Dataset, config: EmbedConfig, last: Dataset | None) -> None:
        super().__init__(dataset, config)
        self.last = last

    def plan(self) -> list[Item]:
        items = super().plan()
        if not self.last or not self.last.sealed(self.of) or self.last.manifest(self.of)["section"] != self.section():
            return items
        vectors = {record["id"]: record for record in self.last.manifest(self.of)["items"]}
        shards = {file_of(record, ".tar")["sha256"]: record for record in self.last.manifest("shards")["items"]}
        return [self._reusing(item, shards, vectors) for item in items]

    def _reusing(self, item: Item, shards: dict[str, Any], vectors: dict[str, Any]) -> Item:
        assert self.last
        record = item.inputs["shard"]
        tar = file_of(record, ".tar")["sha256"]
        theirs = shards.get(record["info"].get("of", tar))
        if theirs is None:
            return item
        return Item(item.id, item.inputs | {"last": self.last.version, "vectors": vectors[theirs["id"]],
                                            **({"of": theirs} if "of" in record["info"] else {})})

    def setup(self) -> None:
        """Nothing yet: where everything stays, no encoder is needed."""

    def together(self, gpu: bool | None = None) -> int:
        return super().together(gpu) if gpu else 1

    def process_together(self, work: Sequence[tuple[Item, Path]]) -> Iterator[Output | Exception]:
        new = [(item, scratch) for item, scratch in work if "vectors" not in item.inputs]
        with closing(super().process_together(new)) as embedded:
            for one in work:
                yield from [next(embedded)] if one in new else Stage.process_together(self, [one])

    def process(self, item: Item, scratch: Path) -> Output:
        if "vectors" not in item.inputs:
            return super().process(item, scratch)
        theirs, base = item.inputs["vectors"], Dataset(self.root, self.dataset.name, item.inputs["last"])
        if "of" not in item.inputs:
            return Output(theirs["samples"], info={"reused": theirs["samples"]},
                          counted=(theirs["skipped"], theirs["noted"]),
                          elsewhere=[reference(base, self.of, self.dataset, entry) for entry in theirs["files"]])
        rows = np.load(base.fetch(self.of, file_of(theirs, ".npy"), check=True), allow_pickle=False)
        place = {key: row for row, key in enumerate(_succeeded(_parquet(base, item.inputs["of"]))["key"].to_pylist())}
        keys = _succeeded(_parquet(self.dataset, item.inputs["shard"]))["key"].to_pylist()
        vectors = rows[[place[key] for key in keys]]
        np.save(scratch / "vectors.npy", vectors, allow_pickle=False)
        ledger = [Entry(key, "no_vector", "row of zeros", kept=True) for key, vector in zip(keys, vectors, strict=True)
                  if not vector.any()]
        return Output(len(vectors), {f"{item.id}.npy": scratch / "vectors.npy"}, ledger, {"reused": len(vectors)})

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        output = super().finish(records, scratch)
        output.info["reused"] = sum(record["info"].get("reused", 0) for record in records)
        return output


class ReuseCaptions(Reuse, EmbedCaptions):
    """The same of captions."""
