"""The release of a version: write and read it; which files it stands for, and which of them are missing."""

import contextlib
import hashlib
import logging
from collections.abc import Collection, Mapping
from typing import Any

from pipeline import storage
from pipeline.datasets.dataset import RELEASED_STAGES, Dataset
from pipeline.stages.documents import check_release
from pipeline.stages.manifest import code_revision, read_manifest
from pipeline.storage import DamagedFile

_log = logging.getLogger(__name__)


def find_changed_manifests(dataset: Dataset, manifests: Mapping[str, str]) -> list[str]:
    """The stages whose manifest is missing or has another sha256 than `manifests` says (stage -> sha256)."""
    changed = []
    for stage_name, sha256 in sorted(manifests.items()):
        try:
            data = storage.read_bytes(storage.join(dataset.folder(stage_name), "manifest.json"))
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != sha256:
            changed.append(stage_name)
    return changed


def find_successor(root: str, name: str) -> str:
    """A version that was built on a published one, as its release says; "" without any.

    Such a dataset has had a pointer. A first version may have a release before it is published.
    """
    folder = storage.join(root, "datasets", name)
    for version in storage.list_folders(folder):
        with contextlib.suppress(FileNotFoundError, ValueError):
            release = storage.read_json(storage.join(folder, version, "release.json"))
            if isinstance(release, dict) and release.get("base"):
                return version
    return ""


def find_missing_files(dataset: Dataset, manifests: Mapping[str, str], *, read: bool = False,
                       suspects: Collection[str] = ()) -> list[str]:
    """URLs of the files of a release that are missing or changed. Each folder is listed once.

    `manifests` names the sha256 of the manifest of each stage. A manifest that is not that one counts as missing.
    Sizes are compared. A file that is newer than its manifest was written after the seal, and is read to compare its
    sha256. `read`: read every file. `suspects`: URLs of files to read.
    """
    changed = find_changed_manifests(dataset, manifests)
    missing = [storage.join(dataset.folder(stage_name), "manifest.json") for stage_name in changed]
    listings: dict[str, dict[str, tuple[int, float]]] = {}
    newer = 0
    for stage_name in sorted(manifests.keys() - set(changed)):
        folder = dataset.folder(stage_name)
        manifest = read_manifest(folder, "", manifests[stage_name])
        sealed = storage.modified_time(storage.join(folder, "manifest.json"))
        for entry in [*manifest["files"], *(entry for record in manifest["items"] for entry in record["files"])]:
            url = storage.manifest_file_url(folder, entry["name"])
            parent, _, name = url.rpartition("/")
            if parent not in listings:
                listings[parent] = storage.list_sizes_and_times(parent)
            length, written = listings[parent].get(name, (-1, 0.0))
            is_newer = length == entry["bytes"] and written > sealed
            newer += is_newer
            in_doubt = read or is_newer or url in suspects
            if length != entry["bytes"] or (in_doubt and storage.sha256(url) != entry["sha256"]):
                missing.append(url)
    if newer:
        _log.info("%s: %d files are newer than their manifests and were read again", dataset.label, newer)
    return missing


def has_release(dataset: Dataset) -> bool:
    """Whether a version has a release, even a damaged one, or something odd in its place."""
    try:
        return storage.exists(release_url(dataset))
    except DamagedFile:
        return True


def read_release(dataset: Dataset) -> tuple[dict[str, Any] | None, bytes]:
    """The release of a version and its bytes; None if it has none. DamagedFile if it is damaged."""
    url, data = release_url(dataset), read_release_bytes(dataset)
    return (None, b"") if data is None else (check_release(storage.parse_json(data, url), url), data)


def read_release_bytes(dataset: Dataset) -> bytes | None:
    """The bytes of the release of a version; None if it has none."""
    try:
        return storage.read_bytes(release_url(dataset))
    except FileNotFoundError:
        return None


def hash_manifests(dataset: Dataset) -> dict[str, str]:
    """sha256 of the manifest of each sealed stage that belongs to a release; ValueError if one is stale or missing."""
    hashes = {}
    for name in RELEASED_STAGES:
        if name in {"shards", "embeddings", "index"} or dataset.is_sealed(name):
            dataset.identity(name)
            data = storage.read_bytes(storage.join(dataset.folder(name), "manifest.json"))
            hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


def write_release(dataset: Dataset, about: dict[str, Any]) -> bytes:
    """Write the release of a version if there is none. Returns its bytes.

    An existing release must have the same manifests: a version never changes.
    """
    hashes = hash_manifests(dataset)
    document = {"name": dataset.name, "version": dataset.version, "manifests": hashes,
                "content": storage.digest(hashes), "code": code_revision(), **about}
    storage.create_bytes(storage.json_bytes(document), release_url(dataset))
    release, data = read_release(dataset)
    if release is None or release["manifests"] != hashes:
        raise ValueError(f"{dataset.name}@{dataset.version} was released with other content than it has now\n"
                         f"hint: a version never changes; make another")
    return data


def release_url(dataset: Dataset) -> str:
    """The URL of the release of a version."""
    return storage.join(dataset.root, "datasets", dataset.name, dataset.version, "release.json")
