"""The stage that packs changed rows and keeps unchanged shards."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.media import tars
from pipeline.rows.rows import ReadReport, Row, read_rows, write_rows
from pipeline.shards.metadata import FORGOTTEN, SUCCESS, add_image_positions
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.types import Entry, Item, Output, is_ledger
from pipeline.storage import name_by_content
from pipeline.takedowns import hidden_rows
from pipeline.versions.listing import (
    DEAD,
    LISTING,
    groups,
    map_in_order,
    read_metadata,
    reference,
    row_statuses,
    rows_of_source,
    succeeded_rows,
    wide,
    write_listing,
)
from pipeline.versions.source_diff import SourceDiff

_FILLED = wide(pa.schema([("number", pa.int64()), ("sha256", pa.string()), ("shard", pa.string()), ("row", pa.int64()),
                          ("status", pa.string())]))


class Update(Shard):
    """The stage from a changed source and the last version (None: there is none) to the shards of the next."""

    def __init__(self, dataset: Dataset, config: ShardConfig, last: Dataset | None, diff: SourceDiff,
                 rewrite: float) -> None:
        """Shards of which a share of more than `rewrite` is gone are written again."""
        super().__init__(dataset, config)
        self.last, self.diff, self.rewrite = last, diff, rewrite
        self.refused = diff.forgotten.sha256

    @property
    def command(self) -> str:
        sources = " ".join(map(storage.quote, self.config.source))
        return f"python -m jobs rebuild {self.dataset.name} --source {sources} --root {storage.quote(self.root)}"

    @property
    def replacement(self) -> str:
        return f"{self.command} --full"  # another version, made from the start

    def section(self) -> dict[str, Any]:
        return super().section() | {"rewrite": self.rewrite}

    @staticmethod
    def section_of(config: ShardConfig) -> dict[str, Any]:
        """The settings that shards of the last version must share, so that they can stay."""
        return Shard(Dataset("", "any"), config).section()

    def inputs(self) -> dict[str, dict[str, Any]]:
        inputs = {"pictures": {"path": "", "digest": storage.digest([self.diff.digest, self._origins()])}}
        if self.last:
            # Without its path: what is taken from it is known by hash, and the rest of it may go.
            inputs["last"] = {"path": "", "digest": storage.digest([
                self.last.manifest("shards")["content"], hidden_rows.read_hidden_rows(self.last).tolist()])}
        return inputs

    def after_seal(self) -> None:
        """Nothing: the rebuild applies the takedown list before it publishes."""

    def plan(self) -> Iterator[Item]:
        first_new = 0
        if self.last:
            yield from self._plan_last(self.last)
            first_new = 1 + max((int(record["id"]) for record in self.last.manifest("shards")["items"]), default=-1)
        types = self.diff.types
        data = storage.json_bytes(types)
        name = name_by_content("rows/types.json", data)
        more, carried = ({"types": name}, [(name, data)]) if types else ({}, [])
        rows = self.diff.rows(self.diff.fresh_numbers())
        for number, group in enumerate(groups(rows, self.config.rows_per_shard), first_new):
            part = write_rows(group, number, len(group))
            yield Item(f"{number:06d}", part.inputs | more, (*part.carries, *carried))
            carried = []

    def _plan_last(self, last: Dataset) -> Iterator[Item]:
        """The items for the shards of the last version."""
        hidden, offset = hidden_rows.read_hidden_rows(last), 0
        live, failed = self.diff.live_rows(), self.diff.live_rows(failed=True)
        work = []
        for record in last.manifest("shards")["items"]:
            end = offset + record["samples"]
            dead = hidden[np.searchsorted(hidden, offset):np.searchsorted(hidden, end)] - offset
            work.append((record, dead, *(rows.get(record["id"], np.zeros(0, np.int64)) for rows in (live, failed))))
            offset = end
        yield from (item for item in map_in_order(lambda arguments: self._plan_shard(last, *arguments), work) if item)

    def _plan_shard(self, last: Dataset, record: dict[str, Any], dead: np.ndarray, live: np.ndarray,
                    failed: np.ndarray) -> Item | None:
        """The item for a shard of the last version: it stays, or is written again. None: it is removed.

        `dead` are hidden samples. `live` and `failed` are rows that the source still has. Those of `live` became
        samples, those of `failed` did not.
        """
        positions, forgotten = self._gone_samples(last, record, dead, live)
        if len(positions) == record["samples"] and not len(failed):
            return None
        inputs = {"last": record, "version": last.version, "count": record["info"].get("rows", record["samples"])}
        carries: list[tuple[str, bytes]] = []

        def carry(name: str, rows: list[int]) -> str:
            data = json.dumps(rows).encode()
            carries.append((name_by_content(f"rows/{name}-{record['id']}.json", data), data))
            return carries[-1][0]

        if record["skipped"] or any(is_ledger(file["name"]) for file in record["files"]):
            inputs["failed"] = carry("failed", failed.tolist())
        if positions:
            inputs |= {"gone": carry("gone", positions),
                       "sift": forgotten or len(positions) > self.rewrite * record["samples"]}
        return Item(record["id"], inputs, tuple(carries))

    def _gone_samples(self, last: Dataset, record: dict[str, Any], dead: np.ndarray,
                      live: np.ndarray) -> tuple[list[int], bool]:
        """Numbers of the samples of a shard that must not stay, and whether some of them are to be forgotten."""
        forgotten = self.diff.forgotten
        if not forgotten and not len(dead) and len(live) == record["samples"]:
            return [], False  # as many rows stay as there are samples, so each sample is of one of these rows
        columns = ["source_row", "status", *(["sha256", "original_sha256", "url"] if forgotten else [])]
        samples = succeeded_rows(read_metadata(last, record, columns))
        burning = forgotten.mask(samples)
        left_out = ~np.isin(samples["source_row"].to_numpy(), live) | burning
        left_out[dead] = True
        return np.flatnonzero(left_out).tolist(), bool(burning.any())

    def process(self, item: Item, scratch: Path) -> Output:
        if "last" not in item.inputs:
            return super().process(item, scratch)
        record, base = item.inputs["last"], self.dataset.other_version(item.inputs["version"])
        positions, failed = (json.loads(storage.read_bytes(storage.file_below(self.folder, item.inputs[name])))
                             if name in item.inputs else [] for name in ("gone", "failed"))
        if item.inputs.get("sift"):
            return self._without(item, base, record, set(positions), failed, scratch)
        keys = succeeded_rows(read_metadata(base, record, ["key", "status"]))["key"].to_pylist() if positions else []
        counts = {name: value for name, value in record["info"].items() if name in {"rows", "filtered"}}
        output = Output(record["samples"], info=counts | {"kept": record["samples"]}
                        | ({"dead": [keys[row] for row in positions]} if positions else {}),
                        counts=(record["skipped"], record["noted"]),
                        external_files=[reference(base, "shards", self.dataset, entry) for entry in record["files"]])
        if "failed" in item.inputs:
            failures = read_metadata(base, record, ["source_row", "status", "url"])
            output.counts, output.ledger = None, self._ledger(base, record, failures, failed)
            output.external_files = [entry for entry in output.external_files if not is_ledger(entry["name"])]
        return output

    @staticmethod
    def _ledger(base: Dataset, record: dict[str, Any], table: pa.Table, failed: list[int]) -> list[Entry]:
        """The ledger of a shard. Of its rows without a sample, only those in `failed` stay.

        The source does not have the others now, or has them in another form: a newer shard counts these.
        """
        stay = set(failed)
        gone = Counter(name for name, status, row in zip(*_named_rows(table), strict=True)
                       if status != SUCCESS and row not in stay)
        entries = []
        for line in (line for file in record["files"] if is_ledger(file["name"])
                     for line in base.fetch("shards", file).read_text().splitlines()):
            entry = Entry(**json.loads(line))
            if entry.kept or entry.reason == FORGOTTEN or not gone[entry.key]:
                entries.append(entry)
            else:
                gone[entry.key] -= 1  # a list may name an image twice
        return entries

    def _without(self, item: Item, base: Dataset, record: dict[str, Any], positions: set[int], failed: list[int],
                 scratch: Path) -> Output:
        """A shard without some of its samples, and without a trace of them; `failed`: as in `_ledger`."""
        tar, parquet = scratch / "shard.tar", scratch / "shard.parquet"
        there = base.fetch("shards", file_of(record, ".tar"), check=True)
        tars.write(tar, (sample for row, sample in enumerate(tars.read(there)) if row not in positions))
        table = read_metadata(base, record)
        is_sample = pc.equal(table["status"], SUCCESS).to_numpy()
        stays = ~is_sample & np.isin(table["source_row"].to_numpy(), failed)
        stays[np.delete(np.flatnonzero(is_sample), sorted(positions))] = True
        remaining = table.filter(pa.array(stays))
        pq.write_table(add_image_positions(remaining, tars.image_positions(tar)), parquet)
        names = set(_named_rows(remaining)[0])
        samples = record["samples"] - len(positions)
        return Output(samples, {f"{item.id}.tar": tar, f"{item.id}.parquet": parquet},
                      [entry for entry in self._ledger(base, record, table, failed) if entry.key in names],
                      info={"rows": remaining.num_rows, "sifted": samples, "of": file_of(record, ".tar")["sha256"]})

    def _rows(self, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        return read_rows(self.folder, inputs)

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        output = super().finish(records, scratch)
        new_records = [record for record in records if not {"kept", "sifted"} & record["info"].keys()]
        filled = pa.concat_tables([_FILLED.empty_table(), *map_in_order(self._outcomes, new_records)])
        write_listing(_fill(self.diff.listing(), filled), scratch / LISTING)
        output.files[LISTING] = scratch / LISTING
        dead = [key for record in records for key in record["info"].get("dead", ())]
        if dead:
            (scratch / DEAD).write_text("".join(f"{key}\n" for key in dead))
            output.files[DEAD] = scratch / DEAD
        output.info |= {"change": dict(self.diff.counts), "dead": len(dead)} | self.diff.filtered_by
        return output

    def _outcomes(self, record: dict[str, Any]) -> pa.Table:
        """The listing of the rows of a new shard."""
        table = read_metadata(self.dataset, record, ["source_row", "original_sha256", "status", "error_message"])
        table = table.take(rows_of_source(table)[1])
        left_out = pc.starts_with(pc.fill_null(table["error_message"], ""), f"{FORGOTTEN}:")
        return pa.table([table["source_row"], pc.fill_null(table["original_sha256"], ""),
                         pa.array([record["id"]] * table.num_rows, pa.string()), table["source_row"],
                         pc.if_else(left_out, FORGOTTEN, row_statuses(table))], _FILLED.names).cast(_FILLED)


def _named_rows(table: pa.Table) -> tuple[list[str], list[str], list[int]]:
    """The names of rows in a ledger, their status and their numbers."""
    rows = table["source_row"].to_pylist()
    return [name or f"row {row}" for name, row in zip(table["url"].to_pylist(), rows, strict=True)
            ], table["status"].to_pylist(), rows


def _fill(listing: pa.Table, filled: pa.Table) -> pa.Table:
    """A listing with what became of the rows of some numbers."""
    positions = np.full(listing.num_rows, -1, np.int64)
    positions[filled["number"].to_numpy()] = np.arange(filled.num_rows)
    rows = pa.array(positions, mask=positions < 0)
    for name in ("sha256", "shard", "row", "status"):
        column = pc.coalesce(filled[name].take(rows), listing[name])
        listing = listing.set_column(listing.column_names.index(name), name, column)
    return listing
