"""The images that a sample used: key, title, author, license, page, source, caption, score; and a sheet of them."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from jobs.telemetry import tables
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.metadata import metadata
from pipeline.media.contact_sheet import contact_sheet
from pipeline.rows.licenses import attribution_of, license_of
from pipeline.stages.documents import NUMBER, check_shape
from pipeline.takedowns.takedown_list import Forgotten, read_takedowns

_CELL = 160
_TAKEN_DOWN = "this image was taken down"
_REMOVED = "this version of the database was removed, or was made again"
_UNKNOWN = f"{_REMOVED}; this image may have been taken down"
_SAMPLES = {"pictures": [{
    "file": str, "prompt?": (str, type(None)), "seed": int, "database": str, "neighbors": [{
        "key": str, "score": NUMBER, "caption": str, "sha256": str, "file": str, "url?": str, "database?": str}]}]}


def list_credits(text: str, root: str = "") -> list[dict[str, Any]]:
    """The credits of a sample (.png), or of every sample in a folder of samples or its samples.json.

    text: a path or URL, or a path below `root` as `ls` prints it (runs/RUN/samples/ID). ValueError if it is no sample.
    """
    # A file of this folder comes first: its path may begin with runs/, too.
    below_root = root and text.startswith("runs/") and not Path(text).exists()
    address = storage.join(storage.normalize(root), text) if below_root else storage.normalize(text)
    address = address.rstrip("/")
    root, below = _within(address)
    parts = below.split("/")  # runs/RUN/samples/HASH/...
    folder = storage.join(root, *parts[:4])
    try:
        url = storage.join(folder, "samples.json")
        document = check_shape(storage.read_json(url), url, _SAMPLES, "the same sample command with --overwrite")
    except FileNotFoundError:
        if not storage.list_folders(folder) and not storage.list_files(folder):
            raise ValueError(f"{folder} is not there\nhint: python -m jobs ls") from None
        raise ValueError(f"{folder} has no samples.json: the samples are not finished, or `sample` did not make them\n"
                         f"hint: run the same sample command again") from None
    file = "/".join(parts[4:])
    chosen = [picture for picture in document["pictures"]
              if file in {"", "samples.json", "grid.png", picture["file"]}]
    if not chosen:
        others = [picture["file"] for picture in document["pictures"]]
        raise ValueError(f"{address} is no sample: {folder}/samples.json names {len(others)} others\n"
                         f"hint: one of its files{f', as {others[0]}' if others else ''}, or samples.json")
    databases = {neighbor.get("database", picture["database"])
                 for picture in chosen for neighbor in picture["neighbors"]}
    known = {label: _known(Dataset.parse(root, label)) for label in sorted(databases)}
    forgotten = read_takedowns(root)
    return [{"sample": picture["file"], "prompt": picture.get("prompt", ""), "seed": picture["seed"], "pictures": [
        _credit(neighbor, neighbor.get("database", picture["database"]), known,
                storage.file_below(folder, neighbor["file"]), forgotten)
        for neighbor in picture["neighbors"]]} for picture in chosen]


def _within(address: str) -> tuple[str, str]:
    """The root of a sample, and the path of the sample below it."""
    root, sign, below = address.rpartition("/runs/")
    if not sign or "/samples/" not in f"/{below}":
        raise ValueError(f"{address} is not in runs/RUN/samples/ of a root\nhint: a .png that `sample` wrote, or its "
                         f"samples.json")
    return root, f"runs/{below}"


def _known(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The metadata of a database by key, with the sources from its manifest. Empty if the database was removed."""
    if not dataset.is_sealed("shards"):
        return {}
    manifest = dataset.manifest("shards")
    origins = manifest["info"].get("sources") or []
    return {row["key"]: row | {"sources": origins} for record in manifest["items"] for row in metadata(dataset, record)}


def _credit(neighbor: dict[str, Any], label: str, known: dict[str, dict[str, Any]], file: str,
            forgotten: Forgotten) -> dict[str, Any]:
    row = known[label].get(neighbor["key"])
    if row is not None and row["sha256"] != neighbor["sha256"]:
        row = None  # the version was made again after this sample
    note = (_TAKEN_DOWN if forgotten.has(row or neighbor) else
            "" if row else
            _UNKNOWN if "url" not in neighbor and (forgotten.domains or forgotten.urls) else _REMOVED)
    return {"database": label, "key": neighbor["key"], "score": neighbor["score"], "caption": neighbor["caption"],
            "url": row["url"] if row else neighbor.get("url", ""), **credit_row(row or {}, label),
            "sha256": neighbor["sha256"], "file": file,
            **({"note": note} if note else {})}


def credit_row(row: dict[str, Any], label: str) -> dict[str, str]:
    """Source, license, title, page and authors of a row of metadata. Its `sources` come from the manifest."""
    about = _origin(row, label) if row else {}
    own, work = license_of(row), attribution_of(row)
    stated = own if own.text else license_of(about)
    return {"source": _first(about, ("package", "name", "style")), "licence": stated.text, "spdx": stated.spdx,
            "title": work["title"], "page": work["page"],
            "authors": work["author"] or _first(about, ("author_name", "authors", "author"))}


def _first(cells: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((str(cells[name]) for name in names if cells.get(name)), "")


def _origin(row: dict[str, Any], label: str) -> dict[str, Any]:
    """The source of an image: the only one in the manifest, or the one with the name of its folder or database."""
    listed = row["sources"] if isinstance(row["sources"], list) else [row["sources"]]
    listed = [origin for origin in listed if isinstance(origin, dict)]
    if len(listed) < 2:
        return listed[0] if listed else {}
    for name in (row["url"].split("/")[0], label.split("@")[0]):
        if named := [origin for origin in listed if name in map(str, origin.values())]:
            return named[0]
    return {}


def credits_text(credited: list[dict[str, Any]]) -> str:
    """The credits as text: one paragraph for each sample."""
    lines = []
    for credit in credited:
        lines.append(f"{credit['sample']}" + (f": {credit['prompt']}" if credit["prompt"] else ""))
        rows = []
        for picture in credit["pictures"]:
            by = ", ".join(part for part in (picture["title"], picture["authors"], picture["source"],
                                             _license(picture)) if part)
            rows.append(["", f"{picture['score']:.3f}", f"{picture['database']}/{picture['key']}", picture["caption"],
                         picture["page"] or picture["url"], f"({by})", picture.get("note", "")])
        lines += [tables.render(rows)] if rows else []
    return "\n".join(lines)


def save_sheet(credited: list[dict[str, Any]], out: Path) -> None:
    """A contact sheet: a row for each sample, itself first, then its neighbors with score, author and license."""
    rows: list[list[tuple[Image.Image | None, str | tuple[str, ...]]]] = []
    for credit in credited:
        if not credit["pictures"]:
            raise ValueError(f"{credit['sample']} used no image: there is nothing to show")
        folder = credit["pictures"][0]["file"].rpartition("/")[0]
        sample = f"{folder}/{credit['sample'].rpartition('/')[2]}"
        rows.append([(_picture(sample), credit["prompt"]), *(
            (None, neighbor["note"]) if neighbor.get("note") in {_TAKEN_DOWN, _UNKNOWN} else
            (_picture(neighbor["file"]), _below(neighbor)) for neighbor in credit["pictures"])])
    width = max(map(len, rows))
    rows = [row + [(None, "")] * (width - len(row)) for row in rows]
    contact_sheet([picture for row in rows for picture, _ in row], width, cell=_CELL, label_lines=3,
                  labels=[words for row in rows for _, words in row]).save(out)


def _below(neighbor: dict[str, Any]) -> tuple[str, str, str]:
    """The lines below an image: score and name, author, license. A long name hides neither author nor license."""
    file = neighbor["url"].rstrip("/").rpartition("/")[2]
    name = neighbor["title"] or neighbor["caption"] or file or neighbor["key"]
    return f"{neighbor['score']:.2f} {name}", neighbor["authors"] or "author unknown", _license(neighbor)


def _license(picture: dict[str, Any]) -> str:
    return picture["spdx"] or picture["licence"] or "license unknown"


def _picture(address: str) -> Image.Image:
    return Image.open(io.BytesIO(storage.read_bytes(address))).convert("RGB")
