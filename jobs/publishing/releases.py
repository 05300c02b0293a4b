"""The versions of a published dataset: which there are, who is bound to them, the way back, and the end of old ones."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge

from jobs.runs.run import Run
from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes
from pipeline import storage
from pipeline.bounds import check_bounds
from pipeline.datasets import published
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import read_items
from pipeline.stages.types import StageFailed


@dataclass(frozen=True)
class GcConfig:
    """Which versions stay."""

    keep: Annotated[int, Ge(0)] = 3
    """Published versions that stay beside those that must: the newest."""
    lease: Annotated[float, Ge(0)] = 24.0
    """Hours that a version stays after it ceased to be the published one, or after work on it ended: readers keep the
    version that they began with."""

    def __post_init__(self) -> None:
        check_bounds("gc", self)


def dataset_names(root: str) -> list[str]:
    """The datasets of a root that have something published."""
    found = storage.list_folders(storage.join(storage.normalize(root), "datasets"))
    return [name for name in found if published.current(root, name)]


def pins(root: str, name: str) -> dict[str, list[str]]:
    """Who is bound to which version of a dataset: runs, and neighbour lists of other datasets in it."""
    found: dict[str, list[str]] = defaultdict(list)
    for consumer, document in _consumers(root):
        for version in sorted(set(_read_by(document, name))):
            if not consumer.startswith(f"datasets/{name}/{version}/"):
                found[version].append(consumer)
    return found


def encoders(root: str, name: str) -> dict[str, dict[str, Any]]:
    """The encoders of the runs that draw their neighbours from a dataset, by the names of the runs."""
    found = {}
    for run in storage.list_folders(storage.join(storage.normalize(root), "runs")):
        document = _plan(root, f"runs/{run}")
        if document and document.get("stage") == "train" and any(_read_by(document, name)):
            found[f"the run {run}"] = Run(storage.normalize(root), run).encoder()
    return found


def _consumers(root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plans of what reads databases, by their folders."""
    root = storage.normalize(root)
    paths = [f"runs/{run}" for run in storage.list_folders(storage.join(root, "runs"))]
    for dataset in datasets(root):
        paths += [dataset.path(f"neighbors/{one}") for one in storage.list_folders(dataset.folder("neighbors"))]
    for path in paths:
        if document := _plan(root, path):
            yield path, document


def _plan(root: str, path: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(storage.join(storage.normalize(root), path, "plan.json"))
    except (FileNotFoundError, ValueError):
        return None


def _read_by(document: dict[str, Any], name: str) -> Iterator[str]:
    """The versions of a dataset that the inputs of a plan lie in."""
    for one in document.get("inputs", {}).values():
        parts = one["path"].split("/")
        if parts[0] == "datasets" and len(parts) > 3 and parts[1] == name:
            yield parts[2]


def list_versions(root: str, name: str) -> list[dict[str, Any]]:
    """Every version of a dataset, the oldest first: what it is, and why it stays."""
    root, pointer, pinned = storage.normalize(root), published.current(root, name), pins(root, name)
    rolled_back: set[str] = set()
    for past in published.history(root, name):
        rolled_back |= {past["rolled_back"]} if "rolled_back" in past else set()
        rolled_back -= {past["version"]}
    found = []
    for version in published.versions(root, name):
        dataset = Dataset(root, name, version)
        release = published.released(dataset)[0]
        one: dict[str, Any] = {"version": version, "published": bool(pointer and pointer.version == version),
                               "released": release is not None, "removed": _gone(root, name, version),
                               "rolled_back": version in rolled_back,
                               "pinned_by": pinned.get(version, []),
                               "until": _when(published.unpublished_since(root, name, version))}
        for key in ("samples", "recall@10", "change", "base"):
            one[key] = release.get(key) if release else None
        gates = storage.join(published.folder(root, name), version, "gates.json")
        if release is None and storage.exists(gates):
            one["failed_gates"] = [gate["name"] for gate in storage.read_json(gates) if not gate["passed"]]
        found.append(one)
    if not found:
        raise ValueError(f"there is no dataset {name} in {root}\nhint: --root")
    return found


def versions_table(found: list[dict[str, Any]]) -> str:
    """The versions as text, a line each."""
    rows = []
    for one in found:
        change = ", ".join(f"{count} {what}" for what, count in (one["change"] or {}).items() if count)
        state = next((word for word in ("published", "removed", "rolled_back", "released") if one[word]),
                     "not published").replace("_", " ")
        if "failed_gates" in one:
            state = f"stopped by {', '.join(one['failed_gates'])}"
        told = [f"{one['samples']} samples" if one["samples"] is not None else "",
                f"recall@10 {one['recall@10']:.3f}" if one["recall@10"] is not None else "", change,
                f"used by {', '.join(one['pinned_by'])}" if one["pinned_by"] else ""]
        rows.append([one["version"], state, "; ".join(part for part in told if part)])
    return tables.render(rows)


def _when(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == float("inf") else seconds


def against_current(root: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The folders of all published versions, and where what they hold is not what was published."""
    folders, faults = [], []
    for name in dataset_names(root):
        place = f"datasets/{name}/current.json"
        try:
            dataset = published.reader(root, name)
        except ValueError as error:
            faults.append({"path": place, "fault": str(error).splitlines()[0]})
            continue
        folders.append(f"datasets/{name}/{dataset.version}/")
        for stage_name in dict(dataset.trusted):
            try:
                dataset.manifest(stage_name)
            except ValueError as error:
                faults.append({"path": dataset.path(stage_name), "fault": str(error).splitlines()[0]})
    return tuple(folders), faults


def rollback(root: str, name: str, to: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Publish an earlier version again: `to`, or the one before the published one; what stands there now."""
    root, pointer = storage.normalize(root), published.current(root, name)
    if pointer is None:
        raise ValueError(f"nothing of {name} is published in {root}\nhint: rebuild {name} --source ...")
    past = [one["version"] for one in published.history(root, name)]
    version = to or next((one for one in reversed(past) if published.number_of(one) < pointer.number
                          and not _gone(root, name, one)), "")
    if not version:
        raise ValueError(f"there is no version of {name} before {pointer.version} any more\nhint: versions {name}")
    if version == pointer.version:
        raise ValueError(f"{name}@{version} is the published version already")
    dataset = Dataset(root, name, version)
    release, data = published.released(dataset)
    if release is None or version not in past:
        raise ValueError(f"{name}@{version} was never published, so it cannot be again\nhint: versions {name} lists "
                         f"what there is")
    if _gone(root, name, version):
        raise ValueError(f"{name}@{version} was removed by gc\nhint: versions {name} lists what there is")
    if published.trusted(dataset).trusted != tuple(sorted(published.manifests(dataset).items())):
        raise ValueError(f"{name}@{version} is not what was published any more\nhint: verify --only datasets/{name}/"
                         f"{version}")
    if not dry_run and not published.publish(dataset, data, release["number"], pointer, rolled_back=pointer.version):
        raise StageFailed(f"somebody published another version of {name} at this moment\nhint: look at versions "
                                f"{name}, and try again")
    return {"dataset": name, "published": version, "rolled_back": pointer.version} | (
        {"dry_run": True} if dry_run else {})


def collect_garbage(root: str, name: str, config: GcConfig, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove versions that nobody needs, but for files that others took over; what was done to which."""
    root, pointer = storage.normalize(root), published.current(root, name)
    if pointer is None:
        raise ValueError(f"nothing of {name} is published in {root}: nothing is old")
    pinned, there = pins(root, name), published.versions(root, name)
    there = [one for one in there if not _gone(root, name, one)]
    past = [one for one in there if published.unpublished_since(root, name, one) is not None]
    newest = set(past[-config.keep:]) if config.keep else set()
    found = []
    for version in there:
        reason = ("published" if version == pointer.version else f"pinned by {', '.join(pinned[version])}"
                  if version in pinned else f"one of the newest {config.keep}" if version in newest
                  else "not made by rebuild" if version not in past and not storage.exists(
                      storage.join(published.folder(root, name), version, "rebuild.json"))
                  and any(Dataset(root, name, version).sealed(one) for one in published.STAGES)
                  else "leased" if time.time() - _last_used(root, name, version) < 3600 * config.lease else "")
        found.append({"version": version, "kept": reason})
    stays = _files_of(root, name, [one["version"] for one in found if one["kept"]])
    for one in found:
        if not one["kept"]:
            one["removed_files"], one["removed_bytes"], one["taken_over"] = _remove(
                root, name, one["version"], stays, dry_run)
    return found


def _gone(root: str, name: str, version: str) -> bool:
    """Whether a version was removed: its release alone is left, and files that others took over."""
    dataset = Dataset(root, name, version)
    return published.released(dataset)[0] is not None and not dataset.sealed("shards")


def _last_used(root: str, name: str, version: str) -> float:
    """When a version ceased to be published, or somebody last worked on it."""
    if (since := published.unpublished_since(root, name, version)) is not None:
        return since
    base = storage.join(published.folder(root, name), version)
    times = [0.0]
    for path in ("rebuild.json", "gates.json", *(f"{one}/{file}" for one in published.STAGES for file in
                                                 ("plan.json", "progress.json", "manifest.json"))):
        try:
            times.append(storage.modified_time(storage.join(base, path)))
        except FileNotFoundError:
            continue
    return max(times)


def _files_of(root: str, name: str, kept: list[str]) -> set[str]:
    """Addresses of the files that the manifests and plans of versions name."""
    found = set()
    for version in kept:
        dataset = Dataset(root, name, version)
        for stage_name in published.STAGES:
            folder = dataset.folder(stage_name)
            if dataset.sealed(stage_name):
                manifest = read_manifest(folder, "")
                records: Any = manifest["items"]
            else:  # under way: what is recorded, and what its plan says will be taken
                records = [storage.read_json(storage.join(folder, "records", one))
                           for one in storage.list_files(storage.join(folder, "records"))]
                if storage.exists(storage.join(folder, "plan.json")):
                    records += _to_be_taken(root, name, stage_name, folder)
            found |= {storage.manifest_file_url(folder, entry["name"])
                      for record in records for entry in record["files"]}
    return found


def _to_be_taken(root: str, name: str, stage_name: str, folder: str) -> list[dict[str, Any]]:
    """Records of other versions that the items of a plan will take over, their files by whole address."""
    found = []
    for item in read_items(folder):
        for key in ("last", "vectors", "of"):
            record = item.inputs.get(key)
            version = item.inputs.get("version") or item.inputs.get("last")
            if isinstance(record, dict) and isinstance(version, str):
                there = Dataset(root, name, version).folder("shards" if key == "of" else stage_name)
                found.append({"files": [entry | {"name": storage.manifest_file_url(there, entry["name"])}
                                        for entry in record["files"]]})
    return found


def _remove(root: str, name: str, version: str, stays: set[str], dry_run: bool) -> tuple[int, int, int]:
    """Remove what is in a version and does not stay: files, bytes, and files that stay."""
    base = storage.join(published.folder(root, name), version)
    count = length = left = 0
    # Manifests go first: nobody begins to read a version that is half gone. Its release stays, to say that it was.
    for file, size in sorted(storage.walk(base), key=lambda one: (not one[0].endswith("manifest.json"), one[0])):
        url = storage.join(base, file)
        if file == "release.json" or url in stays:
            left += file != "release.json"
            continue
        count, length = count + 1, length + (size or 0)
        if not dry_run:
            storage.remove(url)
    return count, length, left


def removed_table(found: list[dict[str, Any]], dry_run: bool) -> str:
    """What became of each version, a line each."""
    verb = "would be removed" if dry_run else "removed"
    return tables.render([[one["version"], f"kept: {one['kept']}" if one["kept"] else
                           f"{verb}: {one['removed_files']} files, {format_bytes(one['removed_bytes'])}"
                           + (f"; {one['taken_over']} files stay, for later versions took them over"
                              if one["taken_over"] else "")] for one in found])
