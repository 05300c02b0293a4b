"""Which files a release stands for, and which of them are missing."""

import contextlib
import hashlib
import logging
from collections.abc import Mapping

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.manifest import read_manifest

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


def find_missing_files(dataset: Dataset, manifests: Mapping[str, str], *, read: bool = False) -> list[str]:
    """URLs of the files of a release that are missing or changed. Each folder is listed once.

    `manifests` names the sha256 of the manifest of each stage. A manifest that is not that one counts as missing.
    Sizes are compared. A file that is newer than its manifest was written after the seal, and is read to compare its
    sha256. `read`: read every file.
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
            if length != entry["bytes"] or ((read or is_newer) and storage.sha256(url) != entry["sha256"]):
                missing.append(url)
    if newer:
        _log.info("%s: %d files are newer than their manifests and were read again", dataset.label, newer)
    return missing
