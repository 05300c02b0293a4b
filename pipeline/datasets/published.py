"""Which version of a dataset readers get: one small file that is swapped whole.

    <root>/datasets/<name>/current.json     the version, the sha256 of its release.json, since when; all that changes
    <root>/datasets/<name>/v3/release.json  what is published: sha256 of the manifests, its base, what the gates saw
    <root>/published/<name>/000007.json     every pointer that ever stood there, in order

A reader resolves the pointer once, and holds what it reads against the hashes that it leads to. Versions never change.
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
class Pointer:
    """What stands in current.json, and its bytes."""

    data: bytes
    document: dict[str, Any]

    @property
    def version(self) -> str:
        """The published version."""
        return self.document["version"]

    @property
    def number(self) -> int:
        """Which build it is: of two the later one has the higher number."""
        return self.document["number"]


def folder(root: str, name: str) -> str:
    """Where the versions of a dataset are, and its pointer."""
    return storage.join(storage.normalize(root), "datasets", name)


def current(root: str, name: str) -> Pointer | None:
    """The pointer of a dataset, None if nothing is published; ValueError if it is damaged."""
    url = storage.join(folder(root, name), "current.json")
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    document = storage.parse_json(data, url)
    if not isinstance(document, dict) or not document.keys() >= _KEYS:
        raise ValueError(f"{url} is damaged\nhint: python -m jobs rollback {name} publishes an earlier version again")
    return Pointer(data, document)


def reader(root: str, text: str, pinned: str = "") -> Dataset:
    """The dataset that `text` (NAME or NAME@VERSION) means to those who read it.

    Without a version it is `pinned` if that is one of this name, else the published one, whose bytes will be held
    against their hashes, and v1 where nothing was ever published.
    """
    dataset = Dataset.parse(root, text)
    if "@" in text:
        return dataset
    if pinned and Dataset.parse(root, pinned).name == dataset.name:
        return trusted(Dataset.parse(root, pinned))
    pointer = current(root, dataset.name)
    return opened(dataset.root, dataset.name, pointer) if pointer else dataset


def opened(root: str, name: str, pointer: Pointer) -> Dataset:
    """The version that a pointer leads to; ValueError if its release is not the one that was published."""
    dataset = Dataset(storage.normalize(root), name, pointer.version)
    return _trusting(dataset, pointer.document["release"])


def trusted(dataset: Dataset) -> Dataset:
    """A version with the hashes under which it was published, as the history of pointers has them, if it ever was."""
    for document in reversed(history(dataset.root, dataset.name)):
        if document["version"] == dataset.version:
            return _trusting(dataset, document["release"])
    return dataset


def _trusting(dataset: Dataset, sha256: str) -> Dataset:
    release, data = released(dataset)
    if release is None or hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"the release of {dataset.name}@{dataset.version} is not the one that was published: somebody "
                         f"changed or removed it\nhint: python -m jobs rollback {dataset.name}")
    return Dataset(dataset.root, dataset.name, dataset.version, tuple(sorted(release["manifests"].items())))


def released(dataset: Dataset) -> tuple[dict[str, Any] | None, bytes]:
    """The release of a version and its bytes; None if it has none."""
    url = storage.join(folder(dataset.root, dataset.name), dataset.version, "release.json")
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None, b""
    return storage.parse_json(data, url), data


def manifests(dataset: Dataset) -> dict[str, str]:
    """sha256 of the manifest of each sealed stage that belongs to a release; ValueError if one is stale or missing."""
    found = {}
    for name in STAGES:
        if name in {"shards", "embeddings", "index"} or dataset.sealed(name):
            dataset.identity(name)
            data = storage.read_bytes(storage.join(dataset.folder(name), "manifest.json"))
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def release(dataset: Dataset, about: dict[str, Any]) -> bytes:
    """Write the release of a version, or find that there is one; its bytes.

    What was published of the same version before must be the same: a version never changes.
    """
    prints = manifests(dataset)
    document = {"name": dataset.name, "version": dataset.version, "manifests": prints,
                "content": storage.digest(prints), "code": code_revision(), **about}
    url = storage.join(folder(dataset.root, dataset.name), dataset.version, "release.json")
    storage.create_bytes(storage.json_bytes(document), url)
    there, data = released(dataset)
    if there is None or there["manifests"] != prints:
        raise ValueError(f"{dataset.name}@{dataset.version} was released with other content than it has now\n"
                         f"hint: a version never changes; make another")
    return data


def number_of(version: str) -> int:
    """The number in a version's name: 3 of v3, 0 of others."""
    match = _NUMBERED.fullmatch(version)
    return int(match[1]) if match else 0


def versions(root: str, name: str) -> list[str]:
    """The versions of a dataset that have a folder, the oldest first."""
    return sorted(storage.list_folders(folder(root, name)), key=lambda one: (number_of(one), one))


def publish(dataset: Dataset, data: bytes, number: int, before: Pointer | None, **more: Any) -> bool:
    """Swap the pointer from `before` to the release `data` of a version; False if another one stands there now."""
    document = json.loads(data)
    after = {"version": dataset.version, "number": number,
             "sequence": before.document["sequence"] + 1 if before else 1,
             "release": hashlib.sha256(data).hexdigest(), "content": document["content"],
             "previous": before.version if before else None,
             "samples": document["samples"], "recall@10": document["recall@10"], "published": round(time.time(), 3),
             **more}
    return swap(dataset.root, dataset.name, before, {"checked": after["published"]} | after)


def swap(root: str, name: str, before: Pointer | None, after: dict[str, Any]) -> bool:
    """Put a pointer in the place of another, and both into the history; False if another one stands there now."""
    if before:  # of one whose publisher was killed before it could
        _remember(root, name, before.document)
    data = storage.json_bytes(after)
    if not storage.swap_bytes(data, storage.join(folder(root, name), "current.json"), before.data if before else None):
        return False
    _remember(root, name, after)
    return True


def checked(root: str, name: str, pointer: Pointer) -> None:
    """Note that the source was looked at, and nothing had changed; of no matter if somebody published meanwhile."""
    after = pointer.document | {"checked": round(time.time(), 3)}
    storage.swap_bytes(storage.json_bytes(after), storage.join(folder(root, name), "current.json"), pointer.data)


def _past(root: str, name: str) -> str:
    return storage.join(storage.normalize(root), "published", name)


def _remember(root: str, name: str, document: dict[str, Any]) -> None:
    url = storage.join(_past(root, name), f"{document['sequence']:06d}.json")
    storage.create_bytes(storage.json_bytes(document), url)


def history(root: str, name: str) -> list[dict[str, Any]]:
    """Every pointer that stood there, the first one first; the one that stands there now is the last."""
    base = _past(root, name)
    found = {one["sequence"]: one for one in storage.map_urls(
        lambda file: storage.read_json(storage.join(base, file)), storage.list_files(base))}
    if pointer := current(root, name):
        found[pointer.document["sequence"]] = pointer.document
    return [found[sequence] for sequence in sorted(found)]


def unpublished_since(root: str, name: str, version: str) -> float | None:
    """When a version ceased to be the published one, None if it never was; infinity if it is."""
    gone: float | None = None
    past = history(root, name)
    for one, after in zip(past, [*past[1:], None], strict=True):
        if one["version"] == version:
            gone = after["published"] if after else float("inf")
    return gone
