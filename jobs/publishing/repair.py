"""Restore what readers of a published dataset refuse: its pointer, the takedown list, the rows that a version hides."""

import hashlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from jobs.publishing.forget import apply_takedowns
from pipeline import storage
from pipeline.datasets import published, takedowns
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.last_seen import read_last_seen
from pipeline.datasets.pointer import DamagedPointer, parse_pointer, read_pointer
from pipeline.datasets.published import Published
from pipeline.datasets.release_files import find_missing_files
from pipeline.datasets.signatures import ReleaseKeys, read_release_keys
from pipeline.stages.types import StageFailed

_log = logging.getLogger(__name__)


def repair(root: str, name: str, *, dry_run: bool = False, keys: ReleaseKeys | None = None,
           accept_lost_requests: bool = False) -> dict[str, Any]:
    """Restore the pointer of a dataset from its publication history, then the takedown list and the hidden rows.

    The newest publication whose files are all there is published again, under a new sequence number. A pointer that is
    in order stays. StageFailed if another command publishes meanwhile, or if no publication is whole. The pointer names
    the newest one then, and `rebuild` replaces it.

    With public keys it restores only publications that one of them has signed. A new sequence number needs a new
    signature, so the repair of a signed dataset needs the private key. It signs a pointer that this key has not signed.

    DamagedFile if takedown requests are lost. `accept_lost_requests` puts records in their place.
    """
    root, keys = storage.normalize(root), read_release_keys() if keys is None else keys
    report: dict[str, Any] = {"dataset": name} | ({"dry_run": True} if dry_run else {})
    if accept_lost_requests and not dry_run and (accepted := takedowns.accept_lost_requests(root)):
        _log.warning("repair: the takedown requests %s are lost, and were accepted as lost", accepted)
        report["accepted_lost_requests"] = accepted
    try:
        current = Published.load(root, name, keys)
        if not current.version and report.get("accepted_lost_requests") and not list(_from_releases(root, name)):
            return report | {"published": None}
        if not current.version and not list(_from_releases(root, name)):
            raise ValueError(f"nothing of {name} is published in {root}\n"
                             f"hint: python -m jobs rebuild {name} --source SOURCE")
        if not current.version:
            raise DamagedPointer(root, name, "is missing, and versions have a release")
        report |= {"published": current.version, "pointer": "in order"}
        if current.needs_signature:
            report["pointer"] = _sign(current, dry_run=dry_run)
        report |= {"damaged": fault} if (fault := _find_fault(root, name, current.document)) else {}
    except DamagedPointer as error:
        _log.warning("repair: %s", str(error).splitlines()[0])
        report |= _restore_pointer(root, name, keys, dry_run=dry_run)
    if dry_run:
        if not accept_lost_requests:
            takedowns.refuse_lost_requests(root)
        return report
    restored = takedowns.restore_takedowns(root)
    if takedowns.count_requests(root)[0]:
        applied, unreadable = apply_takedowns(root)
        hidden = [entry for entry in applied if entry["dataset"].startswith(f"{name}@")]
        if unreadable:
            report["unreadable"] = [f"{dataset.name}@{dataset.version}" for dataset in unreadable]
        report |= {"takedown_list": "restored" if restored or "accepted_lost_requests" in report else "in order",
                   "hidden_now": sum(entry["hidden_now"] for entry in hidden)}
    if report.get("damaged"):
        if report["pointer"] != "restored":
            raise StageFailed(f"the published {name}@{report['published']} is damaged: {report['damaged']}\n"
                              f"hint: python -m jobs rollback {name}; or python -m jobs rebuild {name} --source SOURCE")
        raise StageFailed(f"no published version of {name} is whole; {report['published']} is the newest: "
                          f"{report['damaged']}\nhint: python -m jobs rebuild {name} --source SOURCE")
    return report


def _sign(current: Published, *, dry_run: bool) -> str:
    """Sign a published version that is whole; what became of its pointer."""
    if fault := _find_fault(current.root, current.name, current.document):
        raise ValueError(f"{current.name}@{current.version} is not signed, for it is not whole: {fault}")
    if not dry_run and not current.sign_again():
        raise StageFailed(f"another command published a version of {current.name} meanwhile\n"
                          f"hint: python -m jobs versions {current.name}")
    return "signed"


def _restore_pointer(root: str, name: str, keys: ReleaseKeys, *, dry_run: bool) -> dict[str, Any]:
    data = read_pointer(root, name)
    candidates = _candidates(root, name, keys, data)
    if not candidates:
        if keys.accepted:
            way = (f"remove datasets/{name}/current.json and published/{name}; then python -m jobs rebuild {name} "
                   f"--source SOURCE --sign KEYFILE --accept-unsigned" if keys.accept_unsigned else
                   f"python -m jobs repair {name} --root {root} --sign KEYFILE --accept-unsigned, if the published "
                   f"version is right")
            raise ValueError(f"{name} in {root} has no readable publication with an accepted signature\nhint: {way}")
        raise ValueError(f"{name} in {root} has no readable publication and no release: its pointer cannot be restored"
                         f"\nhint: remove datasets/{name}/current.json; then python -m jobs rebuild {name} --source "
                         f"SOURCE")
    if not dry_run:
        keys.refuse_unsigned(name, *candidates)
    faults = [(document, _find_fault(root, name, document)) for document in candidates]
    document, fault = next(((document, fault) for document, fault in faults if not fault), faults[0])
    newest = max([document["sequence"] for document in candidates], default=0)
    files = storage.list_files(storage.join(root, "published", name))  # readers compare with damaged ones too
    newest = max([newest, *(int(file[:-5]) for file in files if file[:-5].isdigit())])
    seen = max(read_last_seen(root, name, signed=signed).get("sequence", 0) for signed in (False, True))
    there = parse_pointer(data or b"") or {}
    after = document | {"sequence": max(newest, seen, there.get("sequence", 0)) + 1, "repaired": True,
                        "published": round(time.time(), 3), "previous": candidates[0]["version"]}
    report = {"published": document["version"], "pointer": "restored"} | ({"damaged": fault} if fault else {})
    if dry_run:
        return report
    current = Published(root, name, data, there, keys)
    damaged = current.damaged_history()
    if not current.replace(after):
        raise StageFailed(f"another command published a version of {name} meanwhile\n"
                          f"hint: python -m jobs versions {name}")
    for url in damaged:
        storage.remove(url)
    return report


def _candidates(root: str, name: str, keys: ReleaseKeys, data: bytes | None) -> list[dict[str, Any]]:
    """The publications that may be restored, the best first."""
    documents = list(_publications(root, name, keys))
    newest = max((document["sequence"] for document in documents), default=0)
    pointer = parse_pointer(data or b"")
    if pointer and pointer["sequence"] > newest and not keys.find_fault(name, pointer):
        documents.insert(0, pointer)  # its entry in the history is damaged or missing
        newest = pointer["sequence"]
    releases = [document for document in _from_releases(root, name) if not keys.find_fault(name, document)]
    if read_last_seen(root, name).get("sequence", 0) > newest:  # entries of the history are missing
        known = max((document["number"] for document in documents), default=0)
        documents = [*(release for release in releases if release["number"] > known), *documents]
    return documents or releases


def _publications(root: str, name: str, keys: ReleaseKeys) -> Iterator[dict[str, Any]]:
    """The publications in the history that can be read and trusted, the newest first, each version once."""
    base, versions = storage.join(root, "published", name), set()
    for file in reversed([file for file in storage.list_files(base) if file[:-5].isdigit()]):
        document = parse_pointer(storage.read_bytes(storage.join(base, file)))
        if document is None:
            _log.warning("repair: %s is damaged and is not used", storage.join(base, file))
        elif fault := keys.find_fault(name, document):
            _log.warning("repair: %s %s; it is not used", storage.join(base, file), fault)
        elif document["version"] not in versions:
            versions.add(document["version"])
            yield document


def _from_releases(root: str, name: str) -> Iterator[dict[str, Any]]:
    """The pointers that would name the releases, the newest first: a substitute for a lost history."""
    versions = storage.list_folders(storage.join(root, "datasets", name))
    for version in sorted(versions, key=published.version_number, reverse=True):
        try:
            release, data = published.read_release(Dataset(root, name, version))
        except ValueError as error:
            _log.warning("repair: %s", str(error).splitlines()[0])
            continue
        if release is not None:
            yield {"version": version, "number": release["number"], "sequence": 0, "content": release["content"],
                   "release": hashlib.sha256(data).hexdigest(), "published": 0.0, "checked": 0.0, "previous": None,
                   "samples": release["samples"], "recall@10": release["recall@10"]}


def _find_fault(root: str, name: str, document: dict[str, Any]) -> str:
    """A fault of a published version; "" if all its files are there."""
    try:
        dataset = Published(root, name, None, document).open()
        missing = find_missing_files(dataset, dict(dataset.trusted))
    except ValueError as error:
        return str(error).splitlines()[0]
    return f"{len(missing)} files are missing or changed, the first is {missing[0]}" if missing else ""
