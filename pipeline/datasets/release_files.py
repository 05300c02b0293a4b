"""Which files a release stands for, and which of them are missing."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.manifest import read_manifest


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


def find_missing_files(dataset: Dataset, manifests: Mapping[str, str], *, read: bool = False) -> list[str]:
    """URLs of the files of a release that are missing or have another size. Each folder is listed once.

    `manifests` names the sha256 of the manifest of each stage. A manifest that is not that one counts as missing.
    `read`: read each file, and compare its sha256 too.
    """
    changed = find_changed_manifests(dataset, manifests)
    missing = [storage.join(dataset.folder(stage_name), "manifest.json") for stage_name in changed]
    by_folder: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for stage_name in sorted(manifests.keys() - set(changed)):
        folder = dataset.folder(stage_name)
        manifest = read_manifest(folder, "", manifests[stage_name])
        for entry in [*manifest["files"], *(entry for record in manifest["items"] for entry in record["files"])]:
            parent, _, name = storage.manifest_file_url(folder, entry["name"]).rpartition("/")
            by_folder[parent][name] = entry
    for folder, files in sorted(by_folder.items()):
        there = {name: length for name, length in storage.walk(folder) if "/" not in name}
        for name, entry in sorted(files.items()):
            url = storage.join(folder, name)
            if there.get(name) != entry["bytes"] or (read and storage.sha256(url) != entry["sha256"]):
                missing.append(url)
    return missing
