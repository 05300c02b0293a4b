"""What is published of a dataset: one small file that is swapped whole names the version that readers get.

    <root>/datasets/<name>/current.json     the version, the sha256 of its release.json, since when; all that changes
    <root>/datasets/<name>/v3/release.json  what is published: sha256 of the manifests, its base, what the gates saw
    <root>/published/<name>/000007.json     every current.json that ever stood there, in order

A reader reads current.json once, and checks what it reads against the hashes that it leads to. Versions never change.
"""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.manifest import code_revision

STAGES = ("shards", "embeddings", "text_embeddings", "index", "tombstones")
_NUMBERED = re.compile(r"v([1-9]\d*)")
_KEYS = {"version", "number", "sequence", "release", "published"}


@dataclass(frozen=True)
class Published:
    """What is published of a dataset, as its current.json said when it was read."""

    root: str
    name: str
    data: bytes | None
    """The bytes of current.json; None if nothing is published."""
    document: dict[str, Any]

    @classmethod
    def load(cls, root: str, name: str) -> "Published":
        """Read current.json; ValueError if it is damaged."""
        root = storage.normalize(root)
        url = storage.join(root, "datasets", name, "current.json")
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            return cls(root, name, None, {})
        document = storage.parse_json(data, url)
        if not isinstance(document, dict) or not document.keys() >= _KEYS:
            raise ValueError(f"{url} is damaged\nhint: python -m jobs rollback {name} publishes an earlier version "
                             f"again")
        return cls(root, name, data, document)

    @property
    def version(self) -> str:
        """The published version, empty if nothing is published."""
        return self.document.get("version", "")

    @property
    def number(self) -> int:
        """The number of the build: the later of two has the higher one; 0 if nothing is published."""
        return self.document.get("number", 0)

    @property
    def folder(self) -> str:
        """Where the versions of the dataset are, and current.json."""
        return storage.join(self.root, "datasets", self.name)

    def versions(self) -> list[str]:
        """The versions of the dataset that have a folder, the oldest first."""
        return sorted(storage.list_folders(self.folder), key=lambda version: (version_number(version), version))

    def open(self) -> Dataset:
        """The published version, with the hashes to check it by; ValueError if its release is not the published one."""
        return _open_release(Dataset(self.root, self.name, self.version), self.document["release"])

    def open_version(self, version: str) -> Dataset:
        """A version with the hashes under which it was last published; without hashes if it never was."""
        dataset = Dataset(self.root, self.name, version)
        for document in reversed(self.history()):
            if document["version"] == version:
                return _open_release(dataset, document["release"])
        return dataset

    def history(self) -> list[dict[str, Any]]:
        """Every current.json that there was, the oldest first, this one included."""
        base = storage.join(self.root, "published", self.name)
        documents = {document["sequence"]: document for document in storage.map_urls(
            lambda file: storage.read_json(storage.join(base, file)), storage.list_files(base))}
        if self.document:
            documents[self.document["sequence"]] = self.document
        return [documents[sequence] for sequence in sorted(documents)]

    def unpublished_since(self, version: str) -> float | None:
        """When a version ceased to be the published one, None if it never was; infinity if it is."""
        since: float | None = None
        history = self.history()
        for document, successor in zip(history, [*history[1:], None], strict=True):
            if document["version"] == version:
                since = successor["published"] if successor else float("inf")
        return since

    def publish(self, dataset: Dataset, data: bytes, number: int, **more: Any) -> bool:
        """Publish the release `data` of a version in the place of this one; False if another took its place."""
        release = json.loads(data)
        now = round(time.time(), 3)
        after = {"checked": now, "version": dataset.version, "number": number,
                 "sequence": self.document.get("sequence", 0) + 1,
                 "release": hashlib.sha256(data).hexdigest(), "content": release["content"],
                 "previous": self.version or None, "samples": release["samples"],
                 "recall@10": release["recall@10"], "published": now, **more}
        if self.document:  # whoever published it may have been killed before it did so
            self._add_to_history(self.document)
        if not self._swap(after):
            return False
        self._add_to_history(after)
        return True

    def mark_checked(self) -> None:
        """Note that the source was compared and nothing had changed; without effect if another was published."""
        self._swap(self.document | {"checked": round(time.time(), 3)})

    def _swap(self, document: dict[str, Any]) -> bool:
        url = storage.join(self.folder, "current.json")
        return storage.swap_bytes(storage.json_bytes(document), url, self.data)

    def _add_to_history(self, document: dict[str, Any]) -> None:
        url = storage.join(self.root, "published", self.name, f"{document['sequence']:06d}.json")
        storage.create_bytes(storage.json_bytes(document), url)


def open_dataset(root: str, text: str, pinned: str = "") -> Dataset:
    """The dataset that `text` (NAME or NAME@VERSION) means to readers.

    Without a version it is `pinned` if that is one of this name, else the published one, whose bytes will be checked
    against their hashes, and v1 where nothing was ever published.
    """
    dataset = Dataset.parse(root, text)
    if "@" in text:
        return dataset
    published = Published.load(root, dataset.name)
    if pinned and (wanted := Dataset.parse(root, pinned)).name == dataset.name:
        return published.open_version(wanted.version)
    return published.open() if published.version else dataset


def _open_release(dataset: Dataset, sha256: str) -> Dataset:
    release, data = read_release(dataset)
    if release is None or hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"the release of {dataset.name}@{dataset.version} is not the one that was published: somebody "
                         f"changed or removed it\nhint: python -m jobs rollback {dataset.name}")
    return Dataset(dataset.root, dataset.name, dataset.version, tuple(sorted(release["manifests"].items())))


def read_release(dataset: Dataset) -> tuple[dict[str, Any] | None, bytes]:
    """The release of a version and its bytes; None if it has none."""
    url = _release_url(dataset)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None, b""
    return storage.parse_json(data, url), data


def hash_manifests(dataset: Dataset) -> dict[str, str]:
    """sha256 of the manifest of each sealed stage that belongs to a release; ValueError if one is stale or missing."""
    hashes = {}
    for name in STAGES:
        if name in {"shards", "embeddings", "index"} or dataset.is_sealed(name):
            dataset.identity(name)
            data = storage.read_bytes(storage.join(dataset.folder(name), "manifest.json"))
            hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


def write_release(dataset: Dataset, about: dict[str, Any]) -> bytes:
    """Write the release of a version, or find that there is one; its bytes.

    What was published of the same version before must be the same: a version never changes.
    """
    hashes = hash_manifests(dataset)
    document = {"name": dataset.name, "version": dataset.version, "manifests": hashes,
                "content": storage.digest(hashes), "code": code_revision(), **about}
    storage.create_bytes(storage.json_bytes(document), _release_url(dataset))
    release, data = read_release(dataset)
    if release is None or release["manifests"] != hashes:
        raise ValueError(f"{dataset.name}@{dataset.version} was released with other content than it has now\n"
                         f"hint: a version never changes; make another")
    return data


def version_number(version: str) -> int:
    """The number in a version's name: 3 of v3, 0 of others."""
    match = _NUMBERED.fullmatch(version)
    return int(match[1]) if match else 0


def _release_url(dataset: Dataset) -> str:
    return storage.join(dataset.root, "datasets", dataset.name, dataset.version, "release.json")
