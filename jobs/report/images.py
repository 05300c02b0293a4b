"""The images of a report: images of a dataset with their neighbors, and contact sheets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from jobs.report.charts import histogram
from jobs.report.collect import RootContents
from jobs.report.render import Album, InlineImage, render
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.lookup import Sample
from pipeline.formats.arrays import map_array
from pipeline.neighbors.files import neighbor_files, why_recall_is_unknown

QUERIES = 12
NEIGHBORS = 10
SHEET = 40
_CANDIDATES = 300
"""Rows of which the nearest, the middle and the farthest are shown."""
_SHARDS = 6
"""A dataset may have thousands of shards. Images come from at most this many, spread over the dataset."""
_MOST_READ_BYTES = 1 << 30
"""Bytes of tars that are read for the images of one dataset or database."""


def neighbors(root: RootContents, dataset: Dataset, label: str, album: Album) -> Markup | None:
    """A dozen images of a dataset with their nearest images in a database. None if the list is not sealed."""
    name = f"neighbors/{label}"
    if root.manifest(dataset.path(name)) is None:
        return None
    database = Dataset.parse(root.address, label)
    candidates = _affordable(root, dataset, _visible_rows(root, dataset, _CANDIDATES))
    if not candidates:
        return None
    rows, ids, scores = _near_and_far(root, dataset, name, np.array(candidates, np.int64))
    ids[np.isin(ids, root.hidden_rows(database))] = -1  # the lists may be older than these
    wanted = dict.fromkeys(int(row) for row in ids.T.ravel() if row >= 0)
    samples = {sample.row: sample for sample in lookup.samples(
        database, sorted(_affordable(root, database, list(wanted))))}
    queries = [{"image": _thumbnail(query, album), "caption": query.name,
                "neighbors": [_neighbor(int(row), float(score), samples, album)
                              for row, score in zip(row_ids, row_scores, strict=True)]}
               for query, row_ids, row_scores in zip(lookup.samples(dataset, rows), ids, scores, strict=True)]
    info = root.sealed(dataset.path(name))["info"]
    # Lists of older versions have no distribution of scores.
    chart = histogram(info["scores"], -1, 1, "cosine similarity of all neighbors") if "scores" in info else None
    return render("neighbors.html", dataset=dataset.label, database=database.label, info=info, chart=chart,
                  album=album,
                  unknown=why_recall_is_unknown(info) if "scores" in info else "",
                  changed=root.changed_inputs(dataset.path(name)), queries=queries, columns=ids.shape[1])


def _near_and_far(root: RootContents, dataset: Dataset, name: str, rows: np.ndarray
                  ) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Some of the rows, with ids and scores of their neighbors: the nearest, those in the middle, the farthest."""
    counts = [record["samples"] for record in root.sealed(dataset.path("shards"))["items"]]
    offsets, items = np.cumsum([0, *counts]), root.sealed(dataset.path(name))["items"]
    shards = np.searchsorted(offsets, rows, side="right") - 1
    arrays: dict[str, list[np.ndarray]] = {".ids.npy": [], ".scores.npy": []}
    for suffix, parts in arrays.items():
        entries = neighbor_files(items, suffix)
        for shard in np.unique(shards):
            loaded = map_array(dataset.fetch(name, entries[shard]))
            parts.append(loaded[rows[shards == shard] - offsets[shard], :NEIGHBORS])
    ids, scores = (np.concatenate(parts) for parts in arrays.values())
    order = np.argsort(-scores[:, 0], kind="stable")
    each, middle = QUERIES // 3, len(order) // 2
    chosen = order if len(order) <= QUERIES else np.concatenate(
        [order[:each], order[middle - each // 2:middle - each // 2 + each], order[-each:]])
    return rows[chosen].tolist(), ids[chosen], scores[chosen]


def _neighbor(row: int, score: float, samples: dict[int, Sample], album: Album) -> tuple[InlineImage, float] | None:
    """The image of a neighbor and its score. None for an empty place of the list."""
    if row < 0:
        return None
    sample = samples.get(row)
    if sample is None:
        return album.image(None, f"row {row}", f"row {row}"), score
    return _thumbnail(sample, album, f", score {score:.3f}"), score


def contact_sheet(root: RootContents, dataset: Dataset, album: Album) -> Markup | None:
    """Images spread over a dataset with their captions and sources. None without shards."""
    manifest = root.manifest(dataset.path("shards"))
    if manifest is None:
        return None
    rows = _affordable(root, dataset, _visible_rows(root, dataset, SHEET))
    cells = [(_thumbnail(sample, album), sample.name) for sample in lookup.samples(dataset, rows)]
    total = manifest["totals"]["samples"] - len(root.hidden_rows(dataset))
    return render("contact_sheet.html", dataset=dataset.label, cells=cells, total=total,
                  changed=root.changed_inputs(dataset.path("shards")),
                  sources=_sources(manifest["info"].get("sources"), dataset))


def _sources(sources: Any, dataset: Dataset) -> list[dict[str, Any]]:
    """Name, author and license of each source. A dataset named like a style has the sources of that style only."""
    if not sources:
        return []
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return [{"text": str(sources)}]
    if any(source.get("style") == dataset.name for source in sources):
        sources = [source for source in sources if source.get("style") in (dataset.name, None)]
    unique: list[dict[str, Any]] = []
    for shown in map(_source, sources):
        if shown not in unique:
            unique.append(shown)
    return unique


def _source(source: dict[str, Any]) -> dict[str, Any]:
    package = " ".join(str(source[key]) for key in ("package", "version") if source.get(key))
    name = package or str(source.get("name", ""))
    license_name = str(source.get("licence_spdx") or source.get("licence_title") or source.get("licence") or "")
    author = str(source.get("author_name") or "")
    if not (name or license_name or author):
        return {"text": ", ".join(f"{key} {value}" for key, value in source.items())}
    return {"name": name, "url": source.get("url"), "author": author, "author_url": source.get("author_url"),
            "license": license_name, "license_url": source.get("licence_url")}


def _visible_rows(root: RootContents, dataset: Dataset, wanted: int) -> list[int]:
    """Rows spread over a dataset, of those that may be shown."""
    counts = [record["samples"] for record in root.sealed(dataset.path("shards"))["items"]]
    hidden = root.hidden_rows(dataset)
    if not len(hidden):
        return spread_rows(counts, wanted)
    ends = np.cumsum(counts)
    visible = np.setdiff1d(np.arange(ends[-1]), hidden, assume_unique=True)
    visible_counts = np.diff(np.searchsorted(visible, ends), prepend=0)
    return visible[spread_rows(visible_counts.tolist(), wanted)].tolist() if len(visible) else []


def spread_rows(counts: Sequence[int], wanted: int) -> list[int]:
    """Global rows spread evenly over a few shards, which are spread evenly. `counts` has the samples of each shard."""
    full = [shard for shard, count in enumerate(counts) if count]
    chosen = [full[(2 * place + 1) * len(full) // (2 * min(_SHARDS, len(full)))]
              for place in range(min(_SHARDS, len(full)))]
    offsets = np.cumsum([0, *counts])
    total = sum(counts[shard] for shard in chosen)
    rows, passed = [], 0
    positions = [(2 * place + 1) * total // (2 * min(wanted, total)) for place in range(min(wanted, total))]
    for shard in chosen:
        rows += [int(offsets[shard]) + position - passed for position in positions
                 if passed <= position < passed + counts[shard]]
        passed += counts[shard]
    return rows


def _affordable(root: RootContents, dataset: Dataset, rows: list[int]) -> list[int]:
    """The rows whose shards fit into the bytes that may be read, in the same order."""
    items = root.sealed(dataset.path("shards"))["items"]
    offsets = np.cumsum([0, *(record["samples"] for record in items)])
    budget, chosen = _MOST_READ_BYTES, []
    shards: set[int] = set()
    for row in rows:
        shard = int(np.searchsorted(offsets, row, side="right")) - 1
        if shard >= len(items):
            raise ValueError(f"{dataset.label} has {offsets[-1]} samples, there is no row {row}")
        cost = 0 if shard in shards else file_of(items[shard], ".tar")["bytes"]
        if cost <= budget or not shards:
            budget -= cost
            shards.add(shard)
            chosen.append(row)
    return chosen


def _thumbnail(sample: Sample, album: Album, more: str = "") -> InlineImage:
    title = f"{sample.name}\nkey {sample.key}, row {sample.row}{more}"
    return album.thumbnail(sample.picture, sample.name, title)
