"""Reading a sealed folder again: is every file what its manifest says, and does it line up?"""

import contextlib
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.metadata import metadata
from pipeline.formats import arrays, parquet
from pipeline.media import tars
from pipeline.neighbors.files import neighbor_files
from pipeline.stages import records
from pipeline.stages.documents import check_manifest, check_plan
from pipeline.stages.manifest import changed_inputs, read_manifest
from pipeline.stages.plan import item_ids, read_items

_log = logging.getLogger(__name__)
_DENIED = "cannot be read: this user may not read it"
_CARRIED = re.compile(r"rows/[\w-]+-([0-9a-f]{12})\.jsonl?")


def find_faults(root: str, path: str, *, quick: bool = False) -> Iterator[dict[str, str]]:
    """The faults of a sealed folder below `root`, each {"path", "fault"}; none if all is well.

    `quick` looks at the manifest alone: does it follow from its parts, and are its inputs what they were?
    """
    base = storage.join(root, path)
    try:
        manifest = read_manifest(base, "")
        changed = _changed(manifest)
    except (ValueError, KeyError, TypeError, PermissionError) as error:
        yield _fault(path, "manifest.json", f"cannot be read: {storage.first_line(error)}")
        return
    for fault in changed:
        yield _fault(path, "manifest.json", f"was changed after sealing: {fault}")
    yield from _plan(path, base, manifest)
    changed = changed_inputs(root, manifest)
    if changed and manifest["stage"] == "train":  # its weights are whole, and samples of it do not read its inputs
        _log.warning("%s: %s changed since it was trained: sampling is as before, and training further is not possible",
                     path, ", ".join(changed))
        changed = []
    for name in changed:
        yield _fault(path, "manifest.json", f"is stale: {name} changed since")
    if quick:
        return
    yield from _carried_files(path, base)
    faulty = set()
    for entry in itertools.chain(manifest["files"], itertools.chain.from_iterable(
            record["files"] for record in manifest["items"])):
        fault = _file(storage.manifest_file_url(base, entry["name"]), entry)
        if fault:
            faulty.add(entry["name"])
            yield _fault(path, entry["name"], fault)
    yield from _records(root, path, manifest)
    checks = {"shard": _shards, "embed": _embeddings, "embed_captions": _embeddings, "index": _index,
              "neighbors": _neighbors, "latents": _latents, "score": _scores}
    check = checks.get(manifest["stage"]) if path.startswith("datasets/") else None
    if check:
        checked = _Checked(root, path, manifest)
        for record in manifest["items"]:
            if faulty.isdisjoint(entry["name"] for entry in record["files"]):
                try:
                    yield from check(checked, path, record)
                except Exception as error:  # hostile bytes make readers raise whatever they like
                    if storage.is_about_machine(error):
                        raise
                    yield _fault(path, record["id"],
                                 f"cannot be read: {type(error).__name__}: {storage.first_line(error)}")
    if manifest["stage"] == "train":
        yield from _curve(root, path, manifest)
    if manifest["stage"] in {"train", "convert", "import"}:
        yield from _checkpoints(root, path, manifest["info"])


class _Checked:
    """Facts for checking the records of a folder. They are read once for all records."""

    def __init__(self, root: str, path: str, manifest: dict[str, Any]) -> None:
        _, name, version, self.name = path.split("/", 3)
        self.dataset, self.manifest = Dataset(root, name, version), manifest

    @cached_property
    def samples(self) -> dict[str, int]:
        """How many samples each shard has."""
        return {record["id"]: record["samples"] for record in self.dataset.manifest("shards")["items"]}

    @cached_property
    def database(self) -> tuple[str, int]:
        """The database that neighbors are from, and its rows."""
        database = Dataset.parse(self.dataset.root, self.name.rpartition("/")[2])
        return database.label, database.manifest("embeddings")["totals"]["samples"]


def _changed(manifest: dict[str, Any]) -> list[str]:
    """Contradictions inside a manifest."""
    faults = []
    if manifest["fingerprint"] != storage.digest([manifest[key] for key in ("format", "stage", "section", "inputs")]):
        faults.append("its settings and inputs do not give its fingerprint")
    if manifest["content"] != records.content(manifest["fingerprint"], manifest["files"], manifest["items"]):
        faults.append("its files do not give its content hash")
    if manifest["totals"] != records.totals(manifest["items"]):
        faults.append("its totals are not the sum of its items")
    return faults


def _plan(path: str, base: str, manifest: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The plan must have the settings, inputs and items of the manifest."""
    try:
        url = storage.join(base, "plan.json")
        plan = check_plan(storage.read_json(url), url)
        if any(plan[key] != manifest[key] for key in ("format", "stage", "section", "inputs", "fingerprint")):
            yield _fault(path, "plan.json", "has other settings or inputs than the manifest")
        elif item_ids(read_items(base)) != [record["id"] for record in manifest["items"]]:
            yield _fault(path, "plan.json", "lists other items than the manifest")
    except FileNotFoundError as error:
        yield _fault(path, "plan.json", f"is missing, or a list beside it: {error.filename or error}")
    except (ValueError, KeyError, TypeError, PermissionError) as error:
        yield _fault(path, "plan.json", f"cannot be read: {storage.first_line(error)}")


def _carried_files(path: str, base: str) -> Iterator[dict[str, str]]:
    """The lists that a plan brought along must have the bytes that their names say."""
    names: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, PermissionError):  # `_plan` names it
        for item in read_items(base):
            names |= {value: match[1] for value in item.inputs.values()
                      if isinstance(value, str) and (match := _CARRIED.fullmatch(value))}
    for name, sha256 in sorted(names.items()):
        try:
            if not storage.sha256(storage.join(base, name)).startswith(sha256):
                yield _fault(path, name, "has other bytes than its name says (sha256)")
        except FileNotFoundError:
            yield _fault(path, name, "is missing")
        except PermissionError:
            yield _fault(path, name, _DENIED)


def _file(url: str, entry: dict[str, Any]) -> str:
    try:
        length = storage.size(url)
        if length != entry["bytes"]:
            return f"has {length} bytes, its manifest says {entry['bytes']}"
        return "" if storage.sha256(url) == entry["sha256"] else "has other bytes than when it was sealed (sha256)"
    except FileNotFoundError:
        return "is missing"
    except PermissionError:
        return _DENIED


def _records(root: str, path: str, manifest: dict[str, Any]) -> Iterator[dict[str, str]]:
    for record in manifest["items"]:
        name = f"records/{record['id']}.json"
        try:
            if storage.read_json(storage.join(root, path, name)) != record:
                yield _fault(path, name, "is not the record in the manifest")
        except (FileNotFoundError, ValueError):
            yield _fault(path, name, "is missing or no JSON")
        except PermissionError:
            yield _fault(path, name, _DENIED)


def _shards(checked: _Checked, path: str, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    dataset = checked.dataset
    entry = file_of(record, ".tar")
    rows = metadata(dataset, record, ["key", "sha256"])
    keys: list[str] = []
    for sample in tars.read(dataset.fetch("shards", entry)):
        key, hashed = sample["__key__"], hashlib.sha256(tars.sample_image(sample)).hexdigest()
        if len(keys) < len(rows) and rows[len(keys)] | {"status": ""} != {"key": key, "sha256": hashed, "status": ""}:
            yield _fault(path, entry["name"], f"{key} carries the metadata of another sample")
        keys.append(key)
    if keys != [row["key"] for row in rows]:
        yield _fault(path, entry["name"], f"its {len(keys)} samples are not the {len(rows)} of its parquet")
    if len(keys) != record["samples"]:
        yield _fault(path, entry["name"], f"has {len(keys)} samples, its record says {record['samples']}")


def _embeddings(checked: _Checked, path: str, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    rows = arrays.map_array(checked.dataset.fetch(checked.name, file_of(record, ".npy")))
    yield from _lengths(checked, path, record["id"], len(rows), f"{record['id']}.npy")
    if (dim := checked.manifest["info"]["encoder"].get("dim")) and rows.shape[1:] != (dim,):
        yield _fault(path, f"{record['id']}.npy", f"has vectors of shape {rows.shape[1:]}, its encoder makes {dim}")
        return
    norms = np.linalg.norm(np.asarray(rows, np.float32), axis=1)
    wrong = int((~(abs(norms - 1) <= 2e-3) & (norms != 0)).sum())  # a norm that is no number is none of these
    if wrong:
        yield _fault(path, f"{record['id']}.npy", f"{wrong} rows are not of unit length")


def _latents(checked: _Checked, path: str, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    rows = arrays.map_array(checked.dataset.fetch("latents", file_of(record, ".npy")))
    yield from _lengths(checked, path, record["id"], len(rows), f"{record['id']}.npy")
    if not np.isfinite(rows).all():
        yield _fault(path, f"{record['id']}.npy", "has latents that are not finite")


def _scores(checked: _Checked, path: str, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    entry = file_of(record, ".parquet")
    keys = parquet.read(checked.dataset.fetch(checked.name, entry), ["key"])["key"].to_pylist()
    shard = next(shard for shard in checked.dataset.manifest("shards")["items"] if shard["id"] == record["id"])
    if keys != [row["key"] for row in metadata(checked.dataset, shard, ["key"])]:
        yield _fault(path, entry["name"], f"its {len(keys)} keys are not those of its shard")


def _index(checked: _Checked, path: str, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    from pipeline.indices.faiss_door import UnreadableIndex
    from pipeline.indices.searcher import Searcher, count_misnumbered_rows
    try:
        searcher = Searcher(checked.dataset)
    except (ValueError, UnreadableIndex) as error:
        yield _fault(path, "knn.index", storage.first_line(error))
        return
    if wrong := count_misnumbered_rows(searcher.index):
        yield _fault(path, "knn.index", f"{wrong} of its {searcher.index.ntotal} rows are not in it exactly once")


def _neighbors(checked: _Checked, path: str, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    dataset, name, (database, total) = checked.dataset, checked.name, checked.database
    for kept in neighbor_files([record], ".ids.npy"):
        shard = kept["name"].removesuffix(".ids.npy")
        files = {entry["name"].removeprefix(f"{shard}."): entry for entry in record["files"]
                 if entry["name"].startswith(f"{shard}.")}
        ids = arrays.load_array(dataset.fetch(name, kept))
        scores = arrays.load_array(dataset.fetch(name, files["scores.npy"]))
        yield from _lengths(checked, path, shard, len(ids), kept["name"])
        if ids.shape != scores.shape or ids.min(initial=-1) < -1 or ids.max(initial=-1) >= total:
            yield _fault(path, kept["name"], f"ids beyond the {total} rows of {database}")
        elif (scores[:, 1:] > scores[:, :-1]).any():
            yield _fault(path, files["scores.npy"]["name"], "neighbors are not nearest first")
        if vectors := files.get("vectors.npy"):
            shape = arrays.map_array(dataset.fetch(name, vectors)).shape
            if shape[:2] != ids.shape:
                yield _fault(path, vectors["name"], f"has vectors for {shape[:2]} neighbors, ids for {ids.shape}")


def _lengths(checked: _Checked, path: str, shard: str, rows: int, name: str) -> Iterator[dict[str, str]]:
    """Rows must be as many as the samples of the shard of the same number."""
    if rows != (samples := checked.samples.get(shard)):
        yield _fault(path, name, f"has {rows} rows, its shard {samples} samples")


def _curve(root: str, path: str, manifest: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The curve up to the sealed step. A finished run may have been started again with more steps."""
    try:
        text = storage.read_bytes(storage.join(root, path, "metrics.jsonl"))
        whole = text[:text.rfind(b"\n") + 1]  # training may be writing the last line
        lines = itertools.takewhile(lambda line: line["step"] <= manifest["info"]["steps"],
                                    (storage.parse_json(line, "metrics.jsonl") for line in whole.splitlines()))
        if storage.digest([[line["step"], line["loss"]] for line in lines]) != manifest["info"]["curve"]:
            yield _fault(path, "metrics.jsonl", "is not the curve that was sealed")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        yield _fault(path, "metrics.jsonl", "is missing or damaged")


def _checkpoints(root: str, path: str, info: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The files of the checkpoints. `info` of the sealed run names the last one: {"step" or "steps", "checkpoint"}."""
    base, contents = storage.join(root, path, "checkpoints"), dict[str, str]()
    for step in storage.list_folders(base):
        try:
            url = storage.join(base, step, "manifest.json")
            manifest = check_manifest(storage.read_json(url), url)
        except FileNotFoundError:
            continue  # cut off while it was written: nothing reads it
        except ValueError as error:
            yield _fault(path, f"checkpoints/{step}/manifest.json", f"cannot be read: {storage.first_line(error)}")
            contents[step] = info.get("checkpoint", "")  # its fault has a name already
            continue
        contents[step] = manifest["content"]
        for entry in manifest["files"]:
            fault = _file(storage.file_below(storage.join(base, step), entry["name"]), entry)
            if fault:
                yield _fault(path, f"checkpoints/{step}/{entry['name']}", fault)
    last = f"{info.get('steps', info.get('step', 0)):07d}"
    if "checkpoint" in info and contents.get(last, "") != info["checkpoint"]:
        fault = "is not the one of the sealed run" if last in contents else "is missing, and the run is sealed"
        yield _fault(path, f"checkpoints/{last}/manifest.json", fault)


def _fault(path: str, name: str, fault: str) -> dict[str, str]:
    return {"path": storage.manifest_file_url(path, name), "fault": fault}
