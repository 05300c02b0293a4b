"""The stage that packs what changed and keeps the shards that stayed."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets import hidden_rows
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.takedowns import Forgotten
from pipeline.media import tars
from pipeline.shards import metadata
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.sources.rows import ReadReport, Row, read_rows, write_rows
from pipeline.stages.types import Item, Output
from pipeline.storage import name_by_content, parquet
from pipeline.versions.source_diff import (
    DEAD,
    LISTING,
    LISTING_SCHEMA,
    Change,
    Sought,
    groups,
    read_metadata,
    reference,
    row_counts,
    succeeded_rows,
)


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
        types = sought.source.column_types()
        data = storage.json_bytes(types)
        carried = ((name_by_content("rows/types.json", data), data),) if types else ()
        more = {"types": carried[0][0]} if types else {}
        for number, some in enumerate(groups(change.fresh, self.config.rows_per_shard)):
            part = write_rows(some, next_ + number, len(some))
            yield Item(f"{next_ + number:06d}", part.inputs | more, (*part.carries, *carried))
            carried = ()

    def _taken(self, record: dict[str, Any], dead: list[int], live: set[int]) -> Item | None:
        """What becomes of a shard of the last version: it stays, is written again, or goes."""
        assert self.last
        table = succeeded_rows(read_metadata(self.last, record))
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
        keys = succeeded_rows(read_metadata(base, record))["key"].to_pylist() if gone else []
        return Output(record["samples"], info=row_counts(record) | {"kept": record["samples"]}
                      | ({"dead": [keys[row] for row in gone]} if gone else {}),
                      counted=(record["skipped"], record["noted"]),
                      elsewhere=[reference(base, "shards", self.dataset, entry) for entry in record["files"]])

    def _sifted(self, item: Item, base: Dataset, record: dict[str, Any], gone: set[int], scratch: Path) -> Output:
        """A shard without some of its samples, and without a trace of them."""
        tar, parquet = scratch / "shard.tar", scratch / "shard.parquet"
        there = base.fetch("shards", file_of(record, ".tar"), check=True)
        tars.write(tar, ({key: value for key, value in sample.items() if key != "__url__"}
                         for row, sample in enumerate(tars.read(there)) if row not in gone))
        table = succeeded_rows(read_metadata(base, record))
        pq.write_table(table.take([row for row in range(table.num_rows) if row not in gone]), parquet)
        return Output(record["samples"] - len(gone), {f"{item.id}.tar": tar, f"{item.id}.parquet": parquet},
                      info={"rows": record["samples"] - len(gone), "sifted": record["samples"] - len(gone),
                            "of": file_of(record, ".tar")["sha256"]})

    def _rows(self, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
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
        pq.write_table(pa.Table.from_pylist([vars(one) for one in change.known], LISTING_SCHEMA), scratch / LISTING)
        output.files[LISTING] = scratch / LISTING
        dead = [key for record in records for key in record["info"].get("dead", ())]
        if dead:
            (scratch / DEAD).write_text("".join(f"{key}\n" for key in dead))
            output.files[DEAD] = scratch / DEAD
        output.info |= {"change": dict(change.counts), "dead": len(dead)}
        return output
