"""`show`: all data about one row of a dataset, and its image as a file."""

import difflib
import io
import logging
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.publishing.credits import credit_row
from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes, format_count
from pipeline import storage
from pipeline.datasets import lookup
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.find_row import DatasetRow, find_row, ledger_entries, names_of_file, row_scores
from pipeline.datasets.metadata import metadata
from pipeline.formats.arrays import map_array
from pipeline.neighbors.files import neighbor_files
from pipeline.releases import published
from pipeline.rows.rows import json_cells
from pipeline.takedowns.hidden_rows import read_hidden_rows
from pipeline.takedowns.takedowns import read_forgotten_rows

_log = logging.getLogger(__name__)
_SHOWN_NAMES = 5
"""Names in an error about several rows."""
_NEIGHBORS = 5
"""Neighbors in the text for people. JSON has all of them."""


def show_row(root: str, text: str, dataset: str = "", out: str = "") -> dict[str, Any]:
    """All that is known of a row, as a JSON document. Its image goes to `out`, or to a folder of this user.

    `text`: its key, its name in the source or the last part of this name, or DATASET/ and one of these.
    `dataset`: NAME or NAME@VERSION to look into. ValueError if no dataset has the row, or if several rows fit.
    """
    datasets, text = _choose_datasets(root, text, dataset)
    rows = [row for candidate in datasets if (row := find_row(candidate, text)) is not None] or [
        row for row in [_find_by_file_name(datasets, text)] if row]
    if not rows:
        return _only_in_ledgers(root, datasets, text)
    if len(rows) > 1:
        names = ", ".join(row.dataset.label for row in rows)
        raise ValueError(f"{text} is in {len(rows)} datasets: {names}\n"
                         f"hint: python -m jobs show {shlex.quote(text)} --dataset {rows[0].dataset.label}")
    return _describe(rows[0], out)


def _find_by_file_name(datasets: list[Dataset], text: str) -> DatasetRow | None:
    """The row whose name in the source ends with the file name `text`; ValueError if several have it."""
    found = [(dataset, name) for dataset in datasets for name in names_of_file(dataset, text)]
    if len(found) > 1:
        shown = [f"{dataset.label}/{name}" for dataset, name in found]
        raise ValueError(f"{len(found)} rows have the file name {text}: {', '.join(shown[:_SHOWN_NAMES])}"
                         f"{', ...' if len(found) > _SHOWN_NAMES else ''}\n"
                         f"hint: python -m jobs show {shlex.quote(shown[0])}")
    return find_row(*found[0]) if found else None


def _choose_datasets(root: str, text: str, dataset: str) -> tuple[list[Dataset], str]:
    """The datasets to look into, and the key. A dataset is its published version, or v1 without one."""
    names = storage.list_folders(storage.join(storage.normalize(root), "datasets"))
    name, _, key = text.partition("/")
    if not dataset and key and name.partition("@")[0] in names:
        dataset, text = name, key
    if dataset:
        return [published.open_dataset(root, dataset)], text
    return list(_readable(root, names)), text


def _readable(root: str, names: list[str]) -> Iterator[Dataset]:
    for name in names:
        try:
            dataset = published.open_dataset(root, name)
            if dataset.is_sealed("shards"):
                yield dataset
        except ValueError as error:
            _log.warning("show: %s is skipped: %s", name, storage.first_line(error))


def _only_in_ledgers(root: str, datasets: list[Dataset], text: str) -> dict[str, Any]:
    """A row without metadata: a ledger may name it. ValueError if none does."""
    for dataset in datasets:
        if entries := ledger_entries(dataset, {text}):
            return {"dataset": dataset.label, "version": dataset.version, "key": text, "row": None, "ledger": entries}
    where = ", ".join(dataset.label for dataset in datasets) or "no sealed dataset"
    first, _, key = text.partition("/")
    names = [dataset.name for dataset in datasets]
    close = difflib.get_close_matches(first, names, n=1) if key and first not in names else []
    hint = ("python -m jobs ls" if not datasets else f"did you mean the dataset {close[0]}?" if close else
            f"python -m jobs search {first if first in names else names[0]} WORDS, which shows keys and names")
    raise ValueError(f"{storage.normalize(root)} has no row {text}: expected a key or a name in the source, looked in "
                     f"{where}\nhint: {hint}")


def _describe(row: DatasetRow, out: str) -> dict[str, Any]:
    dataset, columns = row.dataset, row.columns
    sources = dataset.manifest("shards")["info"].get("sources") or []
    document = {
        "dataset": dataset.label, "version": dataset.version, "published": bool(dataset.trusted),
        "key": columns["key"], "row": row.row, "shard": row.shard_id, "position": row.position,
        "caption": columns.get("caption") or "", "name": columns.get("url") or "",
        "credit": credit_row(columns | {"url": columns.get("url") or "", "sources": sources}, dataset.label),
        "ledger": ledger_entries(dataset, {columns["key"], columns.get("url") or columns["key"]}, row.shard_id),
        "columns": json_cells(columns)}
    if row.row is not None:
        document |= {"hidden": _contains(read_hidden_rows(dataset), row.row),
                     "forgotten": _contains(read_forgotten_rows(dataset), row.row),
                     "image": _write_image(row, out), "scores": row_scores(row), "neighbors": _neighbors(row)}
    return document


def _contains(rows: np.ndarray, row: int) -> bool:
    return bool(np.isin(row, rows))


def _write_image(row: DatasetRow, out: str) -> dict[str, Any]:
    """Write the stored bytes of the image to a file; its path, format and size."""
    assert row.row is not None
    data = lookup.samples(row.dataset, [row.row])[0].picture
    with Image.open(io.BytesIO(data)) as image:
        kind, size = (image.format or "image").lower(), image.size
    if out:
        path = Path(out).expanduser()
    else:
        folder = storage.make_private_folder(Path(tempfile.gettempdir()) / f"rdm-shown-{os.geteuid()}", "TMPDIR")
        path = folder / f"{row.dataset.name}-{row.dataset.version}-{row.row}.{'jpg' if kind == 'jpeg' else kind}"
    path.write_bytes(data)
    return {"path": str(path), "format": kind, "width": size[0], "height": size[1], "bytes": len(data)}


def _neighbors(row: DatasetRow) -> dict[str, list[dict[str, Any]]]:
    """The neighbors of a sample in each database for which the stage is sealed, nearest first, without hidden rows."""
    result, dataset = {}, row.dataset
    for label in storage.list_folders(dataset.folder("neighbors")):
        name = f"neighbors/{label}"
        if dataset.is_sealed(name):
            items = dataset.manifest(name)["items"]
            ids, scores = (dataset.open_file(name, neighbor_files(items, suffix)[row.shard], map_array)[row.position]
                           for suffix in (".ids.npy", ".scores.npy"))
            database = _open_database(dataset.root, label)
            hidden = read_hidden_rows(database) if database else ()
            nearest = [(int(number), round(float(score), 4)) for number, score in zip(ids, scores, strict=True)
                       if number >= 0 and number not in hidden]
            keys = _keys(database, [number for number, _ in nearest]) if database else {}
            result[label] = [{"row": number, "score": score, **keys.get(number, {})} for number, score in nearest]
    return result


def _open_database(root: str, label: str) -> Dataset | None:
    """The database of a neighbor list; None if it was removed."""
    return published.open_label(root, label) if Dataset.parse(root, label).is_sealed("shards") else None


def _keys(database: Dataset, rows: list[int]) -> dict[int, dict[str, str]]:
    """Key, caption and name of some global rows."""
    keys: dict[int, dict[str, str]] = {}
    offset = 0
    for record in database.manifest("shards")["items"]:
        here = [row for row in rows if offset <= row < offset + record["samples"]]
        cells = metadata(database, record, ["key", "caption", "url"]) if here else []
        keys |= {row: {"key": cell["key"], "caption": cell["caption"] or "",
                       "name": lookup.row_name(cell["caption"] or "", cell.get("url") or "", row)}
                 for row in here for cell in [cells[row - offset]]}
        offset += record["samples"]
    return keys


def row_text(document: dict[str, Any]) -> str:
    """The document of a row for people: a line for each fact, then ledger entries and neighbors."""
    facts = [[name, str(document[name])] for name in ("dataset", "version", "key", "name", "caption", "row", "shard")
             if document.get(name) not in (None, "")]
    is_left_out = document["row"] is None  # then its version may be published, but it is not
    states = ("published", "hidden", "forgotten")
    state = ["left out"] if is_left_out else [word for word in states if document.get(word)]
    facts += [["state", ", ".join(state)]] if state else []
    if image := document.get("image"):
        facts.append(["image", image["path"]])
        facts.append(["", f"{image['format']}, {image['width']} x {image['height']}, {format_bytes(image['bytes'])}"])
    facts += [[name, str(value)] for name, value in document.get("credit", {}).items() if value]
    facts += [[f"{score} {column}", str(value)] for score, values in document.get("scores", {}).items()
              for column, value in values.items()]
    known = {"key", "caption", "url"}
    facts += [[name, str(value)] for name, value in document.get("columns", {}).items()
              if name not in known and value not in (None, "")]
    parts = [tables.render(facts, fold=False)]  # a value that is copied has no line breaks
    if document["ledger"]:
        parts.append(tables.render([[entry["stage"], entry["reason"], entry.get("detail", ""),
                                     "left out" if not entry.get("kept") else "warning" if is_left_out else "kept"]
                                    for entry in document["ledger"]],
                                   head=("stage", "reason", "detail", "")))
    for label, neighbors in document.get("neighbors", {}).items():
        rows = [[f"{near['score']:.3f}", near.get("key", str(near["row"])), near.get("name", "")]
                for near in neighbors[:_NEIGHBORS]]
        parts.append(f"{format_count(len(neighbors), 'neighbor')} in {label}\n"
                     + tables.render(rows, head=("score", "key", "name"), right={0}, whole={1}))
    return "\n\n".join(parts)
