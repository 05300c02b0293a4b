"""The stage `shard`: from a corpus to the shards of a dataset."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import uvloop

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.downloads.host_limits import ProcessLimits
from pipeline.formats import parquet
from pipeline.media.types import BadImage
from pipeline.rows.rows import LICENSE, NO_LICENSE, Part, ReadReport, Row
from pipeline.shards import metadata
from pipeline.shards.packer import ShardPacker
from pipeline.sources.config import LATER_SETTINGS, ShardConfig
from pipeline.sources.detect import open_source
from pipeline.sources.list_columns import FAILED_BEFORE
from pipeline.sources.source import Source
from pipeline.stages.plan import read_items
from pipeline.stages.records import infos, totals
from pipeline.stages.stage import Stage
from pipeline.stages.types import NO_ROW_REASONS, Entry, Item, Output, StageFailed
from pipeline.storage import name_by_content
from pipeline.takedowns import takedowns

# The location of the images and the way of fetching them do not change the result.
_IGNORED_SETTINGS = {"source", "captions", "sources"}
_DOWNLOAD_SETTINGS = {"max_bytes", "robots", "robots_agent"}
_LATER_DOWNLOAD_SETTINGS = {"robots_txt": False}  # with their defaults, which sections do not have


class Shard(Stage):
    """The stage from a corpus to the shards of a dataset.

    `base` is a sealed version whose shards are taken over, and whose failed rows are tried again.
    """

    name = "shard"
    by_choice = frozenset({FAILED_BEFORE, "too_small", "too_narrow", "robots", "duplicate", metadata.FORGOTTEN})
    refused: frozenset[str] = frozenset()  # sha256 of fetched bytes that nothing is made of

    def __init__(self, dataset: Dataset, config: ShardConfig, base: Dataset | None = None,
                 folder: str = "shards") -> None:
        if not config.source:
            raise ValueError("shard needs a source\nhint: --source FOLDER, or a list of URLs, or tars")
        super().__init__(dataset.root, dataset.path(folder), config)
        self.dataset, self.base = dataset, base

    @property
    def command(self) -> str:
        return self.dataset.command("shards").replace("FOLDER", " ".join(self.config.source))

    @property
    def downloads(self) -> bool:
        return self.source.fetch == "url"

    @cached_property
    def source(self) -> Source:
        """The corpus, looked at when it is needed first."""
        return open_source(self.config)

    def section(self) -> dict[str, Any]:
        section = {key: value for key, value in super().section().items()
                   if key not in _IGNORED_SETTINGS and (key, value) not in LATER_SETTINGS.items()}
        section["download"] = {key: value for key, value in section["download"].items() if key in _DOWNLOAD_SETTINGS
                               or value != _LATER_DOWNLOAD_SETTINGS.get(key, value)}
        return section

    def summary(self) -> dict[str, Any]:
        return self.source.summary()

    @cached_property
    def _identity(self) -> str:
        return self.source.identity()

    @property
    def _source_identity(self) -> dict[str, Any]:
        return {"path": "", "digest": storage.digest([self._identity, self._origins()])}

    def inputs(self) -> dict[str, dict[str, Any]]:
        named = {"pictures": self._source_identity}
        if self.base:
            named["base"] = self.base.identity("shards")
        return named

    def plan(self) -> Iterator[Item]:
        if not self.base:
            types = self.source.column_types()
            data = storage.json_bytes(types)
            name = name_by_content("rows/types.json", data)
            more, carried = ({"types": name}, ((name, data),)) if types else ({}, ())
            for number, part in enumerate(self.source.parts()):
                yield Item(f"{number:06d}", part.inputs | more, (*part.carries, *carried))
                carried = ()
            return
        manifest = self.base.manifest("shards")
        mine, theirs = self.section(), manifest["section"]
        if mine != theirs:
            differing = ", ".join(sorted(key for key in mine.keys() | theirs if mine.get(key) != theirs.get(key)))
            raise ValueError(f"{self.base.label} was sharded with other settings ({differing})\n"
                             f"hint: another version with failed rows tried again must have the same")
        if manifest["inputs"]["pictures"] != self._source_identity:
            raise ValueError(f"{self.base.label} was sharded from other images than {', '.join(self.config.source)} "
                             f"holds now\nhint: without --retry-failed they make a new version: "
                             f"{self.dataset.label}")
        if self.config.duplicates != "keep":
            raise ValueError(f"{self.base.label} is sealed, and duplicates are compared among all images\n"
                             f"hint: --retry-failed before a version is sealed, or --overwrite")
        planned = {item.id: item for item in read_items(self.base.folder("shards"))}
        items = [planned[record["id"]] for record in manifest["items"]]
        for item, record in zip(items, manifest["items"], strict=True):
            kept = {key: value for key, value in item.inputs.items() if key == "round"}
            yield Item(item.id, {"copy": record, "count": record["info"].get("rows", record["samples"])} | kept)
        yield from self._retry_items(items, manifest["items"], self.base.folder("shards"))

    def setup(self) -> None:
        pa.array([None])  # pyarrow looks for pandas at its first list, which takes it half a second

    def process(self, item: Item, scratch: Path) -> Output:
        if "copy" in item.inputs:
            return self._copy_shard(item.inputs["copy"], scratch)
        reading = ReadReport()
        digits = max(4, len(str(self.config.rows_per_shard - 1)))
        types = item.inputs.get("types")
        known = storage.read_json(storage.file_below(self.folder, types)) if types else {}
        if self.host_limits is None:
            self.host_limits = ProcessLimits()
        alone_s = self.host_limits.alone_s
        packer = ShardPacker(self.config, item.id, digits, scratch, self.report_progress, known, self.refused,
                             self.host_limits)
        files = self.source.fetch == "file"
        read = getattr(self.source, "read", None) if files else _raise_missing
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(packer.pack(self._rows(item.inputs, scratch, reading),
                                 None if self.source.fetch == "url" else read,
                                 far=files and not storage.is_local(self.config.source[0])))
        ledger = packer.finish()
        ledger += [Entry(name, reason, detail, kept=reason not in NO_ROW_REASONS)
                   for name, reason, detail in reading.remarks]
        filtered = reading.filtered + item.inputs.get("filtered", 0)
        info = {"rows": packer.rows} | ({"filtered": filtered} if filtered else {}) | reading.filtered_by
        if "round" in item.inputs:
            info["retried"] = item.inputs["count"]
        return Output(packer.samples, {f"{item.id}.tar": packer.tar, f"{item.id}.parquet": packer.parquet}, ledger,
                      info, run_files={f"{item.id}_stats.json": packer.img2dataset_stats()},
                      earlier_skipped=item.inputs.get("mended", {}), times={"own_share_of_limits": alone_s}
                      if (alone_s := self.host_limits.alone_s - alone_s) else {})

    def _rows(self, inputs: dict[str, Any], scratch: Path, reading: ReadReport) -> Iterator[Row]:
        """The rows of an item, in order."""
        return self.source.allowed_rows(self.folder, inputs, scratch, reading)

    def items_to_retry(self, items: Sequence[Item], done: Sequence[dict[str, Any]]) -> Iterable[Item]:
        return self._retry_items(items, done, self.folder)

    def _retry_items(self, items: Sequence[Item], done: Sequence[dict[str, Any]], folder: str) -> Iterator[Item]:
        """Items for the rows that failed when they were tried last, in parts of the usual size."""
        if self.source.fetch == "none":
            raise ValueError("the source holds its images itself: failed rows would fail again")
        last = max((item.inputs.get("round", 0) for item in items), default=0)
        number, wanted = len(items), []
        reasons: Counter[str] = Counter()
        for item, record in zip(items, done, strict=True):
            if item.inputs.get("round", 0) != last or not (
                    "mended" in item.inputs or record["skipped"].keys() - self.by_choice):
                continue
            failed = self._failed_rows(folder, record)
            while failed:
                room = self.config.rows_per_shard - reasons.total()
                wanted.append((item.inputs, [row for row, _ in failed[:room]]))
                reasons.update(reason for _, reason in failed[:room])
                failed = failed[room:]
                if reasons.total() == self.config.rows_per_shard:
                    yield self._retry_item(number, wanted, reasons, last + 1, folder)
                    number, wanted, reasons = number + 1, [], Counter()
        if wanted:
            yield self._retry_item(number, wanted, reasons, last + 1, folder)

    def _retry_item(self, number: int, wanted: list[tuple[dict[str, Any], list[int]]], reasons: Counter[str],
                    round_number: int, folder: str) -> Item:
        part: Part = self.source.retry_part(folder, wanted, number)
        inputs, carries = part.inputs | {"count": reasons.total(), "round": round_number,
                                         "mended": dict(sorted(reasons.items()))}, part.carries
        if (types := wanted[0][0].get("types")) is not None:  # of another version it lies elsewhere
            inputs["types"] = types
            carries = (*carries, (types, storage.read_bytes(storage.join(folder, types))))
        return Item(f"{number:06d}", inputs, carries)

    def _failed_rows(self, folder: str, record: dict[str, Any]) -> list[tuple[int, str]]:
        """The rows of a shard that gave nothing against our will, with reasons."""
        entry = file_of(record, ".parquet")
        path = storage.fetch(storage.manifest_file_url(folder, entry["name"]), entry)
        rows = parquet.read(path, columns=["source_row", "status", "error_message"]).to_pylist()
        return [(row["source_row"], reason) for row in rows if row["status"] != metadata.SUCCESS
                and (reason := (row["error_message"] or "").split(":")[0]) not in self.by_choice]

    def _copy_shard(self, record: dict[str, Any], scratch: Path) -> Output:
        """A shard of the base as it is."""
        assert self.base
        files = {}
        for entry in record["files"]:
            # Checked: a copy must not seal bytes that have changed since.
            files[entry["name"]] = self.base.fetch("shards", entry, check=True)
        stats = f"{record['id']}_stats.json"
        there = storage.join(self.base.folder("shards"), stats)
        return Output(record["samples"], files, info=record["info"], counts=(record["skipped"], record["noted"]),
                      run_files={stats: storage.read_bytes(there)} if storage.exists(there) else {})

    def after_seal(self) -> None:
        if self.folder == self.dataset.folder("shards"):
            takedowns.apply_list_to_new(self.dataset)

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        counts, sums = totals(records), Counter[str]()
        for info, times in infos(records):
            sums.update({name: info.get(name, 0) * times for name in ("rows", "filtered", LICENSE, NO_LICENSE,
                                                                      "retried")})
        if not counts["samples"]:
            by_license = {name: sums[name] for name in (LICENSE, NO_LICENSE)}
            left_out = counts["skipped"] | {"filtered": sums["filtered"] - sum(by_license.values())} | by_license
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "it is empty"
            hint = (f"{storage.join(self.folder, 'ledger')} names each" if counts["skipped"] else
                    "docs/guides/ingest/credits.md has the known columns and texts of licenses" if sums[NO_LICENSE] else
                    "--where and --licenses choose rows")
            raise StageFailed(f"shard: no image of {', '.join(self.config.source)} can be used: {reasons}\n"
                              f"hint: {hint}")
        # A row that was tried again is in two records: it is one row of the source.
        sums["rows"] += sums["filtered"] - sums["retried"]
        return Output(info={"sources": self._origins(), "format": self.config.format, **self.source.left_out(),
                            **{name: count for name, count in sums.items() if count}})

    def _origins(self) -> Any:
        try:
            return storage.read_json(self.config.sources) if self.config.sources else []
        except storage.DamagedFile as error:  # a file of the user
            raise ValueError(f"{storage.first_line(error)}\nhint: --sources names a JSON file") from None


def _raise_missing(row: Any) -> bytes:
    raise BadImage(row.reason or "picture_missing", row.missing)


def count_rows(manifest: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Counts of rows that became samples, that failed, and that were filtered. Their sum is the rows of the source.

    `rows` come from all parquet files of the manifest. A row that was retried or cut into patches has several lines.
    It is good if one of them is good.
    """
    seen, good = set(), set()
    for row in rows:
        seen.add(row["source_row"])
        if row["status"] == metadata.SUCCESS:
            good.add(row["source_row"])
    filtered = manifest["info"].get("filtered", 0)
    return {"rows": len(seen) + filtered, "good": len(good), "failed": len(seen) - len(good), "filtered": filtered}
