"""Shards -> the same shards without images that occurred before, anywhere in the corpus.

Which of several stays does not depend on workers or on chance: the one that comes first in the source.
The shards with all images (`unsifted/`) are removed once those without are sealed.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.formats.parquet import read
from pipeline.media import duplicates, tars
from pipeline.shards import metadata
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import clear_finished, clear_folder, hold_folder, replace_plan
from pipeline.stages.types import Entry, Item, Output
from pipeline.storage import name_by_content

DUPLICATE = "duplicate"


class Deduplicate(Shard):
    """The stage that leaves duplicates out of the shards in `whole`."""

    def __init__(self, dataset: Dataset, config: ShardConfig) -> None:
        super().__init__(dataset, config)
        self.whole = Shard(dataset, config, folder="unsifted")

    def plan(self) -> Iterator[Item]:
        manifest = read_manifest(self.whole.folder, self.whole.command)
        done = manifest["items"]
        tables = (self._hashes(record) for record in done)
        hashes, colours, counts, places = [], [], [], []
        for table in tables:
            counts.append(table.num_rows)
            places.append(table.column("source_row").to_numpy())
            if self.config.duplicates == "exact":
                digests = table.column("pixel_sha256").to_pylist()
                hashes.append(np.frombuffer(b"".join(map(bytes.fromhex, digests)), "S32"))
            else:
                hashes.append(table.column("phash").to_numpy().astype(np.uint64))
                flat = pc.list_flatten(table.column("mean_colour")).to_numpy().astype(np.uint8)
                colours.append(flat.reshape(-1, 3))
        # In the order of the source: rows that were tried again stand in the last shards.
        order = np.argsort(np.concatenate(places), kind="stable")
        if self.config.duplicates == "exact":
            first_of_each = duplicates.find_exact(np.concatenate(hashes)[order])
        else:
            first_of_each = duplicates.find_near(np.concatenate(hashes)[order], np.concatenate(colours)[order],
                                    self.config.duplicate_bits)
        first = np.empty(len(order), np.int64)
        first[order] = order[first_of_each]
        offsets = np.cumsum([0, *counts])
        for number, record in enumerate(done):
            low, high = offsets[number], offsets[number + 1]
            removed = np.flatnonzero(first[low:high] != np.arange(low, high))
            item = {"record": record, "count": record["info"]["rows"]}
            if not len(removed):
                yield Item(record["id"], item)
                continue
            kept = first[low:high][removed]
            shard_of = np.searchsorted(offsets, kept, side="right") - 1
            lines = [[int(row), done[int(shard)]["id"], int(other - offsets[shard])]
                     for row, shard, other in zip(removed, shard_of, kept, strict=True)]
            data = json.dumps(lines).encode()
            name = name_by_content(f"rows/duplicates-{record['id']}.json", data)
            yield Item(record["id"], item | {"duplicates": name}, ((name, data),))

    def process(self, item: Item, scratch: Path) -> Output:
        record = item.inputs["record"]
        files = {entry["name"]: storage.fetch(storage.file_below(self.whole.folder, entry["name"]), entry, check=True)
                 for entry in record["files"]}
        stats = storage.read_json(storage.join(self.whole.folder, f"{item.id}_stats.json"))
        name = f"{item.id}_stats.json"
        if "duplicates" not in item.inputs:
            return Output(record["samples"], files, info=record["info"], run_files={name: storage.json_bytes(stats)},
                          counts=(record["skipped"], record["noted"]))
        details = {row: f"of sample {other} of shard {shard}" for row, shard, other in json.loads(
            storage.read_bytes(storage.file_below(self.folder, item.inputs["duplicates"])))}
        tar, parquet = scratch / "shard.tar", scratch / "shard.parquet"
        tars.write(tar, (sample for row, sample in enumerate(tars.read(files[f"{item.id}.tar"])) if row not in details))
        table = read(files[f"{item.id}.parquet"])
        entries, remaining = self._mark_duplicates(table, details, tar, parquet)
        if (old := files.get(f"ledger/{item.id}.jsonl")) is not None:
            entries = [*(Entry(**json.loads(line)) for line in old.read_text().splitlines()), *entries]
        stats["status_dict"] |= {metadata.SUCCESS: remaining, DUPLICATE: stats["successes"] - remaining}
        stats["successes"] = remaining
        return Output(record["samples"] - len(details), {f"{item.id}.tar": tar, f"{item.id}.parquet": parquet}, entries,
                      record["info"], run_files={name: storage.json_bytes(stats)})

    def _mark_duplicates(self, table: pa.Table, details: dict[int, str], tar: Path, parquet: Path,
                         ) -> tuple[list[Entry], int]:
        """Write the metadata of a new tar: the status of duplicates and the positions of images are changed.

        Returns their lines for the ledger, and the number of rows that still have a sample.
        """
        statuses, messages = table.column("status").to_pylist(), table.column("error_message").to_pylist()
        urls, entries = table.column("url").to_pylist(), []
        good = [row for row, status in enumerate(statuses) if status == metadata.SUCCESS]
        for sample, detail in details.items():
            row = good[sample]
            statuses[row], messages[row] = DUPLICATE, f"{DUPLICATE}: {detail}"
            entries.append(Entry(urls[row], DUPLICATE, detail))
        for name, cells in (("status", statuses), ("error_message", messages)):
            table = table.set_column(table.column_names.index(name), name, pa.array(cells, pa.string()))
        pq.write_table(metadata.add_image_positions(table, tars.image_positions(tar)), parquet)
        rows = table.column("source_row").to_pylist()
        return entries, len({row for row, status in zip(rows, statuses, strict=True) if status == metadata.SUCCESS})

    def _hashes(self, record: dict[str, Any]) -> pa.Table:
        """The hashes of a shard's samples."""
        entry = file_of(record, ".parquet")
        names = ["pixel_sha256"] if self.config.duplicates == "exact" else ["phash", "mean_colour"]
        data = storage.fetch(storage.file_below(self.whole.folder, entry["name"]), entry).read_bytes()
        table = read(data, columns=[*names, "status", "source_row"])
        return table.filter(pc.equal(table.column("status"), metadata.SUCCESS))


def deduplicate_shards(sifted: Deduplicate, seal: Callable[[Shard], dict[str, Any]], *,
                       overwrite: bool = False) -> dict[str, Any]:
    """Shard, leave duplicates out, and remove what held them; `seal` brings a stage to its sealed state."""
    if overwrite:
        with hold_folder(sifted.whole, exclusive=True):
            replace_plan(sifted.whole)
        clear_folder(sifted)
    if not storage.exists(storage.join(sifted.folder, "manifest.json")):
        seal(sifted.whole)
    manifest = seal(sifted)
    clear_finished(sifted.whole)
    return manifest

