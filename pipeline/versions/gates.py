"""Conditions for publishing a version, compared with the published one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import labels, metadata
from pipeline.datasets.row_columns import RowSelection
from pipeline.embeddings import clip
from pipeline.embeddings.clip_weights import BUNDLED_MODEL, ClipConfig
from pipeline.embeddings.embed import dataset_encoder
from pipeline.indices.searcher import Searcher
from pipeline.rows.licenses import Licenses, license_columns, license_of
from pipeline.shards.metadata import FORGOTTEN, MISSING, SUCCESS
from pipeline.takedowns import takedown_list
from pipeline.takedowns.hidden_rows import read_hidden_rows
from pipeline.takedowns.takedown_list import Forgotten
from pipeline.versions.config import GatesConfig
from pipeline.versions.listing import read_listing, read_metadata, succeeded_rows

_NEAREST = 10  # overlap@10
_NAMED_CONSUMERS = 3


@dataclass(frozen=True)
class Gate:
    """A number, the limit that it has to keep, and whether it does; "" for a limit: it was not measured, and why."""

    name: str
    value: Any
    limit: str
    passed: bool
    cure: str = field(default="", compare=False)
    """What lets a version pass that fails only this gate: a flag, and how to change it."""

    def document(self) -> dict[str, Any]:
        """The gate as gates.json and release.json have it."""
        return {name: value for name, value in vars(self).items() if name != "cure"}

    def __str__(self) -> str:
        value = f"{self.value:.4f}" if isinstance(self.value, float) else self.value
        return f"{self.name}: {value}{f', {self.limit}' if self.limit else ''}"


def choose_queries(config: GatesConfig, before: dict[str, Any] | None, dataset: Dataset) -> list[str]:
    """The fixed list of queries: that of the file, that of the published release, or captions of this version."""
    if config.queries:
        try:
            text = storage.read_bytes(config.queries).decode()
        except FileNotFoundError:
            raise ValueError(f"there is no file {config.queries}\nhint: --queries names a text file, a query a line"
                             ) from None
        return [line.strip() for line in text.splitlines() if line.strip()]
    if before and before.get("queries"):
        return before["queries"]
    captions: set[str] = set()
    for record in dataset.manifest("shards")["items"]:
        captions |= {row["caption"].strip() for row in metadata(dataset, record, ["caption"]) if row["caption"]}
    chosen = sorted(captions - {""}, key=lambda text: storage.digest(text))  # at random, and always the same
    return sorted(chosen[:config.query_count])


def measure_gates(dataset: Dataset, before: Dataset | None, texts: Sequence[str], clip_config: ClipConfig,
                  config: GatesConfig, pinned: dict[str, dict[str, Any]]) -> list[Gate]:
    """Every gate of a version, against the published one (None: there is none), with `texts` as queries.

    `pinned` are the encoders that consumers of the database are bound to, by the consumers' names.
    """
    listing = read_listing(dataset, ["name", "sha256", "status"])
    old = read_listing(before, ["name", "sha256", "status"]) if before else listing.slice(0, 0)
    gates = [_recall(dataset, config), _failed(listing, old, config)]
    if config.only_licenses:
        gates.append(_licenses(dataset, config.only_licenses))
    if config.gate_where:
        gates.append(_share(dataset, config))
    if before:
        gates.append(_lost(listing, old, takedown_list.read_takedowns(dataset.root), config))
    encoder = dataset_encoder(dataset)
    others = sorted(name for name, description in pinned.items() if description != encoder)
    gates.append(_encoder(encoder, pinned, others))
    if before and not others and texts and dataset_encoder(before) == encoder:
        value = measure_overlap(dataset, before, texts, clip_config)
        gates.append(Gate("overlap@10", value, f"at least {config.min_overlap}", value >= config.min_overlap,
                          "lower --min-overlap"))
    elif before and not texts:
        gates.append(Gate("overlap@10", "not measured: there are no captions and no --queries", "", True))
    return gates


def _encoder(encoder: dict[str, Any], pinned: dict[str, dict[str, Any]], others: Sequence[str]) -> Gate:
    """The encoder of a version, against those of its consumers. `others`: the consumers that have another one."""
    name = f"{encoder['model']} {encoder.get('pretrained', '')}".strip()
    if encoder["model"] == BUNDLED_MODEL:
        name += " (the bundled encoder, for the demo)"
    if not pinned:
        return Gate("encoder", f"{name}; no run or version uses this database yet", "", True)
    consumers = sorted(pinned)
    named = ", ".join(consumers[:_NAMED_CONSUMERS])
    if more := len(consumers[_NAMED_CONSUMERS:]):
        named += f" and {more} more"
    value = f"another than that of {', '.join(others)}" if others else name
    return Gate("encoder", value, f"that of {named}", not others, "add --allow-encoder")


def _recall(dataset: Dataset, config: GatesConfig) -> Gate:
    value = recall(dataset)
    if value is None:
        return Gate("recall@10", "not measured: too few images", "", True)
    return Gate("recall@10", value, f"at least {config.min_recall}", value >= config.min_recall, "lower --min-recall")


def recall(dataset: Dataset) -> float | None:
    """recall@10 of a dataset's index, None where there were too few rows to measure it."""
    return dataset.manifest("index")["info"].get("recall_at_10")


def _failed(listing: pa.Table, old: pa.Table, config: GatesConfig) -> Gate:
    """The share of rows without a sample.

    A row of the captions whose image is not in the folder counts only if the published version does not know it.
    An image of that version was removed. A row that it missed too was accepted.
    """
    good = pc.is_in(listing["status"], value_set=pa.array([SUCCESS, FORGOTTEN], pa.large_string()))
    known = old["name"].filter(pc.is_in(old["status"], value_set=pa.array([SUCCESS, MISSING], pa.large_string())))
    removed = pc.and_(pc.equal(listing["status"], MISSING), pc.is_in(listing["name"], value_set=known))
    value = (listing.num_rows - _count(pc.or_(good, removed))) / max(listing.num_rows, 1)
    return Gate("failed", value, f"at most {config.max_failed}", value <= config.max_failed, "raise --max-failed")


def _lost(listing: pa.Table, old: pa.Table, forgotten: Forgotten, config: GatesConfig) -> Gate:
    """The share of images that are gone, by content; forgotten images are no loss."""
    now = listing["sha256"].filter(pc.equal(listing["status"], SUCCESS))
    old = old.filter(pc.equal(old["status"], SUCCESS))
    wanted = old["sha256"].filter(pa.array(~forgotten.mask(old.rename_columns(["url", "sha256", "status"]))))
    lost = len(wanted) - _count(pc.is_in(wanted, value_set=now))
    value = lost / max(len(wanted), 1)
    return Gate("lost", value, f"at most {config.max_lost}", value <= config.max_lost, "raise --max-lost")


def _licenses(dataset: Dataset, licenses: str) -> Gate:
    others = count_other_licenses(dataset, Licenses(licenses))
    named = ", ".join(f"{count} {name or 'unknown'}" for name, count in others.most_common())
    return Gate("other licenses", named or 0, f"none but {licenses}", not others, "change --only-licenses")


def count_other_licenses(dataset: Dataset, licenses: Licenses) -> Counter[str]:
    """How many samples that are not hidden have a license that is not allowed, by SPDX identifier; "": unknown."""
    hidden, offset, others = read_hidden_rows(dataset), 0, Counter[str]()
    for record in dataset.manifest("shards")["items"]:
        table = succeeded_rows(read_metadata(dataset, record))
        visible = np.ones(table.num_rows, bool)
        visible[hidden[(hidden >= offset) & (hidden < offset + table.num_rows)] - offset] = False
        columns = license_columns(table.column_names)
        rows = table.select(columns).append_column("", pa.array(visible)).filter(pa.array(visible))
        for row in rows.group_by(rows.column_names).aggregate([([], "count_all")]).to_pylist():
            if not licenses.allow(spdx := license_of(row).spdx):
                others[spdx] += row["count_all"]
        offset += table.num_rows
    return others


def _share(dataset: Dataset, config: GatesConfig) -> Gate:
    """The share of rows that the row filter of the gate is true for, of those that are not hidden."""
    mask = np.delete(RowSelection(dataset, config.gate_where).mask(), read_hidden_rows(dataset))
    value = float(mask.mean()) if len(mask) else 0.0
    return Gate(f"share where {config.gate_where}", value, f"at least {config.min_share}", value >= config.min_share,
                "lower --min-share")


def _count(truths: pa.ChunkedArray) -> int:
    return pc.sum(truths).as_py() or 0


def measure_overlap(dataset: Dataset, before: Dataset, texts: Sequence[str], clip_config: ClipConfig) -> float:
    """overlap@10 of two versions: the mean share of the ten nearest images of each text that is the same."""
    vectors = clip.load_encoder(clip_config).texts(list(texts))
    labels_of_versions = []
    for version in (dataset, before):
        rows = Searcher(version).search(vectors, _NEAREST)[0]
        names = _labels(version, rows)
        labels_of_versions.append([set(line[row >= 0]) for line, row in zip(names, rows, strict=True)])
    shares = [len(new & old) / max(len(old), 1) for new, old in zip(*labels_of_versions, strict=True)]
    return float(np.mean(shares))


def _labels(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """A number for the image of each row that is the same in all versions. 0 for no row."""
    out, offset = np.zeros(rows.shape, np.uint64), 0
    for record in dataset.manifest("shards")["items"]:
        here = (rows >= offset) & (rows < offset + record["samples"])
        if here.any():
            out[here] = labels(dataset, record)[rows[here] - offset, 1]
        offset += record["samples"]
    return out
