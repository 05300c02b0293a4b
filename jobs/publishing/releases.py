"""The versions of a published dataset: which there are, who is bound to them, the way back, and the end of old ones."""

import difflib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jobs.runs.metrics import never_made_a_step
from jobs.runs.run import Run
from jobs.telemetry import tables
from pipeline import storage
from pipeline.datasets import hidden_rows, published, takedowns, version_marks
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.pointer import DamagedPointer
from pipeline.datasets.published import Published
from pipeline.datasets.release_files import find_missing_files
from pipeline.datasets.signatures import ReleaseKeys, read_release_keys
from pipeline.stages.documents import RootPath, check_shape
from pipeline.stages.types import StageFailed
from pipeline.storage import DamagedFile

_log = logging.getLogger(__name__)


def list_published(root: str) -> list[str]:
    """The datasets of a root that have something published, those with a damaged or lost pointer too."""
    names = storage.list_folders(storage.join(storage.normalize(root), "datasets"))
    return [name for name in names if _is_published(root, name)]


def _is_published(root: str, name: str) -> bool:
    try:
        return bool(Published.load(root, name).version) or published.has_release(Dataset(storage.normalize(root), name))
    except DamagedPointer:
        return True


def find_consumers(root: str, name: str) -> dict[str, list[str]]:
    """Who is bound to which version of a dataset: runs, and neighbour lists of other datasets in it."""
    consumers: dict[str, list[str]] = defaultdict(list)
    for consumer, document in _consumers(root):
        for version in sorted(set(_read_by(document, name))):
            if not consumer.startswith(f"datasets/{name}/{version}/"):
                consumers[version].append(consumer)
    return consumers


def list_encoders(root: str, name: str) -> dict[str, dict[str, Any]]:
    """The encoders of the runs that take neighbors from a dataset, by run. Runs that never made a step are left out."""
    by_run = {}
    for run in storage.list_folders(storage.join(storage.normalize(root), "runs")):
        document = _plan(root, f"runs/{run}")
        if (document and document.get("stage") == "train" and any(_read_by(document, name))
                and not never_made_a_step(Run(storage.normalize(root), run))):
            by_run[f"the run {run}"] = Run(storage.normalize(root), run).encoder()
    return by_run


def list_consumer_encoders(root: str, name: str, base: Dataset | None) -> dict[str, dict[str, Any]]:
    """The encoders that a database is bound to, by name: those of its runs and of its published version `base`."""
    from pipeline.embeddings.embed import dataset_encoder  # `status` needs no arrays
    return list_encoders(root, name) | ({base.label: dataset_encoder(base)} if base else {})


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
        url = storage.join(storage.normalize(root), path, "plan.json")
        return check_shape(storage.read_json(url), url, {"stage?": str, "inputs?": {"*": {"path": RootPath}}}, "")
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
        try:
            release, damaged = published.read_release(dataset)[0], False
        except ValueError:
            release, damaged = None, True
        about: dict[str, Any] = {"version": version, "published": current.version == version,
                               "released": release is not None, "removed": is_removed(root, name, version),
                               "rolled_back": version in rolled_back, "damaged": damaged,
                               "pinned_by": pinned.get(version, []),
                               "until": _when(current.unpublished_since(version))}
        for key in ("samples", "recall@10", "change", "base"):
            about[key] = release.get(key) if release else None
        gates = storage.join(current.folder, version, "gates.json")
        if release is None and not damaged and storage.exists(gates):
            about |= _failed_gates(gates)
        versions.append(about)
    if not versions:
        names = storage.list_folders(storage.join(root, "datasets"))
        close = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"there is no dataset {name} in {root}\n"
                         f"hint: {f'did you mean {close[0]}?' if close else 'python -m jobs ls'}")
    return versions


def _failed_gates(url: str) -> dict[str, Any]:
    """The gates that stopped a version, as `failed_gates`; `damaged` if the file that lists them is."""
    try:
        gates = check_shape(storage.read_json(url), url, [{"name": str, "passed": bool}], "")
    except storage.DamagedFile:
        return {"damaged": True}
    return {"failed_gates": [gate["name"] for gate in gates if not gate["passed"]]}


def versions_table(versions: list[dict[str, Any]]) -> str:
    """The versions as text, a line each."""
    rows = []
    for version in versions:
        change = ", ".join(f"{count} {what}" for what, count in (version["change"] or {}).items() if count)
        state = next((word for word in ("damaged", "published", "removed", "rolled_back", "released") if version[word]),
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


def check_published(root: str, *, quick: bool = False, keys: ReleaseKeys | None = None
                    ) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The folders of all published versions, and where what they hold is not what was published.

    `quick` looks at the pointers, releases and manifests. Otherwise searches must not find what was forgotten. `keys`
    are those that must have signed the pointers, by default those of RDM_RELEASE_KEY.
    """
    keys = read_release_keys() if keys is None else keys
    folders, faults = [], []
    names = list_published(root)
    if keys.accepted:  # an attacker may have removed a pointer and its history
        names = sorted({*names, *(dataset.name for dataset in datasets(root)
                                  if storage.exists(storage.join(dataset.root, dataset.path("release.json"))))})
    for name in names:
        place = f"datasets/{name}/current.json"
        try:
            dataset = published.open_dataset(root, name, keys=keys)
        except ValueError as error:
            faults.append({"path": place, "fault": str(error).splitlines()[0]})
            continue
        folders.append(f"datasets/{name}/{dataset.version}/")
        faults += [{"path": url.removeprefix(storage.normalize(root)).strip("/"), "fault": "is no publication"}
                   for url in Published.load(root, name, keys).damaged_history()]
        checks: list[tuple[str, Callable[[], Any]]] = [
            (dataset.path(stage_name), partial(dataset.manifest, stage_name)) for stage_name in dict(dataset.trusted)]
        checks += [(dataset.path(stage_name), partial(dataset.is_sealed, stage_name))
                   for stage_name in published.STAGES if stage_name not in dict(dataset.trusted)]
        checks.append((f"datasets/{name}/{dataset.version}/forgotten.json", partial(
            takedowns.read_forgotten_rows if quick else _check_hidden_rows, dataset)))
        for path, check in checks:
            try:
                check()
            except ValueError as error:
                faults.append({"path": path, "fault": str(error).splitlines()[0]})
    return tuple(folders), faults


def _check_hidden_rows(dataset: Dataset) -> None:
    """ValueError if searches in a published version would find rows that the takedown list names."""
    hidden = hidden_rows.read_hidden_rows(dataset)
    rows = [row for row, _ in takedowns.find_rows(dataset, takedowns.read_takedowns(dataset.root))]
    if visible := sorted(set(rows) - set(hidden.tolist())):
        raise DamagedFile(f"searches find {len(visible)} images of the takedown list, the first is row {visible[0]}\n"
                          f"hint: python -m jobs repair {dataset.name} --root {dataset.root}")
    samples = dataset.manifest("shards")["totals"]["samples"]
    if len(hidden) and (hidden[0] < 0 or hidden[-1] >= samples):
        raise ValueError(f"rows {hidden[0]} to {hidden[-1]} are hidden, and the version has {samples} samples")


def rollback(root: str, name: str, to: str, *, dry_run: bool = False, keys: ReleaseKeys | None = None
             ) -> dict[str, Any]:
    """Publish an earlier version again: `to`, or the one before the published one; what stands there now.

    ValueError if the dataset is signed and `keys` has no private key, or if no accepted key has signed that version.
    """
    root, current = storage.normalize(root), Published.load(root, name, keys)
    if not current.version:
        raise ValueError(f"nothing of {name} is published in {root}\n"
                         f"hint: python -m jobs rebuild {name} --source SOURCE")
    if not dry_run:
        current.keys.refuse_unsigned(name, current.document)
    history = [document for document in current.history() if not current.keys.find_fault(name, document)]
    past = [document["version"] for document in history]
    version = to or next((earlier for earlier in reversed(past) if published.version_number(earlier) < current.number
                          and not is_removed(root, name, earlier)), "")
    if not version:
        raise ValueError(f"there is no version of {name} before {current.version} any more\n"
                         f"hint: python -m jobs versions {name}")
    if version == current.version:
        _log.info("rollback: %s@%s is the published version already", name, version)
        return {"dataset": name, "published": version, "already": True} | ({"dry_run": True} if dry_run else {})
    dataset = Dataset(root, name, version)
    release, data = published.read_release(dataset)
    if release is None or version not in past:
        unsigned = " with an accepted signature" if current.keys.accepted else ""
        raise ValueError(f"{name}@{version} was never published{unsigned}, so it cannot be again\n"
                         f"hint: python -m jobs versions {name}")
    if is_removed(root, name, version):
        raise ValueError(f"{name}@{version} was removed by gc\nhint: python -m jobs versions {name}")
    if hashlib.sha256(data).hexdigest() != {document["version"]: document["release"] for document in history}[version]:
        raise DamagedFile(f"the release of {name}@{version} is not the one that was published\n"
                         f"hint: python -m jobs rollback {name} --to VERSION")
    if missing := find_missing_files(dataset, dict(current.open_version(version).trusted)):
        raise DamagedFile(f"{name}@{version} is not what was published any more: {len(missing)} files are missing or "
                         f"changed, the first is {missing[0]}\n"
                         f"hint: python -m jobs verify --only datasets/{name}/{version}")
    if not dry_run and not current.publish(dataset, data, release["number"], rolled_back=current.version):
        raise StageFailed(f"somebody published another version of {name} at this moment\nhint: look at versions "
                                f"{name}, and try again")
    return {"dataset": name, "published": version, "rolled_back": current.version} | (
        {"dry_run": True} if dry_run else {})


def is_removed(root: str, name: str, version: str) -> bool:
    """Whether gc removed a version: its release and its mark are left, and files that later versions took over."""
    dataset = Dataset(root, name, version)
    if version_marks.read_mark(dataset) is not None:
        return version_marks.is_removing(dataset)
    return published.has_release(dataset) and not dataset.is_sealed("shards")
