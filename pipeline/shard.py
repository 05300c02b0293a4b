"""Any corpus -> tars that webdataset reads, a parquet of metadata beside each.

Row i of the parquet's successes is sample i of the tar. Every row of the source ends either as a sample
(or as several patches) or as a parquet row with a status and a reason, in the columns that img2dataset writes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from pipeline import samples, sources, storage
from pipeline.dataset import Dataset, file_of
from pipeline.download import DownloadConfig
from pipeline.media.types import NARROWEST, BadPicture, Format, Resize
from pipeline.sources import Kind, Part, Reading, Row, Source
from pipeline.stages.plan import read_items
from pipeline.stages.records import infos, totals
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output, StageFailed
from pipeline.storage import name_by_content, parquet

# Bytes a pixel that pictures take: img2dataset's table of a million of 256 x 256, and some for the metadata.
_BYTES_A_PIXEL = {"jpg": 0.46, "webp": 0.36, "png": 1.5}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class ShardConfig:
    """What to shard, and how."""

    source: tuple[str, ...] = ()
    """Where the corpus is (local or s3://): a folder of pictures, lists of addresses (parquet, CSV, JSON lines),
    parquet with pictures in it, or tars; folders, files, patterns (*, **, ?), several of them."""
    kind: Kind = "auto"
    """What the source is; auto: by the names of its files."""
    captions: str = ""
    """Captions of a folder: a parquet, CSV or JSONL file with a column file (relative to the source) and a
    column caption; others are carried along. Default: captions.parquet, .csv or .jsonl in the source, or
    a .txt beside each picture."""
    only_captioned: bool = False
    """Take only the pictures that the captions name, in their order; otherwise all, sorted by name."""
    sources: str = ""
    """JSON file on origin and licence of the pictures; its content is kept in the manifest."""
    url_column: str = ""
    """Column of a list with the addresses; default: url, URL, image_url."""
    image_column: str = ""
    """Column with pictures as bytes, or as struct with a field bytes; default: image and the like."""
    caption_column: str = ""
    """Column with the captions; default: caption, TEXT, text."""
    hash_column: str = ""
    """Column with the hash (md5, sha1, sha256, sha512) that the bytes must have; default: sha256 or md5 if there;
    none: do not check."""
    where: str = ""
    """Take only rows of which this is true, as in "punsafe < 0.1 and AESTHETIC_SCORE > 5"."""
    samples_per_shard: int = 1000
    """Rows of the source in one tar."""
    shard_size: str = ""
    """Instead of samples_per_shard: about how large a tar shall be, as in 500M."""
    image_size: int = 256
    """Side in pixels after resizing; which side, `resize` says."""
    resize: Resize = "center_crop"
    """center_crop: a square; keep_ratio: the short side; keep_ratio_largest: the long side; border: a square with
    white around; no: as it is."""
    only_if_bigger: bool = False
    """Never enlarge."""
    format: Format = "jpg"
    """Encoding in the tar; bytes that need no change are passed through."""
    quality: int = 95
    """Quality of jpg and webp."""
    max_pixels: int = 100_000_000
    """Pictures with more pixels than this are refused before they are decoded."""
    min_size: int = 0
    """Pictures with a shorter side than this are left out."""
    max_aspect: float = NARROWEST
    """Pictures with a longer side than so many short ones are left out."""
    patches: int = 0
    """Cut so many squares of image_size at random from each picture, instead of resizing it."""
    patch_side: int = 1200
    """Short side that a picture is brought to before patches are cut."""
    seed: int = 0
    """Of the patches' places."""
    exif: bool = False
    """Keep the EXIF data of each picture in its metadata."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Leave out pictures whose pixels occurred before (exact), or that look like one that did (near)."""
    duplicate_bits: int = 3
    """Bits of 64 in which the perceptual hashes of near duplicates may differ."""
    download: DownloadConfig = field(default_factory=DownloadConfig)

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # one is the usual number
            object.__setattr__(self, "source", (self.source,) if self.source else ())
        if not 1 <= self.quality <= 100:
            raise ValueError(f"shard.quality = {self.quality}: must be within 1 and 100")
        for name in ("samples_per_shard", "image_size", "max_pixels", "patch_side", "max_aspect"):
            if getattr(self, name) < 1:
                raise ValueError(f"shard.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("min_size", "patches"):
            if getattr(self, name) < 0:
                raise ValueError(f"shard.{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.duplicate_bits <= 8:
            raise ValueError(f"shard.duplicate_bits = {self.duplicate_bits}: must be within 0 and 8")
        if self.patches and self.patch_side < self.image_size:
            raise ValueError(f"shard.patch_side = {self.patch_side}: no room for patches of {self.image_size}")
        assert self.rows_per_shard

    @property
    def rows_per_shard(self) -> int:
        """Rows of the source for one tar, by number or by the size wanted."""
        if not self.shard_size:
            return self.samples_per_shard
        if self.resize == "no":
            raise ValueError("shard.shard_size: how large pictures are that keep their size is not known before\n"
                             "hint: --samples-per-shard")
        unit = self.shard_size.upper().removesuffix("B")[-1:]
        unit = unit if unit in _UNITS else ""
        number = self.shard_size.upper().removesuffix("B").removesuffix(unit)
        try:
            wanted = float(number) * _UNITS[unit]
        except ValueError:
            wanted = 0.0
        if not 1 <= wanted < float("inf"):
            raise ValueError(f"shard.shard_size = {self.shard_size!r}: must be a size such as 500M")
        each = self.image_size ** 2 * _BYTES_A_PIXEL[self.format] + 3000
        return max(1, round(wanted / each / max(self.patches, 1)))


# Where the pictures lie is not what they are, and how they are fetched does not change them.
_NOT_IN_THE_RESULT = {"source", "captions", "sources"}
_OF_A_DOWNLOAD = {"max_bytes", "robots", "robots_agent"}


class Shard(Stage):
    """The stage from a corpus to the shards of a dataset.

    `base` is a sealed version whose shards are taken over, and whose failed rows are tried again.
    """

    name = "shard"
    by_choice = frozenset({"too_small", "too_narrow", "robots", "duplicate", samples.FORGOTTEN})
    refused: frozenset[str] = frozenset()  # sha256 of fetched bytes that nothing is made of

    def __init__(self, dataset: Dataset, config: ShardConfig, base: Dataset | None = None,
                 folder: str = "shards") -> None:
        if not config.source:
            raise ValueError("shard needs a source\nhint: --source FOLDER, or a list of addresses, or tars")
        super().__init__(dataset.root, dataset.path(folder), config)
        self.dataset, self.base = dataset, base

    @property
    def command(self) -> str:
        return self.dataset.command("shards").replace("FOLDER", " ".join(self.config.source))

    @cached_property
    def source(self) -> Source:
        """The corpus, looked at when it is needed first."""
        return sources.of(self.config)

    def section(self) -> dict[str, Any]:
        section = {key: value for key, value in super().section().items() if key not in _NOT_IN_THE_RESULT}
        section["download"] = {key: value for key, value in section["download"].items() if key in _OF_A_DOWNLOAD}
        return section

    @cached_property
    def _identity(self) -> str:
        return self.source.identity()

    @property
    def _pictures(self) -> dict[str, Any]:
        return {"path": "", "digest": storage.digest([self._identity, self._origins()])}

    def inputs(self) -> dict[str, dict[str, Any]]:
        named = {"pictures": self._pictures}
        if self.base:
            named["base"] = self.base.identity("shards")
        return named

    def plan(self) -> Iterator[Item]:
        if not self.base:
            types = self.source.types()
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
            differing = ", ".join(sorted(key for key in mine if mine[key] != theirs.get(key)))
            raise ValueError(f"{self.base.label} was sharded with other settings ({differing})\n"
                             f"hint: another version with failed rows tried again must have the same")
        if manifest["inputs"]["pictures"] != self._pictures:
            raise ValueError(f"{self.base.label} was sharded from other pictures than {', '.join(self.config.source)} "
                             f"holds now\nhint: without --retry-failed they make a version of their own: "
                             f"{self.dataset.label}")
        if self.config.duplicates != "keep":
            raise ValueError(f"{self.base.label} is sealed, and duplicates are looked for among all pictures\n"
                             f"hint: --retry-failed before a version is sealed, or --rebuild")
        planned = {item.id: item for item in read_items(self.base.folder("shards"))}
        items = [planned[record["id"]] for record in manifest["items"]]
        for item, record in zip(items, manifest["items"], strict=True):
            kept = {key: value for key, value in item.inputs.items() if key == "round"}
            yield Item(item.id, {"copy": record, "count": record["info"].get("rows", record["samples"])} | kept)
        yield from self._again(items, manifest["items"], self.base.folder("shards"))

    def setup(self) -> None:
        pa.array([None])  # pyarrow looks for pandas at its first list, which takes it half a second

    def process(self, item: Item, scratch: Path) -> Output:
        if "copy" in item.inputs:
            return self._copy(item.inputs["copy"], scratch)
        reading = Reading()
        digits = max(4, len(str(self.config.rows_per_shard - 1)))
        known = storage.read_json(storage.join(self.folder, item.inputs["types"])) if "types" in item.inputs else {}
        packing = samples.Packing(self.config, item.id, digits, scratch, self.beat, known, self.refused)
        files = self.source.fetch == "file"
        read = getattr(self.source, "read", None) if files else _nothing_to_read
        packing.run(self._rows(item.inputs, scratch, reading),
                    None if self.source.fetch == "url" else read,
                    far=files and not storage.is_local(self.config.source[0]))
        ledger = packing.finish()
        # How many samples a damaged tar had, nobody knows: it counts as one thing left out, and is never silent.
        ledger += [Entry(name, reason, detail, kept=reason != "tar_cut") for name, reason, detail in reading.remarks]
        filtered = reading.filtered + item.inputs.get("filtered", 0)
        info = {"rows": packing.rows} | ({"filtered": filtered} if filtered else {})
        if "round" in item.inputs:
            info["retried"] = item.inputs["count"]
        return Output(packing.samples, {f"{item.id}.tar": packing.tar, f"{item.id}.parquet": packing.parquet}, ledger,
                      info, aside={f"{item.id}_stats.json": packing.stats()}, mended=item.inputs.get("mended", {}))

    def _rows(self, inputs: dict[str, Any], scratch: Path, reading: Reading) -> Iterator[Row]:
        """The rows of an item, in order."""
        return self.source.rows(self.folder, inputs, scratch, reading)

    def again(self, items: Sequence[Item], done: Sequence[dict[str, Any]]) -> Iterable[Item]:
        return self._again(items, done, self.folder)

    def _again(self, items: Sequence[Item], done: Sequence[dict[str, Any]], folder: str) -> Iterator[Item]:
        """Items for the rows that failed when they were tried last, in parts of the usual size."""
        if self.source.fetch == "none":
            raise ValueError("the pictures of this source are in it: what failed once would fail again")
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
                    yield self._retry(number, wanted, reasons, last + 1, folder)
                    number, wanted, reasons = number + 1, [], Counter()
        if wanted:
            yield self._retry(number, wanted, reasons, last + 1, folder)

    def _retry(self, number: int, wanted: list[tuple[dict[str, Any], list[int]]], reasons: Counter[str], round_: int,
               folder: str) -> Item:
        part: Part = self.source.again(folder, wanted, number)
        inputs, carries = part.inputs | {"count": reasons.total(), "round": round_,
                                         "mended": dict(sorted(reasons.items()))}, part.carries
        if (types := wanted[0][0].get("types")) is not None:  # of another version it lies elsewhere
            inputs["types"] = types
            carries = (*carries, (types, storage.read_bytes(storage.join(folder, types))))
        return Item(f"{number:06d}", inputs, carries)

    def _failed_rows(self, folder: str, record: dict[str, Any]) -> list[tuple[int, str]]:
        """The rows of a shard that gave nothing against our will, with reasons."""
        entry = file_of(record, ".parquet")
        path = storage.fetch(storage.place(folder, entry["name"]), entry)
        rows = parquet.read(path, columns=["source_row", "status", "error_message"]).to_pylist()
        return [(row["source_row"], reason) for row in rows if row["status"] != samples.SUCCESS
                and (reason := (row["error_message"] or "").split(":")[0]) not in self.by_choice]

    def _copy(self, record: dict[str, Any], scratch: Path) -> Output:
        """A shard of the base as it is."""
        assert self.base
        files = {}
        for entry in record["files"]:
            # Checked: a copy must not seal bytes that have changed since.
            files[entry["name"]] = self.base.fetch("shards", entry, check=True)
        stats = f"{record['id']}_stats.json"
        there = storage.join(self.base.folder("shards"), stats)
        return Output(record["samples"], files, info=record["info"], counted=(record["skipped"], record["noted"]),
                      aside={stats: storage.read_bytes(there)} if storage.exists(there) else {})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        counts, sums = totals(records), Counter[str]()
        for info, times in infos(records):
            sums.update({name: info.get(name, 0) * times for name in ("rows", "filtered", "retried")})
        if not counts["samples"]:
            left_out = counts["skipped"] | {"filtered": sums["filtered"]}
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
            raise StageFailed(f"shard: not one picture of {', '.join(self.config.source)} can be used: {reasons}\n"
                              f"hint: the ledger in {self.folder} names each")
        # A row that was tried again is in two records: it is one row of the source.
        sums["rows"] += sums["filtered"] - sums["retried"]
        return Output(info={"sources": self._origins(), "format": self.config.format,
                            **{name: count for name, count in sums.items() if count}})

    def _origins(self) -> Any:
        return storage.read_json(self.config.sources) if self.config.sources else []


def _nothing_to_read(row: Any) -> bytes:
    raise BadPicture("picture_missing", row.missing)


def accounting(manifest: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Where the rows of a source went: in samples, failed for good, filtered; their sum is the source's.

    `rows` are those of all parquet files of the manifest. A row may have several lines, for it was tried again or
    cut into patches: it is good if one of them is.
    """
    seen, good = set(), set()
    for row in rows:
        seen.add(row["source_row"])
        if row["status"] == samples.SUCCESS:
            good.add(row["source_row"])
    filtered = manifest["info"].get("filtered", 0)
    return {"rows": len(seen) + filtered, "good": len(good), "failed": len(seen) - len(good), "filtered": filtered}

