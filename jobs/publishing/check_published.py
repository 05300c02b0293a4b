"""Find faults of published versions: pointers, history, releases, hidden rows."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jobs.publishing.whole_versions import (
    find_false_entries,
    find_later_base,
    find_references,
    is_removed,
    list_publications,
)
from pipeline import storage
from pipeline.datasets.dataset import RELEASED_STAGES, Dataset, datasets
from pipeline.datasets.names import version_number
from pipeline.releases import published, release_files
from pipeline.releases.history import list_copies, read_entry
from pipeline.releases.published import Published
from pipeline.releases.signatures import NO_KEYS, ReleaseKeys, read_release_keys
from pipeline.storage import DamagedFile
from pipeline.takedowns import hidden_rows, takedown_list, takedowns

_CONTROL_FILES = ("mark.json", "rebuild.json", "gates.json")
"""Files of a version that its release does not name."""
Fault = dict[str, str]
"""{"path": a place below the root, "fault": a sentence}."""


def list_published(root: str) -> list[str]:
    """The datasets of a root with a published version, including those with a damaged or lost pointer or folder."""
    names = {name for folder in ("datasets", "published")
             for name in storage.list_folders(storage.join(storage.normalize(root), folder))}
    return [name for name in sorted(names) if _is_published(root, name)]


def _is_published(root: str, name: str) -> bool:
    try:
        current = Published.load(root, name)
        return bool(current.version) or (not current.is_removed and release_files.has_release(
            Dataset(storage.normalize(root), name)))
    except DamagedFile:
        return True


def check_published(root: str, *, quick: bool = False, keys: ReleaseKeys | None = None
                    ) -> tuple[tuple[str, ...], list[Fault]]:
    """The folders of the versions that are published now, and the faults of every version with a release.

    `quick` looks at the pointers, releases and manifests. Otherwise searches must not find what was forgotten. `keys`
    are those that must have signed the pointers, by default those of RDM_RELEASE_KEY.
    """
    root, keys = storage.normalize(root), read_release_keys() if keys is None else keys
    folders, faults = [], []
    names = list_published(root)
    if keys.accepted:  # an attacker may have removed a pointer and its history
        names = sorted({*names, *(dataset.name for dataset in datasets(root)
                                  if storage.exists(storage.join(dataset.root, dataset.path("release.json"))))})
    for name in names:
        try:
            current = Published.load(root, name, keys)
            if current.is_removed:  # `rm` was killed, and the same command removes the rest
                continue
            if not current.version:  # it has a release, or must have a signature
                published.open_dataset(root, name, keys=keys)
                continue
        except ValueError as error:
            faults.append(_fault(f"datasets/{name}/current.json", error))
            continue
        folders.append(f"datasets/{name}/{current.version}/")
        faults += _check_history(current)
        faults += _check_versions(current, quick=quick)
    faults += _check_unpublished(root, names)
    with contextlib.suppress(ValueError):  # the check of each version names a damaged list
        faults += [{"path": path, "fault": "is not this request of forgotten.json"}
                   for path in takedown_list.find_changed_copies(root)]
    return tuple(folders), faults


def _check_unpublished(root: str, published_names: list[str]) -> Iterator[Fault]:
    """Datasets that were never published and whose readers miss takedown requests."""
    for dataset in datasets(root):
        if dataset.name not in published_names and dataset.is_sealed("shards"):
            try:
                takedowns.read_forgotten_rows(dataset)
            except (ValueError, FileNotFoundError) as error:
                yield _fault(f"datasets/{dataset.name}/{dataset.version}/forgotten.json", error)


def _check_history(current: Published) -> Iterator[Fault]:
    """Entries of the history that are missing, cannot be read, or do not agree with the release, and such a pointer."""
    for url in current.damaged_history():
        there = read_entry(url)
        yield {"path": url.removeprefix(current.root).strip("/"),
               "fault": f"is publication {there['sequence']}: another one was here" if there else "is no publication"}
    for url, facts in find_false_entries(current).items():
        yield {"path": url.removeprefix(current.root).strip("/"),
               "fault": f"does not agree with the release of its version: {', '.join(facts)}"}
    for url in list_copies(current.root, current.name):
        yield {"path": url.removeprefix(current.root).strip("/"), "fault": "belongs to a repair that did not end"}
    for gap in current.missing_history():
        more = f", and so are all up to {gap[-1]:06d}.json" if len(gap) > 1 else ""
        yield {"path": f"published/{current.name}/{gap[0]:06d}.json", "fault": f"is missing{more}"}


def _check_versions(current: Published, *, quick: bool) -> Iterator[Fault]:
    """Faults of all versions that are or were published. Entries of the history may be lost, and releases."""
    folders, references = current.versions(), find_references(current)
    if fault := find_later_base(current):
        yield {"path": f"datasets/{current.name}/current.json", "fault": fault}
    released = {version for version in folders
                if release_files.has_release(Dataset(current.root, current.name, version))}
    listed = {document["version"] for document in current.history()}
    versions = sorted(released | listed, key=version_number)
    checks = storage.map_urls(partial(_check_version, current, quick=quick), versions, threads=16 if quick else 1)
    yield from itertools.chain.from_iterable(checks)
    for version in folders:
        if version in references and version not in released | listed and not is_removed(
                current.root, current.name, version):
            yield {"path": f"datasets/{current.name}/{version}/release.json",
                   "fault": f"is missing: {references[version]}"}


def _check_version(current: Published, version: str, *, quick: bool) -> list[Fault]:
    """Parts of a version that are not as they were published. gc may have removed one that is not current."""
    if version != current.version and is_removed(current.root, current.name, version):
        return []
    # Readers with a key refuse versions from before the dataset was signed.
    trusting = current if version in list_publications(current) else replace(current, keys=NO_KEYS)
    base = f"datasets/{current.name}/{version}"
    try:
        dataset = trusting.open_version(version)
    except ValueError as error:
        return [_fault(f"{base}/release.json", error)]
    stages = dict(dataset.trusted)
    checks: list[tuple[str, Callable[[], Any]]] = [(name, partial(dataset.manifest, name)) for name in stages]
    checks += [(name, partial(dataset.is_sealed, name)) for name in RELEASED_STAGES if name not in stages]
    checks.append(("forgotten.json", partial(_check_hidden_rows, dataset, quick=quick)))
    checks += [(name, partial(_refuse_odd, storage.join(current.root, base, name))) for name in _CONTROL_FILES]
    faults = []
    for name, check in checks:
        try:
            check()
        except ValueError as error:
            faults.append(_fault(f"{base}/{name}", error))
    return faults


def _refuse_odd(url: str) -> None:
    """DamagedFile if a folder, a pipe or a broken link is in the place of a file that may be missing."""
    with contextlib.suppress(FileNotFoundError):
        storage.refuse_special_file(url)


def _check_hidden_rows(dataset: Dataset, *, quick: bool) -> None:
    """ValueError if a published version does not hide rows that the takedown list names. Searches look for them then.

    `quick` does not read the rows of the version.
    """
    stored = takedowns.read_stored_rows(dataset)
    takedowns.read_forgotten_rows(dataset)
    if quick:
        return
    hidden = np.union1d(hidden_rows.read_tombstones(dataset), stored)
    unreadable: list[Exception] = []  # the check of the shards names these
    rows = [row for row, _ in takedowns.find_matching_rows(
        dataset, takedown_list.read_takedowns(dataset.root).has, unreadable)]
    if visible := sorted(set(rows) - set(hidden.tolist())):
        raise DamagedFile(f"it does not hide {len(visible)} images of the takedown list, the first is row "
                          f"{visible[0]}\n"
                          f"hint: python -m jobs repair {dataset.name} --root {storage.quote(dataset.root)}")
    samples = dataset.manifest("shards")["totals"]["samples"]
    if len(hidden) and (hidden[0] < 0 or hidden[-1] >= samples):
        raise ValueError(f"rows {hidden[0]} to {hidden[-1]} are hidden, and the version has {samples} samples")


def _fault(path: str, error: Exception) -> Fault:
    return {"path": path, "fault": storage.first_line(error)}
