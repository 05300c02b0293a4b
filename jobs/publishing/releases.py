"""The versions of a published dataset: list them, and roll back to an earlier one."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from jobs.publishing.consumers import find_consumers
from jobs.publishing.whole_versions import (
    find_earlier_version,
    find_fault,
    find_references,
    find_replacement,
    find_way_back,
    is_removed,
    list_publications,
)
from jobs.telemetry import tables
from jobs.telemetry.units import format_time
from pipeline import storage
from pipeline.datasets.dataset import Dataset, refuse_unknown
from pipeline.releases import release_files
from pipeline.releases.published import Published
from pipeline.releases.signatures import ReleaseKeys
from pipeline.stages.documents import check_shape
from pipeline.stages.types import StageFailed
from pipeline.storage import DamagedFile

_log = logging.getLogger(__name__)


def list_versions(root: str, name: str) -> list[dict[str, Any]]:
    """Every version of a dataset, oldest first: its facts, and the reason to keep it.

    `at`: when it was last published, by the clock of the publisher (Unix time). `until`: when another took its place.
    """
    root = storage.normalize(root)
    refuse_unknown(root, name)
    current, pinned = Published.load(root, name), find_consumers(root, name)
    rolled_back: set[str] = set()
    for past in current.history():
        rolled_back |= {past["rolled_back"]} if "rolled_back" in past else set()
        rolled_back -= {past["version"]}
    versions, publications, references = [], list_publications(current), find_references(current)
    listed = {past["version"] for past in current.history()}
    for version in current.versions():
        dataset = Dataset(root, name, version)
        try:
            release, data = release_files.read_release(dataset)
            damaged = False
        except ValueError:
            release, data, damaged = None, b"", True
        is_gone, document = is_removed(root, name, version), publications.get(version)
        if document and not is_gone:
            damaged = hashlib.sha256(data).hexdigest() != document["release"]
        elif version in references and release is None and not is_gone:
            damaged = True  # it was published, and its release and its entry are lost
        about: dict[str, Any] = {"version": version, "published": current.version == version,
                               "released": release is not None, "in_history": version in listed,
                               "removed": is_gone,
                               "rolled_back": version in rolled_back, "damaged": damaged,
                               "pinned_by": pinned.get(version, []),
                               "at": document["published"] if document else None,
                               "until": _when(current.unpublished_since(version))}
        for key in ("samples", "left_out", "recall@10", "change", "base"):
            about[key] = release.get(key) if release else None
        if release is None and not damaged:
            about |= _failed_gates(dataset)
        versions.append(about)
    return versions


def _failed_gates(dataset: Dataset) -> dict[str, Any]:
    """The gates that stopped a version, as `failed_gates`; `damaged` if the file that lists them is."""
    try:
        names = read_failed_gates(dataset)
    except storage.DamagedFile:
        return {"damaged": True}
    return {"failed_gates": names} if names else {}


def read_failed_gates(dataset: Dataset) -> list[str]:
    """The names of the gates that stopped a version; none if it was released or has not met its gates."""
    url = storage.join(dataset.root, dataset.path("gates.json"))
    try:
        gates = check_shape(storage.read_json(url), url, [{"name": str, "passed": bool}], "python -m jobs gc NAME")
    except FileNotFoundError:
        return []
    return [] if release_files.has_release(dataset) else [gate["name"] for gate in gates if not gate["passed"]]


def describe_failed_gates(names: Sequence[str]) -> str:
    """The gates that stopped a version; empty without any."""
    return f"stopped by {', '.join(names)}" if names else ""


def versions_table(versions: list[dict[str, Any]]) -> str:
    """The versions as text, one line for each."""
    rows = []
    for version in versions:
        change = ", ".join(f"{count} {what}" for what, count in (version["change"] or {}).items() if count)
        state = next((word for word in ("damaged", "published", "removed", "rolled_back", "released") if version[word]),
                     "not published").replace("_", " ")
        state = "earlier" if state == "released" and version["in_history"] else state
        state = "not in the history" if state == "released" and not version["in_history"] else state
        state = describe_failed_gates(version.get("failed_gates", ())) or state
        date = "" if version["at"] is None else f"published {format_time(version['at'])}"
        lost = f", {version['left_out']} left out" if version["left_out"] else ""
        remarks = [date, f"{version['samples']} samples{lost}" if version["samples"] is not None else "",
                f"recall@10 {version['recall@10']:.3f}" if version["recall@10"] is not None else "", change,
                f"used by {', '.join(version['pinned_by'])}" if version["pinned_by"] else ""]
        rows.append([version["version"], state, "; ".join(part for part in remarks if part)])
    return tables.render(rows)


def _when(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == float("inf") else seconds


def rollback(root: str, name: str, to: str, *, dry_run: bool = False, keys: ReleaseKeys | None = None
             ) -> dict[str, Any]:
    """Publish an earlier version again. Returns the published version.

    `to`: the version; by default the newest undamaged earlier version. Nothing changes if a rollback has published
    the current one, so a killed command may run again.

    ValueError if the dataset is signed and `keys` has no private key, or if no accepted key has signed that version.
    DamagedFile if the version is damaged.
    """
    root, current = storage.normalize(root), Published.load(root, name, keys)
    current.refuse_removed()
    if not current.version:
        raise ValueError(f"nothing of {name} is published in {root}\n"
                         f"hint: python -m jobs rebuild {name} --source SOURCE{current.sign_option}")
    if not dry_run:
        current.keys.refuse_unsigned(name, current.document)
    version = to or _choose_version(current)
    report = {"dataset": name, "published": version} | ({"dry_run": True} if dry_run else {})
    if version == current.version:
        _log.info("rollback: %s@%s is the published version already", name, version)
        return report | {"already": True}
    _refuse_version(current, version)
    dataset = Dataset(root, name, version)
    release, data = release_files.read_release(dataset)
    assert release is not None, version
    undo = "" if find_fault(current, current.document) else (
        f"\nhint: to undo this: python -m jobs rollback {name} --to {current.version}{current.sign_option}")
    if not dry_run and not current.publish(dataset, data, release["number"], rolled_back=current.version):
        raise StageFailed(f"another command published a version of {name} meanwhile\n"
                          f"hint: python -m jobs versions {name}")
    if not dry_run:
        _log.info("rollback: %s@%s is published in the place of %s%s", name, version, current.version, undo)
    return report | {"rolled_back": current.version}


def _choose_version(current: Published) -> str:
    """The version that a rollback without `--to` publishes: the published one if a rollback has published it."""
    if (undone := current.document.get("rolled_back")) and not find_fault(current, current.document):
        _log.info("rollback: a rollback from %s has published %s@%s\nhint: to go further back: python -m jobs "
                  "rollback %s --to VERSION%s", undone, current.name, current.version, current.name,
                  current.sign_option)
        return current.version
    version, faults = find_earlier_version(current)
    for other, fault in faults.items():
        _log.warning("rollback: %s@%s is skipped: %s", current.name, other, fault)
    if not version and faults:
        raise DamagedFile(f"no earlier version of {current.name} is whole: {'; '.join(faults.values())}\n"
                          f"hint: {find_way_back(current)}")
    published = {document["version"] for document in current.history()} - list_publications(current).keys()
    other_keys = [version for version in current.versions() if version in published]
    signatures = {document["version"]: "signature" in document for document in current.history()}
    if not version and other_keys and not any(signatures[other] for other in other_keys):
        raise ValueError(f"{', '.join(other_keys)} of {current.name} has no signature, and there is no other version "
                         f"before {current.version}\n"
                         f"hint: python -m jobs rollback {current.name} --to {other_keys[-1]} --accept-unsigned --sign "
                         f"KEYFILE")
    if not version and other_keys:
        raise ValueError(f"no accepted key has signed {', '.join(other_keys)} of {current.name}, and there is no other "
                         f"version before {current.version}\n"
                         f"hint: RDM_RELEASE_KEY may name a file with several public keys")
    if not version:
        raise ValueError(f"there is no version of {current.name} before {current.version} any more\n"
                         f"hint: python -m jobs versions {current.name}")
    return version


def _refuse_version(current: Published, version: str) -> None:
    """ValueError if a version cannot be published again, DamagedFile if it is damaged."""
    label, hint = f"{current.name}@{version}", f"hint: python -m jobs versions {current.name}"
    document = list_publications(current).get(version)
    if document is None and current.keys.accepted:
        raise ValueError(f"{label} was never published with an accepted signature, so it cannot be again\n{hint}")
    if document is None and (damaged := current.damaged_history()):
        raise DamagedFile(f"{label} is not in the history, and {damaged[0]} is no publication: it may be that of "
                          f"{version}\nhint: python -m jobs verify --quick --only published/{current.name}")
    if document is None and release_files.has_release(Dataset(current.root, current.name, version)):
        raise ValueError(f"{label} has a release, but the history does not name it: it was never published, or its "
                         f"entry is lost\n{hint}")
    if document is None:
        raise ValueError(f"{label} was never published, so it cannot be again\n{hint}")
    if is_removed(current.root, current.name, version):
        raise ValueError(f"{label} was removed\n{hint}")
    if fault := find_fault(current, document):
        raise DamagedFile(f"{label} was published, and is damaged now: {fault}\n"
                          f"hint: {find_replacement(current, version)}")
