"""The versions of a published dataset: which there are, who is bound to them, the way back, and the end of old ones."""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from jobs.publishing.config import GcConfig
from jobs.runs.run import Run
from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes
from pipeline import storage
from pipeline.datasets import published
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.published import Published
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import read_items
from pipeline.stages.types import StageFailed


def list_published(root: str) -> list[str]:
    """The datasets of a root that have something published."""
    names = storage.list_folders(storage.join(storage.normalize(root), "datasets"))
    return [name for name in names if Published.load(root, name).version]


def find_consumers(root: str, name: str) -> dict[str, list[str]]:
    """Who is bound to which version of a dataset: runs, and neighbour lists of other datasets in it."""
    consumers: dict[str, list[str]] = defaultdict(list)
    for consumer, document in _consumers(root):
        for version in sorted(set(_read_by(document, name))):
            if not consumer.startswith(f"datasets/{name}/{version}/"):
                consumers[version].append(consumer)
    return consumers


def list_encoders(root: str, name: str) -> dict[str, dict[str, Any]]:
    """The encoders of the runs that draw their neighbours from a dataset, by the names of the runs."""
    by_run = {}
    for run in storage.list_folders(storage.join(storage.normalize(root), "runs")):
        document = _plan(root, f"runs/{run}")
        if document and document.get("stage") == "train" and any(_read_by(document, name)):
            by_run[f"the run {run}"] = Run(storage.normalize(root), run).encoder()
    return by_run


def _consumers(root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plans of what reads databases, by their folders."""
    root = storage.normalize(root)
    paths = [f"runs/{run}" for run in storage.list_folders(storage.join(root, "runs"))]
    for dataset in datasets(root):
        paths += [dataset.path(f"neighbors/{database}")
                  for database in storage.list_folders(dataset.folder("neighbors"))]
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
    for stage_input in document.get("inputs", {}).values():
        parts = stage_input["path"].split("/")
        if parts[0] == "datasets" and len(parts) > 3 and parts[1] == name:
            yield parts[2]


def list_versions(root: str, name: str) -> list[dict[str, Any]]:
    """Every version of a dataset, the oldest first: what it is, and why it stays."""
    root, current, pinned = storage.normalize(root), Published.load(root, name), find_consumers(root, name)
    rolled_back: set[str] = set()
    for past in current.history():
        rolled_back |= {past["rolled_back"]} if "rolled_back" in past else set()
        rolled_back -= {past["version"]}
    versions = []
    for version in current.versions():
        dataset = Dataset(root, name, version)
        release = published.read_release(dataset)[0]
        about: dict[str, Any] = {"version": version, "published": current.version == version,
                               "released": release is not None, "removed": _is_removed(root, name, version),
                               "rolled_back": version in rolled_back,
                               "pinned_by": pinned.get(version, []),
                               "until": _when(current.unpublished_since(version))}
        for key in ("samples", "recall@10", "change", "base"):
            about[key] = release.get(key) if release else None
        gates = storage.join(current.folder, version, "gates.json")
        if release is None and storage.exists(gates):
            about["failed_gates"] = [gate["name"] for gate in storage.read_json(gates) if not gate["passed"]]
        versions.append(about)
    if not versions:
        raise ValueError(f"there is no dataset {name} in {root}\nhint: --root")
    return versions


def versions_table(versions: list[dict[str, Any]]) -> str:
    """The versions as text, a line each."""
    rows = []
    for version in versions:
        change = ", ".join(f"{count} {what}" for what, count in (version["change"] or {}).items() if count)
        state = next((word for word in ("published", "removed", "rolled_back", "released") if version[word]),
                     "not published").replace("_", " ")
        if "failed_gates" in version:
            state = f"stopped by {', '.join(version['failed_gates'])}"
        remarks = [f"{version['samples']} samples" if version["samples"] is not None else "",
                f"recall@10 {version['recall@10']:.3f}" if version["recall@10"] is not None else "", change,
                f"used by {', '.join(version['pinned_by'])}" if version["pinned_by"] else ""]
        rows.append([version["version"], state, "; ".join(part for part in remarks if part)])
    return tables.render(rows)


def _when(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == float("inf") else seconds


def check_published(root: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The folders of all published versions, and where what they hold is not what was published."""
    folders, faults = [], []
    for name in list_published(root):
        place = f"datasets/{name}/current.json"
        try:
            dataset = published.open_dataset(root, name)
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
    root, current = storage.normalize(root), Published.load(root, name)
    if not current.version:
        raise ValueError(f"nothing of {name} is published in {root}\nhint: rebuild {name} --source ...")
    past = [document["version"] for document in current.history()]
    version = to or next((earlier for earlier in reversed(past) if published.version_number(earlier) < current.number
                          and not _is_removed(root, name, earlier)), "")
    if not version:
        raise ValueError(f"there is no version of {name} before {current.version} any more\nhint: versions {name}")
    if version == current.version:
        raise ValueError(f"{name}@{version} is the published version already")
    dataset = Dataset(root, name, version)
    release, data = published.read_release(dataset)
    if release is None or version not in past:
        raise ValueError(f"{name}@{version} was never published, so it cannot be again\nhint: versions {name} lists "
                         f"what there is")
    if _is_removed(root, name, version):
        raise ValueError(f"{name}@{version} was removed by gc\nhint: versions {name} lists what there is")
    if current.open_version(version).trusted != tuple(sorted(published.hash_manifests(dataset).items())):
        raise ValueError(f"{name}@{version} is not what was published any more\nhint: verify --only datasets/{name}/"
                         f"{version}")
    if not dry_run and not current.publish(dataset, data, release["number"], rolled_back=current.version):
        raise StageFailed(f"somebody published another version of {name} at this moment\nhint: look at versions "
                                f"{name}, and try again")
    return {"dataset": name, "published": version, "rolled_back": current.version} | (
        {"dry_run": True} if dry_run else {})


def collect_garbage(root: str, name: str, config: GcConfig, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove versions that nobody needs, but for files that others took over; what was done to which."""
    root, current = storage.normalize(root), Published.load(root, name)
    if not current.version:
        raise ValueError(f"nothing of {name} is published in {root}: nothing is old")
    pinned = find_consumers(root, name)
    there = [version for version in current.versions() if not _is_removed(root, name, version)]
    past = [version for version in there if current.unpublished_since(version) is not None]
    newest = set(past[-config.keep:]) if config.keep else set()
    versions: list[dict[str, Any]] = []
    for version in there:
        reason = ("published" if version == current.version else f"pinned by {', '.join(pinned[version])}"
                  if version in pinned else f"one of the newest {config.keep}" if version in newest
                  else "not made by rebuild" if version not in past and not storage.exists(
                      storage.join(current.folder, version, "rebuild.json"))
                  and any(Dataset(root, name, version).is_sealed(stage) for stage in published.STAGES)
                  else "leased" if time.time() - _last_used(current, version) < 3600 * config.lease else "")
        versions.append({"version": version, "kept": reason})
    stays = _files_of(root, name, [entry["version"] for entry in versions if entry["kept"]])
    for entry in versions:
        if not entry["kept"]:
            entry["removed_files"], entry["removed_bytes"], entry["taken_over"] = _remove(
                root, name, entry["version"], stays, dry_run)
    return versions


def _is_removed(root: str, name: str, version: str) -> bool:
    """Whether a version was removed: its release alone is left, and files that others took over."""
    dataset = Dataset(root, name, version)
    return published.read_release(dataset)[0] is not None and not dataset.is_sealed("shards")


def _last_used(current: Published, version: str) -> float:
    """When a version ceased to be published, or somebody last worked on it."""
    if (since := current.unpublished_since(version)) is not None:
        return since
    base = storage.join(current.folder, version)
    times = [0.0]
    for path in ("rebuild.json", "gates.json", *(f"{stage}/{file}" for stage in published.STAGES for file in
                                                 ("plan.json", "progress.json", "manifest.json"))):
        try:
            times.append(storage.modified_time(storage.join(base, path)))
        except FileNotFoundError:
            continue
    return max(times)


def _files_of(root: str, name: str, kept: list[str]) -> set[str]:
    """Addresses of the files that the manifests and plans of versions name."""
    urls = set()
    for version in kept:
        dataset = Dataset(root, name, version)
        for stage_name in published.STAGES:
            folder = dataset.folder(stage_name)
            if dataset.is_sealed(stage_name):
                manifest = read_manifest(folder, "")
                records: Any = manifest["items"]
            else:  # under way: what is recorded, and what its plan says will be taken
                records = [storage.read_json(storage.join(folder, "records", file))
                           for file in storage.list_files(storage.join(folder, "records"))]
                if storage.exists(storage.join(folder, "plan.json")):
                    records += _to_be_taken(root, name, stage_name, folder)
            urls |= {storage.manifest_file_url(folder, entry["name"])
                      for record in records for entry in record["files"]}
    return urls


def _to_be_taken(root: str, name: str, stage_name: str, folder: str) -> list[dict[str, Any]]:
    """Records of other versions that the items of a plan will take over, their files by whole address."""
    records = []
    for item in read_items(folder):
        for key in ("last", "vectors", "of"):
            record = item.inputs.get(key)
            version = item.inputs.get("version") or item.inputs.get("last")
            if isinstance(record, dict) and isinstance(version, str):
                there = Dataset(root, name, version).folder("shards" if key == "of" else stage_name)
                records.append({"files": [entry | {"name": storage.manifest_file_url(there, entry["name"])}
                                        for entry in record["files"]]})
    return records


def _remove(root: str, name: str, version: str, stays: set[str], dry_run: bool) -> tuple[int, int, int]:
    """Remove what is in a version and does not stay: files, bytes, and files that stay."""
    base = storage.join(storage.normalize(root), "datasets", name, version)
    count = length = taken_over = 0
    # Manifests go first: nobody begins to read a version that is half gone. Its release stays, to say that it was.
    for file, size in sorted(storage.walk(base), key=lambda entry: (not entry[0].endswith("manifest.json"), entry[0])):
        url = storage.join(base, file)
        if file == "release.json" or url in stays:
            taken_over += file != "release.json"
            continue
        count, length = count + 1, length + (size or 0)
        if not dry_run:
            storage.remove(url)
    return count, length, taken_over


def removed_table(versions: list[dict[str, Any]], dry_run: bool) -> str:
    """What became of each version, a line each."""
    verb = "would be removed" if dry_run else "removed"
    return tables.render([[version["version"], f"kept: {version['kept']}" if version["kept"] else
                           f"{verb}: {version['removed_files']} files, {format_bytes(version['removed_bytes'])}"
                           + (f"; {version['taken_over']} files stay, for later versions took them over"
                              if version["taken_over"] else "")] for version in versions])
