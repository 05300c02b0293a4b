"""The published version of a dataset. One small file names it, and publishing swaps that file as a whole.

    <root>/datasets/<name>/current.json     version, sha256 of its release.json, time; the only file that changes
    <root>/datasets/<name>/v3/release.json  the release: sha256 of the manifests, base version, results of the gates
    <root>/published/<name>/000007.json     each published current.json, in order

A reader reads current.json once, and checks what it reads against the hashes that it leads to. Versions never change.
A pointer that is missing, or older than the history or than the last one that this machine has seen, is refused.
`repair` restores it. `rm --published` publishes that the dataset was removed: the pointer and the history stay, so no
later version gets a number that readers have seen. Readers with a public key check the signature too (signatures.py).
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline import storage
from pipeline.datasets.dataset import Dataset, refuse_unknown
from pipeline.datasets.names import version_number
from pipeline.datasets.pointer import DamagedPointer, parse_pointer, read_pointer
from pipeline.releases import version_marks
from pipeline.releases.history import (
    add_entry,
    entry_number,
    find_gaps,
    hash_first,
    history_url,
    is_same_publication,
    list_history,
    read_entry,
    read_entry_bytes,
)
from pipeline.releases.last_seen import (
    SIGNED,
    count_seen_takedowns,
    note_takedowns,
    read_last_seen,
    write_last_seen,
)
from pipeline.releases.release_files import (
    find_changed_manifests,
    find_successor,
    has_release,
    read_release_bytes,
    release_url,
)
from pipeline.releases.signatures import NO_KEYS, ReleaseKeys, read_release_keys
from pipeline.stages.documents import check_release
from pipeline.stages.types import StageFailed
from pipeline.storage import DamagedFile


@dataclass(frozen=True)
class Published:
    """The published version of a dataset, by its current.json at the time of reading."""

    root: str
    name: str
    data: bytes | None
    """The bytes of current.json; None if nothing is published."""
    document: dict[str, Any]
    keys: ReleaseKeys = field(default=NO_KEYS, compare=False, repr=False)
    """The keys that signatures are checked with, and new publications signed."""

    @classmethod
    def load(cls, root: str, name: str, keys: ReleaseKeys | None = None) -> "Published":
        """Read current.json; DamagedPointer if it is damaged, or missing, or not the newest, or not signed as it must.

        Without `keys`, those of RDM_RELEASE_KEY are accepted.
        """
        root = storage.normalize(root)
        keys = read_release_keys() if keys is None else keys
        while True:
            data = read_pointer(root, name)
            document = {} if data is None else parse_pointer(data)
            published = cls(root, name, data, document or {}, keys)
            if not (fault := "is damaged" if document is None else published._find_fault()):
                return published
            storage.forget_reads()
            if read_pointer(root, name) == data:  # otherwise another command has replaced it
                raise DamagedPointer(root, name, fault, published.repair_options())

    def repair_options(self) -> str:
        """The options that `repair` needs to publish the pointer again; "" without signatures."""
        if any("signature" in document for document in self.history()) or (
                self.keys.accepted and read_last_seen(self.root, self.name, SIGNED)):
            return " --sign KEYFILE"
        is_unsigned = self.keys.find_fault(self.name, self.document)
        return self.sign_option + (" --accept-unsigned, if the published version is right" if is_unsigned else "")

    def _find_fault(self) -> str:
        """A fault of the signature of the pointer, or a disagreement with the history or the last seen; "" without."""
        if fault := self.keys.find_fault(self.name, self.document):
            return fault
        sequence = self.document.get("sequence", 0)
        newest = max(map(entry_number, list_history(self.root, self.name)), default=0)
        if not self.document and newest:
            return f"is missing, and {newest} publications are in the history"
        if not self.document and (successor := find_successor(self.root, self.name)):
            return f"is missing, and {successor} was built on a published version"
        if sequence < newest:
            return f"is an older one: it has number {sequence}, and the history goes up to {newest}"
        if sequence == newest and sequence:
            data = read_entry_bytes(self.root, self.name, history_url(self.root, self.name, sequence))
            if not is_same_publication(parse_pointer(data) or {}, self.document):
                return f"is not publication {sequence} of the history"
        return self._find_rollback(sequence, newest)

    def _find_rollback(self, sequence: int, newest: int) -> str:
        """A disagreement of the pointer with the last one that this machine has seen; "" without one."""
        if (seen := self.last_seen_sequence()) > sequence:
            return f"is an older one: it has number {sequence}, and this machine has seen {seen}"
        note_takedowns(self.root, self.name, self.document.get("takedowns", 0))
        if self._is_signed:
            if seen < sequence:
                write_last_seen(self.root, self.name, sequence, "", SIGNED)
        elif newest and read_last_seen(self.root, self.name).get("sequence") != sequence:
            write_last_seen(self.root, self.name, sequence, hash_first(self.root, self.name))
        return ""

    def last_seen_sequence(self) -> int:
        """The number of the last publication of this history that this machine has seen; 0 if it has seen none."""
        if self._is_signed:
            return read_last_seen(self.root, self.name, SIGNED).get("sequence", 0)
        seen = read_last_seen(self.root, self.name)
        is_newer = seen.get("sequence", 0) > self.document.get("sequence", 0)
        return seen["sequence"] if is_newer and seen.get("first") == hash_first(self.root, self.name) else 0

    @property
    def _is_signed(self) -> bool:
        """Whether the pointer has a signature that was checked."""
        return bool(self.keys.accepted) and "signature" in self.document

    @property
    def version(self) -> str:
        """The published version, empty if nothing is published."""
        return "" if self.is_removed else self.document.get("version", "")

    @property
    def number(self) -> int:
        """The number of the build: the later of two has the higher one; 0 if nothing was ever published."""
        return self.document["removed"]["number"] if self.is_removed else self.document.get("number", 0)

    @property
    def sign_option(self) -> str:
        """The option with which a command publishes the next version; "" without signatures."""
        return " --sign KEYFILE" if self.keys.accepted or "signature" in self.document else ""

    @property
    def is_removed(self) -> bool:
        """Whether `rm` has removed the published dataset."""
        return "removed" in self.document

    def refuse_removed(self) -> None:
        """ValueError if `rm` has removed the published dataset."""
        if self.is_removed:
            date = time.strftime("%Y-%m-%d", time.gmtime(self.document["removed"]["at"]))
            raise ValueError(f"{self.name} was removed on {date}\nhint: to make it again: python -m jobs style "
                             f"{self.name} --source FOLDER{self.sign_option}")

    @property
    def folder(self) -> str:
        """The folder of the versions and of current.json."""
        return storage.join(self.root, "datasets", self.name)

    def versions(self) -> list[str]:
        """The versions of the dataset that have a folder, the oldest first."""
        return sorted(storage.list_folders(self.folder), key=lambda version: (version_number(version), version))

    def open(self) -> Dataset:
        """The published version, with the hashes to check it by; ValueError if its release is not the published one."""
        return self._open(Dataset(self.root, self.name, self.version), self.document["release"])

    def open_version(self, version: str) -> Dataset:
        """A version with the hashes under which it was last published, or of its release; without any if it has none.

        DamagedFile if signatures are checked, and no publication of the version has an accepted one.
        """
        dataset, fault = Dataset(self.root, self.name, version), "was never published"
        for document in reversed(self.history()):
            if document["version"] == version:
                fault = self.keys.find_fault(self.name, document)
                if not fault:
                    return self._open(dataset, document["release"])
        if self.keys.accepted:
            raise DamagedFile(_untrusted(self.name, version, fault))
        data = read_release_bytes(dataset)  # its entry in the history may be lost
        return dataset if data is None else self._open(dataset, hashlib.sha256(data).hexdigest())

    def _open(self, dataset: Dataset, sha256: str) -> Dataset:
        data = read_release_bytes(dataset)
        if data is None:
            self._refuse_removed(dataset)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            fault = "is missing" if data is None else "is not the one that was published: it was changed"
            raise DamagedFile(f"the release of {dataset.name}@{dataset.version} {fault}\n"
                              f"hint: python -m jobs verify --quick --only datasets/{dataset.name}")
        release = check_release(storage.parse_json(data, release_url(dataset)), release_url(dataset))
        if dataset.version != self.version:
            self._refuse_removed(dataset, release["manifests"])
        listed = self.document.get("takedown_list", {})
        takedowns = max(self.document.get("takedowns", 0), count_seen_takedowns(self.root, self.name))
        return Dataset(dataset.root, dataset.name, dataset.version, tuple(sorted(release["manifests"].items())),
                       takedowns, (listed.get("requests", 0), listed.get("sha256", "")),
                       bool(self.keys.accepted))

    def _refuse_removed(self, dataset: Dataset, manifests: Mapping[str, str] | None = None) -> None:
        """version_marks.RemovedVersion if a version is marked for removal, and not all of its `manifests` are there."""
        if version_marks.is_removing(dataset) and (manifests is None or find_changed_manifests(dataset, manifests)):
            date = time.strftime("%Y-%m-%d", time.gmtime(version_marks.mark_time(dataset)))
            raise version_marks.RemovedVersion(f"{dataset.name}@{dataset.version} was removed on {date}\n"
                                               f"hint: python -m jobs versions {self.name}")

    def history(self) -> list[dict[str, Any]]:
        """Every current.json that there was, the oldest first, this one included."""
        documents = {document["sequence"]: document for document in self.entries.values() if document}
        if self.document:
            documents[self.document["sequence"]] = self.document
        return [documents[sequence] for sequence in sorted(documents)]

    def damaged_history(self) -> list[str]:
        """URLs of the entries of the history that cannot be read. They are left out everywhere else."""
        return sorted(url for url, document in self.entries.items() if document is None)

    def missing_history(self) -> list[range]:
        """Numbers of publications that are missing in the history since the last repair."""
        history = self.history()
        first = max((document["sequence"] for document in history if document.get("repaired")), default=1)
        return find_gaps({document["sequence"] for document in history} | set(map(entry_number, self.entries)), first)

    @cached_property
    def entries(self) -> dict[str, dict[str, Any] | None]:
        """The entries of the history by URL; None for those that cannot be read, or are in the place of another."""
        urls = list_history(self.root, self.name)
        return {url: document if document and document["sequence"] == entry_number(url) else None
                for url, document in zip(urls, storage.map_urls(read_entry, urls), strict=True)}

    def unpublished_since(self, version: str) -> float | None:
        """When a version ceased to be the published one, None if it never was; infinity if it is.

        The time is that of the store: the clock of a publisher may be wrong.
        """
        successor: int | None = None
        history = self.history()
        for position, document in enumerate(history):
            if document["version"] == version and "removed" not in document:
                if position + 1 == len(history):
                    return float("inf")
                successor = history[position + 1]["sequence"]
        return None if successor is None else self._publication_time(successor)

    def _publication_time(self, sequence: int) -> float:
        """When a publication was written. The newest may be missing in the history for a moment."""
        try:
            return storage.modified_time(history_url(self.root, self.name, sequence))
        except FileNotFoundError:
            return storage.modified_time(storage.join(self.folder, "current.json"))

    def publish(self, dataset: Dataset, data: bytes, number: int, **more: Any) -> bool:
        """Publish the release `data` of a version in the place of this one; False if another took its place.

        StageFailed if gc removes the version meanwhile. It publishes the previous version again first. ValueError if
        this one is signed and there is no key to sign with.
        """
        self.keys.refuse_unsigned(self.name, self.document)
        release = storage.parse_json(data, release_url(dataset))
        now = round(time.time(), 3)
        sequence = self._next_sequence()
        after = {"checked": now, "version": dataset.version, "number": number, "sequence": sequence,
                 "release": hashlib.sha256(data).hexdigest(), "content": release["content"],
                 "previous": self.version or None, "samples": release["samples"],
                 "recall@10": release["recall@10"], "published": now,
                 "takedowns": self.document.get("takedowns", 0), **more}
        if "takedown_list" in self.document:
            after.setdefault("takedown_list", self.document["takedown_list"])
        after = self.keys.sign(self.name, after)
        version_marks.mark_publishing(dataset, sequence)
        if self.document:  # the publisher may have been killed before it did so
            add_entry(self.root, self.name, self.document)
        if not self._swap(after):
            return False
        add_entry(self.root, self.name, after)
        if version_marks.is_removing(dataset) or find_changed_manifests(dataset, release["manifests"]):
            if self.document:
                Published(self.root, self.name, storage.json_bytes(after), after, self.keys).replace(
                    self.document | {"sequence": sequence + 1, "rolled_back": dataset.version, "published": now})
            raise StageFailed(f"{dataset.name}@{dataset.version} was removed while it was published\n"
                              f"hint: the same rebuild makes another version")
        return True

    def replace(self, document: dict[str, Any]) -> bool:
        """Put a repaired pointer in the place of this one, and into the history; False if another took its place.

        ValueError if this one is signed and there is no key to sign with.
        """
        self.keys.refuse_unsigned(self.name, self.document)
        document = self.keys.sign(self.name, document)
        if not self._swap(document):
            return False
        add_entry(self.root, self.name, document)
        return True

    def withdraw(self) -> bool:
        """Publish that the dataset is removed; False if another command has published meanwhile.

        The next version gets a number above those of all versions that there are. A removed dataset stays as it is.
        """
        if self.document:  # its publisher may have been killed before it did so
            add_entry(self.root, self.name, self.document)
        if self.is_removed or not self.document:
            return True
        number = max([self.number, *map(version_number, self.versions())])
        kept = {key: value for key, value in self.document.items() if key not in {"rolled_back", "repaired"}}
        return self.replace(kept | {"sequence": self._next_sequence(), "previous": self.version,
                                    "removed": {"at": round(time.time(), 3), "number": number}})

    @property
    def needs_signature(self) -> bool:
        """Whether this command has a key, and the pointer is not signed by it."""
        return self.keys.private is not None and bool(self.document) and not self.keys.has_signed(self.document)

    def sign_again(self, **more: Any) -> bool:
        """Publish the same version again with a signature of this command's key; False if another took its place."""
        now = round(time.time(), 3)
        add_entry(self.root, self.name, self.document)  # its publisher may have been killed before it did so
        again = {"sequence": self._next_sequence(), "published": now, "checked": now}
        return self.replace(self.document | again | more)

    def _next_sequence(self) -> int:
        """The number of the next publication: above all that this machine has seen signed, or readers refuse it."""
        seen = read_last_seen(self.root, self.name, SIGNED) if self.keys.private else {}
        return max(self.document.get("sequence", 0), seen.get("sequence", 0)) + 1

    def require_takedowns(self, listed: dict[str, Any], *, replace: bool = False) -> bool:
        """Note that requests of the takedown list apply here; False if another was published meanwhile.

        `listed`: their count and hash ("requests", "sha256"). `replace`: also where the pointer counts as many.
        """
        known = self.document.get("takedown_list", {"requests": 0})
        if known == listed or (known["requests"] >= listed["requests"] and not replace):
            return True
        count = max(listed["requests"], self.document.get("takedowns", 0))
        return self._swap(self.document | {"takedowns": count, "takedown_list": listed})

    def mark_checked(self) -> None:
        """Note that the source was compared and nothing had changed; without effect if another was published."""
        self._swap(self.document | {"checked": round(time.time(), 3)})

    def _swap(self, document: dict[str, Any]) -> bool:
        url = storage.join(self.folder, "current.json")
        data = storage.json_bytes(document)
        # If the answer of S3 is lost, boto sends the request again, and the pointer is then another one: this one.
        return storage.swap_bytes(data, url, self.data) or read_pointer(self.root, self.name) == data


def open_dataset(root: str, text: str, pinned: str = "", keys: ReleaseKeys | None = None) -> Dataset:
    """The dataset that `text` (NAME or NAME@VERSION) means to readers.

    Without a version it is `pinned` if that is one of this name, else the published one, and v1 where nothing was ever
    published. The bytes of a version that was published are checked against their hashes.

    ValueError if signatures are checked, and the version has no publication with an accepted one. Without `keys`, those
    of RDM_RELEASE_KEY are accepted.
    """
    dataset, keys = Dataset.parse(root, text), read_release_keys() if keys is None else keys
    published = _load_known(root, dataset.name, keys)
    if "@" in text:
        return published.open_version(dataset.version)
    if pinned and (wanted := Dataset.parse(root, pinned)).name == dataset.name:
        return published.open_version(wanted.version)
    if published.version:
        return published.open()
    if keys.accepted:
        raise DamagedFile(_untrusted(dataset.name, dataset.version, "was never published"))
    if has_release(dataset):
        raise DamagedPointer(published.root, dataset.name, f"is missing, and {dataset.version} has a release")
    return dataset


def open_label(root: str, label: str, keys: ReleaseKeys | None = None) -> Dataset:
    """The dataset with a label, as plans keep it: NAME means v1. Its signature is checked like in `open_dataset`."""
    dataset, keys = Dataset.parse(root, label), read_release_keys() if keys is None else keys
    return _load_known(root, dataset.name, keys).open_version(dataset.version)


def _load_known(root: str, name: str, keys: ReleaseKeys) -> Published:
    """The pointer of a dataset; ValueError if there is no such dataset, or if it was removed."""
    published = Published.load(root, name, keys)
    published.refuse_removed()
    if not published.version:
        refuse_unknown(published.root, name)
    return published


def _untrusted(name: str, version: str, fault: str) -> str:
    return (f"{name}@{version} {fault}, and RDM_RELEASE_KEY or --key accepts only signed versions\n"
            f"hint: python -m jobs rebuild {name} --source SOURCE --sign KEYFILE")
