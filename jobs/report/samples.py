"""The samples of a report: a row for each request, a column for each database, the neighbors beside each image."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jobs.report.collect import RootContents
from jobs.report.names import MOST_SEARCHED_BYTES
from jobs.report.render import Album, InlineImage, render
from jobs.runs.run import Run
from jobs.sampling import queries
from jobs.sampling.mixture import Mixture
from jobs.telemetry.units import format_count
from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.releases.version_marks import RemovedVersion
from pipeline.storage import DamagedFile

_ROWS = 40
_SAMPLERS = {"ddim": "DDIM", "dpm++": "DPM-Solver++", "euler": "Euler", "heun": "Heun"}

Images = dict[str, bytes | None]


def sample_grid(root: RootContents, run: Run, name: str, album: Album) -> Markup | None:
    """The sealed samples `name` of a run: rows are requests, columns databases. None if they are not sealed."""
    path = f"{run.path}/samples/{name}"
    if root.manifest(path) is None:
        return None
    folder = storage.join(root.address, path)
    document = read_samples(root, folder)
    labels = document["databases"]
    every = sorted({entry["position"] for entry in document["pictures"]})
    positions = every[:_ROWS]
    shown = {(entry["position"], entry["database"]): entry for entry in document["pictures"]
             if entry["position"] in positions}
    requests = {entry["position"]: entry for entry in shown.values()}
    data = read_images(folder, list(shown.values()))
    held_out = _held_out(root, labels, [entry["prompt"] for entry in shown.values() if _kind(entry) == "prompt"])
    rows = [{"heading": queries.query_title(requests[position]), "image": _given(root, requests[position], data, album),
             "held_out": held_out.get(requests[position].get("prompt", ""), False),
             "cells": [_cell(shown.get((position, label)), data, album) for label in labels]}
            for position in positions]
    return render("samples.html", run=run.name, name=name, changed=root.changed_inputs(path), labels=labels, rows=rows,
                  album=album, document=document, kinds=sorted({_kind(entry) for entry in shown.values()}),
                  mixed=any("database" in neighbor for entry in shown.values() for neighbor in entry["neighbors"]),
                  any_held_out=any(held_out.values()), sampler=_SAMPLERS[document.get("sampler", "ddim")],
                  steps=sorted({entry["checkpoint"]["step"] for entry in shown.values()}),
                  batch=_batch(root, run), more=len(every) - len(positions))


def _batch(root: RootContents, run: Run) -> int:
    """Images of a training step; 0 for a run that was imported."""
    section = (root.plan(run.path) or {}).get("section", {})
    return int((section.get("train") or {}).get("global_batch", 0))


def _kind(entry: dict[str, Any]) -> str:
    """prompt, image or p_D. Older files have prompts only."""
    return entry.get("kind", "prompt")


def read_samples(root: RootContents, folder: str) -> dict[str, Any]:
    """The samples.json of a folder, without the neighbors that must not be shown."""
    document = storage.read_json(storage.join(folder, "samples.json"))
    for entry in document["pictures"]:
        entry["neighbors"] = [neighbor for neighbor in entry["neighbors"]
                              if not root.is_hidden(neighbor, entry["database"])]
    return document


def read_images(folder: str, shown: Sequence[dict[str, Any]]) -> Images:
    """The image files that these entries of samples.json name, None for a missing file."""
    files = {entry["file"] for entry in shown} | {entry["image"]["file"] for entry in shown if "image" in entry}
    files |= {neighbor["file"] for entry in shown for neighbor in entry["neighbors"]}
    names = sorted(files)
    return dict(zip(names, storage.map_urls(_read, [storage.file_below(folder, name) for name in names]), strict=True))


def _read(address: str) -> bytes | None:
    try:
        return storage.read_bytes(address)
    except FileNotFoundError:
        return None


def _given(root: RootContents, entry: dict[str, Any], data: Images, album: Album) -> InlineImage | None:
    """The image that was given in place of a prompt; an empty place if it was forgotten."""
    if _kind(entry) != "image":
        return None
    heading, image = queries.query_title(entry), entry["image"]
    shown = None if root.forgotten.has(image) else data[image["file"]]
    return album.image(shown, heading, f"{heading}\nsha256 {image['sha256']}", side=96)


def _cell(entry: dict[str, Any] | None, data: Images, album: Album) -> dict[str, Any] | None:
    """A generated image and its neighbors."""
    if entry is None:
        return None
    heading, neighbors, row = queries.query_title(entry), entry["neighbors"], ""
    if "drawn" in entry:
        row = f", row {entry['drawn']['row']}, used {format_count(entry['drawn']['used'], 'time')}"
    listed = "\n".join(f"{rank}. {_database(neighbor)}{neighbor['key']} · {neighbor['caption']} · "
                       f"{neighbor['score']:.3f}" for rank, neighbor in enumerate(neighbors, 1))
    title = (f"{heading}{row} · {entry['database']}\nseed {entry['seed']}, noise {entry['position']}, checkpoint step "
             f"{entry['checkpoint']['step']}\nneighbors:\n{listed or 'none'}")
    return {"image": album.image(data[entry["file"]], f"{heading}, neighbors from {entry['database']}", title),
            "neighbors": [_neighbor(neighbor, data, album) for neighbor in neighbors]}


def _neighbor(neighbor: dict[str, Any], data: Images, album: Album) -> InlineImage:
    title = (f"{neighbor['caption']}\n{_database(neighbor)}key {neighbor['key']}, row {neighbor['row']}, score "
             f"{neighbor['score']:.3f}")
    return album.image(data[neighbor["file"]], neighbor["caption"], title, side=64)


def _database(neighbor: dict[str, Any]) -> str:
    """The database of a neighbor, if there are several."""
    return f"{neighbor['database']}, " if "database" in neighbor else ""


def _held_out(root: RootContents, labels: Sequence[str], prompts: Sequence[str]) -> dict[str, bool]:
    """For each prompt that is a caption in one of the databases: whether its subject was held out of training."""
    members, result = dict[Dataset, None](), dict[str, bool]()
    for label in labels:
        try:
            members |= dict.fromkeys(Mixture.parse(root.address, label).members)
        except RemovedVersion:
            continue
        except DamagedFile:
            raise
        except ValueError:  # a dataset may have been removed since
            continue
    for dataset in members:
        result |= {prompt: result.get(prompt, False) or held for prompt, held in _subjects(dataset, prompts).items()}
    return result


def _subjects(dataset: Dataset, prompts: Sequence[str]) -> dict[str, bool]:
    """For each prompt that is a caption of the dataset: whether its subject was held out of training."""
    result: dict[str, bool] = {}
    wanted, budget = set(prompts), MOST_SEARCHED_BYTES
    try:
        for record in dataset.manifest("shards")["items"]:
            budget -= file_of(record, ".parquet")["bytes"]
            if budget < 0 or result.keys() >= wanted:
                break
            for row in metadata(dataset, record, ["caption", "held_out"]):
                if row.get("caption") in wanted:
                    held = str(row.get("held_out", "")).lower() in {"1", "1.0", "true"}
                    result[row["caption"]] = result.get(row["caption"], False) or held
    except (ValueError, OSError):
        # A database may have been removed since. Most datasets have no column held_out.
        return {}
    return result
