"""The pictures of a report: training pictures with their neighbours, contact sheets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.report.curve import bars
from jobs.report.page import Album, Child, amount, link, note, scrolling, tag, together
from jobs.report.root import Root
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.lookup import Sample
from pipeline.neighbors import files

QUERIES = 12
_LOOKED_AT = 300
NEIGHBORS = 10
SHEET = 40
_SHARDS = 6
"""A dataset may have thousands of shards: pictures are taken from so many, spread over it."""
_MOST_READ = 1 << 30
"""Bytes of tars that are read for the pictures of one dataset or database."""



def neighbors(root: Root, dataset: Dataset, label: str, album: Album) -> Child:
    """A dozen pictures of a dataset with their nearest in a database; None where the list is not sealed."""
    name = f"neighbors/{label}"
    if root.manifest(dataset.path(name)) is None:
        return None
    database = Dataset.parse(root.address, label)
    rows, ids, scores = _near_and_far(root, dataset, name)
    near = dict.fromkeys(int(row) for row in ids.T.ravel() if row >= 0)
    read = {one.row: one for one in lookup.samples(database, sorted(_affordable(root, database, list(near))))}
    columns = ids.shape[1]
    head = tag("tr", tag("th", "picture", scope="col"), (tag("th", str(rank), scope="col")
                                                         for rank in range(1, columns + 1)))
    body = []
    for query, found, its in zip(lookup.samples(dataset, rows), ids, scores, strict=True):
        cells = [tag("td", _neighbor(int(row), float(score), read, album)) for row, score in
                 zip(found, its, strict=True)]
        picture = album.picture(query.picture, query.caption, _about(query), side=128)
        body.append(tag("tr", tag("th", picture, query.caption, scope="row"), cells))
    itself = " The picture itself and its copies are left out." if dataset == database else ""
    caption = tag("figcaption", f"{amount(len(rows), 'picture')} of {dataset.label}, each with the pictures of "
                  f"{database.label} nearest to it, nearest first: of some hundred spread over it those with the "
                  f"nearest neighbours, those in the middle, and those with the farthest. Below each stands the cosine "
                  f"similarity of the two vectors; 1 would be the same picture.{itself}")
    table = tag("table", tag("thead", head), tag("tbody", body), class_="neighbors")
    title = tag("h3", f"{dataset.label}: neighbours in {database.label}", root.mark(dataset.path(name)))
    return tag("figure", title, _facts(root.sealed(dataset.path(name))["info"]), scrolling(table), caption)


def _near_and_far(root: Root, dataset: Dataset, name: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Rows of a dataset with the ids and scores of their neighbours: the nearest, those in the middle, the farthest."""
    counts = [record["samples"] for record in root.sealed(dataset.path("shards"))["items"]]
    rows = np.array(_affordable(root, dataset, spread(counts, _LOOKED_AT)), np.int64)
    offsets, items = np.cumsum([0, *counts]), root.sealed(dataset.path(name))["items"]
    shards = np.searchsorted(offsets, rows, side="right") - 1
    found: dict[str, list[np.ndarray]] = {".ids.npy": [], ".scores.npy": []}
    for suffix, parts in found.items():
        entries = files(items, suffix)
        for shard in np.unique(shards):
            kept = np.load(dataset.fetch(name, entries[shard]), mmap_mode="r", allow_pickle=False)
            parts.append(kept[rows[shards == shard] - offsets[shard], :NEIGHBORS])
    ids, scores = (np.concatenate(parts) for parts in found.values())
    order = np.argsort(-scores[:, 0], kind="stable")
    each, middle = QUERIES // 3, len(order) // 2
    chosen = order if len(order) <= QUERIES else np.concatenate(
        [order[:each], order[middle - each // 2:middle - each // 2 + each], order[-each:]])
    return rows[chosen].tolist(), ids[chosen], scores[chosen]


def _facts(info: dict[str, Any]) -> Child:
    """How near all neighbours are, and what the database gives; None of a list that does not tell."""
    if "scores" not in info:
        return None
    recall = "" if info["recall"] is None else f"{info['recall']:.1%} of the exact neighbours are found; "
    return together([tag("p", f"{recall}{amount(info['never_used'], 'row')} of {info['rows']:,} in the database "
                         f"{'is' if info['never_used'] == 1 else 'are'} nobody's neighbour, the most used one is that "
                         f"of {amount(info['most_used'], 'picture')}; {info['missing']:,} places are empty.",
                         class_="facts"),
                     bars(info["scores"], -1, 1, "cosine similarity of all neighbours")])


def _neighbor(row: int, score: float, read: dict[int, Sample], album: Album) -> Child:
    if row < 0:
        return "none"
    one = read.get(row)
    if one is None:
        return album.picture(None, f"row {row}", f"row {row}"), f"{score:.3f}"
    return album.picture(one.picture, one.caption, f"{_about(one)}, score {score:.3f}", side=96), f"{score:.3f}"


def contact_sheet(root: Root, dataset: Dataset, album: Album) -> Child:
    """Pictures spread over a dataset with their captions, and where they come from; None without shards."""
    manifest = root.manifest(dataset.path("shards"))
    if manifest is None:
        return None
    rows = _affordable(root, dataset, spread([record["samples"] for record in manifest["items"]], SHEET))
    cells = [tag("figure", album.picture(one.picture, one.caption, _about(one), side=96),
                 tag("figcaption", one.caption or one.key)) for one in lookup.samples(dataset, rows)]
    count = f"{len(cells)} of {amount(manifest['totals']['samples'], 'picture')}"
    return tag("figure", tag("h3", dataset.label, tag("small", count), root.mark(dataset.path("shards"))),
               tag("div", cells, class_="sheet") if cells else note("No picture of it can be shown."),
               _sources(manifest["info"].get("sources"), dataset))


def _sources(sources: Any, dataset: Dataset) -> Child:
    """Origins and licences; of a dataset named like a style, those of the style."""
    if not sources:
        return None
    if not isinstance(sources, list) or not all(isinstance(one, dict) for one in sources):
        return tag("p", "Sources: ", str(sources), class_="sources")
    if any(one.get("style") == dataset.name for one in sources):
        sources = [one for one in sources if one.get("style") in (dataset.name, None)]
    parts: list[Child] = []
    for one in sources:
        name = " ".join(str(one[key]) for key in ("package", "version") if one.get(key)) or str(one.get("name", ""))
        licence = str(one.get("licence_spdx") or one.get("licence_title") or one.get("licence") or "")
        author = str(one.get("author_name") or "")
        words = [word for word in (link(name, one.get("url")) if name else None,
                                   ["by ", link(author, one.get("author_url"))] if author else None,
                                   link(licence, one.get("licence_url")) if licence else None) if word]
        if not words:
            words = [", ".join(f"{key} {value}" for key, value in one.items())]
        parts += [" · " if parts else "Sources: ", [words[0], *([" ", word] if place == 0 else [", ", word]
                                                                for place, word in enumerate(words[1:]))]]
    return tag("p", parts, class_="sources")


def spread(counts: Sequence[int], wanted: int) -> list[int]:
    """Global rows spread evenly over a few shards that are spread evenly, of shards of so many samples."""
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


def _affordable(root: Root, dataset: Dataset, rows: list[int]) -> list[int]:
    """Those of the rows, in their order, whose shards are not too much to read."""
    items = root.sealed(dataset.path("shards"))["items"]
    offsets = np.cumsum([0, *(record["samples"] for record in items)])
    left, opened, kept = _MOST_READ, set(), []
    for row in rows:
        shard = int(np.searchsorted(offsets, row, side="right")) - 1
        if shard >= len(items):
            raise ValueError(f"{dataset.label} has {offsets[-1]} samples, there is no row {row}")
        cost = 0 if shard in opened else file_of(items[shard], ".tar")["bytes"]
        if cost <= left or not opened:
            left -= cost
            opened.add(shard)
            kept.append(row)
    return kept


def _about(one: Sample) -> str:
    return f"{one.caption}\nkey {one.key}, row {one.row}"
