"""Restore the damaged parts of a published dataset: its pointer, the takedown list, the hidden rows of a version."""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from jobs.publishing.forget import Unread, apply_takedowns, require_requests
from jobs.publishing.whole_versions import (
    find_false_entries,
    find_false_facts,
    find_fault,
    find_later_base,
    find_way_back,
)
from pipeline import storage
from pipeline.datasets.dataset import DEFAULT_VERSION, Dataset
from pipeline.datasets.names import version_number
from pipeline.datasets.pointer import DamagedPointer, parse_pointer, read_pointer
from pipeline.releases import release_files
from pipeline.releases.history import add_entry, entry_number, history_url, list_history, read_entry, restore_places
from pipeline.releases.last_seen import SIGNED, read_last_seen
from pipeline.releases.published import Published
from pipeline.releases.signatures import ReleaseKeys, read_release_keys
from pipeline.stages.types import StageFailed
from pipeline.storage import DamagedFile
from pipeline.takedowns import takedown_list, takedowns

_log = logging.getLogger(__name__)


def repair(root: str, name: str, *, dry_run: bool = False, keys: ReleaseKeys | None = None,
           accept_lost_requests: bool = False, accept_lost_publications: bool = False) -> dict[str, Any]:
    """Restore the pointer of a dataset from its publication history, then the takedown list and the hidden rows.

    The newest publication whose files are all there is published again, under a new sequence number. A pointer that is
    in order stays. StageFailed if another command publishes meanwhile, or if no publication is whole. The pointer names
    the newest one then, and `rebuild` replaces it.

    With public keys it restores only publications that one of them has signed. A new sequence number needs a new
    signature, so the repair of a signed dataset needs the private key. It signs a pointer that this key has not signed.

    A dataset that was made by hand has no pointer: "published" is None then.

    DamagedFile if takedown requests are lost. `accept_lost_requests` puts records in their place. DamagedFile if this
    machine has seen publications that are lost, unless a later release is there, or with `accept_lost_publications`.
    """
    root, keys = storage.normalize(root), read_release_keys() if keys is None else keys
    report: dict[str, Any] = {"dataset": name} | ({"dry_run": True} if dry_run else {})
    accepted = _accept_requests(root) if accept_lost_requests and not dry_run else {}
    if not dry_run and (moved := restore_places(root, name, lambda document: not keys.find_fault(name, document))):
        _log.warning("repair: these entries of the history were in the place of others: %s", ", ".join(moved))
        report["history"] = "restored"
    report |= accepted | _repair_pointer(root, name, keys, accepted=bool(accepted), dry_run=dry_run,
                                         accept_lost=accept_lost_publications)
    if report["published"] is None:
        return report if dry_run else report | _repair_takedowns(root, name, accepted=bool(accepted))
    if not dry_run:
        report |= _repair_takedowns(root, name, accepted=bool(accepted))
        _refuse_damaged(Published.load(root, name, keys), report)
    elif not accept_lost_requests:
        takedown_list.refuse_lost_requests(root)
    return report


def _accept_requests(root: str) -> dict[str, Any]:
    """Accept lost requests and changes of the takedown list, and update the pointers to the current list."""
    lost, changed = takedown_list.accept_lost_requests(root, lambda: takedowns.hidden_hashes(root))
    if lost:
        _log.warning("repair: the takedown requests %s are lost, and were accepted as lost", lost)
    if changed:
        _log.warning("repair: the changed takedown list was accepted as it is")
    if lost or changed:
        require_requests(root, storage.list_folders(storage.join(root, "datasets")), replace=True)
    return ({"accepted_lost_requests": lost} if lost else {}) | ({"accepted_changes": True} if changed else {})


def _repair_pointer(root: str, name: str, keys: ReleaseKeys, *, accepted: bool, dry_run: bool, accept_lost: bool
                    ) -> dict[str, Any]:
    """Restore the pointer and the history; {"published", "pointer", and "damaged": a fault of that version}."""
    try:
        current = Published.load(root, name, keys)
        if current.is_removed or (not current.version and not list(_from_releases(root, name))):
            by_hand = not current.is_removed and name in storage.list_folders(storage.join(root, "datasets"))
            if accepted or (by_hand and takedown_list.has_requests(root)):
                return {"published": None}
            current.refuse_removed()
            raise ValueError(f"nothing of {name} is published in {root}\n"
                             f"hint: python -m jobs rebuild {name} --source SOURCE{current.sign_option}")
        if not current.version:
            raise DamagedPointer(root, name, "is missing, and versions have a release")
        if fault := find_later_base(current):
            raise DamagedPointer(root, name, fault)
    except DamagedPointer as error:
        _log.warning("repair: %s", storage.first_line(error))
        return _restore_pointer(root, name, keys, accepted=accepted, dry_run=dry_run, accept_lost=accept_lost)
    fault = find_fault(current, current.document)
    report = {"published": current.version, "pointer": "in order"} | ({"damaged": fault} if fault else {})
    if current.damaged_history() or current.missing_history() or find_false_entries(current):
        return report | _close_history(current, dry_run=dry_run)
    if not storage.exists(url := history_url(root, name, current.document["sequence"])):
        # Its publisher may have been killed before it did so. The pointer says what belongs there, so no reader minds.
        _log.info("repair: %s is missing, and the pointer has its content", url)
        if not dry_run:
            add_entry(root, name, current.document)
        report |= {"history": "restored"}
    return report | (_sign(current, fault, dry_run=dry_run, accept_lost=accept_lost) if current.needs_signature else {})


def _close_history(current: Published, *, dry_run: bool) -> dict[str, Any]:
    """Publish the same version again: no reader then needs the entries of the history before a repair."""
    damaged, false = current.damaged_history(), find_false_entries(current)
    lost = [url.rpartition("/")[2] for url in damaged]
    lost += [f"{gap[0]} to {gap[-1]}" for gap in current.missing_history()]
    if lost:
        _log.warning("repair: these publications of %s are lost: %s. Versions that no other names cannot be published "
                     "again", current.name, ", ".join(lost))
    if not dry_run:
        _refuse_special_files(current, damaged)
        if not current.sign_again(repaired=True, **find_false_facts(current, current.document)):
            _refuse_superseded(current.name)
        _remove(damaged)
        for url, facts in false.items():
            if entry := current.entries.get(url):  # the pointer is replaced already
                storage.put_json(entry | facts, url)
    return {"history": "restored"}


def _repair_takedowns(root: str, name: str, *, accepted: bool) -> dict[str, Any]:
    """Restore the takedown list and hide its rows again; {} if there is no list."""
    restored = takedown_list.restore_takedowns(root)
    if not takedown_list.count_requests(root)[0]:
        return {}
    unreadable = Unread()
    applied = apply_takedowns(root, unreadable)
    for label, fault in unreadable.items():
        if label.partition("@")[0] == name and not read_pointer(root, name):  # `_refuse_damaged` looks at the others
            label = label.removesuffix(f"@{DEFAULT_VERSION}")
            raise DamagedFile(f"{label} cannot be read, so the rows to hide in it are not known: {fault}\n"
                              f"hint: python -m jobs shard {label} --source FOLDER --overwrite")
    report: dict[str, Any] = {
        "takedown_list": "restored" if restored or accepted else "in order",
        "hidden_now": sum(entry["hidden_now"] for entry in applied if entry["dataset"].startswith(f"{name}@"))}
    if unreadable:
        report["unreadable"] = list(unreadable)
    return report


def _refuse_damaged(current: Published, report: dict[str, Any]) -> None:
    """StageFailed if the published version is damaged, with the command that replaces it."""
    if not report.get("damaged"):
        return
    hint = f"hint: {find_way_back(current)}"
    if report["pointer"] == "restored":
        raise StageFailed(f"no published version of {current.name} is whole; {current.version} is the newest: "
                          f"{report['damaged']}\n{hint}")
    raise StageFailed(f"the published {current.name}@{current.version} is damaged: {report['damaged']}\n{hint}")


def _sign(current: Published, fault: str, *, dry_run: bool, accept_lost: bool) -> dict[str, Any]:
    """Sign an undamaged published version. Returns what happened to its pointer, and the numbers that are lost."""
    lost = _lost_signatures(current.root, current.name, current.keys, current.history())
    if lost and not accept_lost:
        _refuse_lost_publications(current, current.version, lost)
    if fault:
        raise ValueError(f"{current.name}@{current.version} is not signed, for it is not whole: {fault}\n"
                         f"hint: {find_way_back(current)}")
    if not dry_run and not current.sign_again():
        _refuse_superseded(current.name)
    return {"pointer": "signed"} | _note_lost(current.name, lost)


def _refuse_superseded(name: str) -> NoReturn:
    raise StageFailed(f"another command published a version of {name} meanwhile\nhint: python -m jobs versions {name}")


def _refuse_special_files(current: Published, urls: list[str]) -> None:
    """DamagedFile if a damaged entry of the history is no file: what it is may not be ours to remove."""
    with storage.verify_replaced(lambda: f"python -m jobs repair {current.name}"):
        for url in urls:
            storage.refuse_special_file(url)


def _remove(urls: list[str]) -> None:
    for url in urls:
        storage.remove(url)


def _restore_pointer(root: str, name: str, keys: ReleaseKeys, *, accepted: bool, dry_run: bool, accept_lost: bool
                     ) -> dict[str, Any]:
    data = read_pointer(root, name)
    candidates, lost = _find_candidates(root, name, keys, data)
    if not candidates:
        _refuse_nothing_left(root, name, keys)
    current = Published(root, name, data, parse_pointer(data or b"") or {}, keys)
    if lost and not accept_lost:
        _refuse_lost_publications(current, candidates[0]["version"], lost)
    if not dry_run:
        keys.refuse_unsigned(name, *candidates)
    if "removed" in candidates[0]:
        document, fault = candidates[0], ""
    else:
        faults = [(document, find_fault(current, document)) for document in candidates]
        document, fault = next(((document, fault) for document, fault in faults if not fault), faults[0])
    newest = max([document["sequence"] for document in candidates], default=0)
    newest = max([newest, *map(entry_number, list_history(root, name))])  # readers compare with damaged ones too
    seen = max(read_last_seen(root, name, kind).get("sequence", 0) for kind in ("", SIGNED))
    after = document | {"sequence": max(newest, seen, current.document.get("sequence", 0)) + 1, "repaired": True,
                        "published": round(time.time(), 3), "previous": candidates[0]["version"]}
    if accepted and "takedown_list" in after:
        after["takedown_list"] = takedown_list.describe_list(root)
    report = {"published": None if "removed" in document else document["version"], "pointer": "restored"}
    report |= {"damaged": fault} if fault else {}
    report |= _note_lost(name, lost)
    if dry_run:
        return report
    damaged = current.damaged_history()
    _refuse_special_files(current, damaged)
    if not current.replace(after):
        _refuse_superseded(name)
    _remove(damaged)
    return report


def _note_lost(name: str, lost: range) -> dict[str, Any]:
    if not lost:
        return {}
    _log.warning("repair: publications %d to %d of %s are lost, and were accepted as lost", lost[0], lost[-1], name)
    return {"accepted_lost_publications": list(lost)}


def _lost_signatures(root: str, name: str, keys: ReleaseKeys, documents: Iterable[dict[str, Any]]) -> range:
    """Numbers of publications that this machine has seen with an accepted signature, and that none has now."""
    seen = read_last_seen(root, name, SIGNED).get("sequence", 0) if keys.accepted else 0
    newest = max((document["sequence"] for document in documents
                  if "signature" in document and not keys.find_fault(name, document)), default=0)
    return range(newest + 1, seen + 1)


def _refuse_nothing_left(root: str, name: str, keys: ReleaseKeys) -> NoReturn:
    if keys.accepted:
        way = (f"remove datasets/{name}/current.json and published/{name}; then python -m jobs rebuild {name} "
               f"--source SOURCE --sign KEYFILE --accept-unsigned" if keys.accept_unsigned else
               f"python -m jobs repair {name} --root {storage.quote(root)} --sign KEYFILE --accept-unsigned, if the "
               f"published version is right")
        raise ValueError(f"{name} in {root} has no readable publication with an accepted signature\nhint: {way}")
    raise ValueError(f"{name} in {root} has no readable publication and no release to restore its pointer from"
                     f"\nhint: remove datasets/{name}/current.json; then python -m jobs rebuild {name} --source "
                     f"SOURCE")


def _refuse_lost_publications(current: Published, version: str, lost: range) -> NoReturn:
    name, options = current.name, current.repair_options()
    if current.keys.accept_unsigned and "--accept-unsigned" not in options:
        options += " --accept-unsigned"
    raise DamagedFile(f"publications {lost[0]} to {lost[-1]} of {name} are lost: this machine has seen {lost[-1]}, and "
                      f"published/{name} has none of them that is accepted: restore published/{name} from a backup\n"
                      f"hint: if there is none, and {version} may be published again: python -m jobs repair {name} "
                      f"--root {storage.quote(current.root)}{options} --accept-lost-publications")


def _find_candidates(root: str, name: str, keys: ReleaseKeys, data: bytes | None) -> tuple[list[dict[str, Any]], range]:
    """The publications that may be restored, the best first, and the numbers of those that are lost.

    A publication is lost if this machine has seen it, and neither the history nor a later release takes its place.
    """
    documents = list(_publications(root, name, keys))
    newest = max((document["sequence"] for document in documents), default=0)
    pointer = parse_pointer(data or b"")
    if pointer and pointer["sequence"] > newest and not keys.find_fault(name, pointer):
        documents.insert(0, pointer)  # its entry in the history is damaged or missing
        newest = pointer["sequence"]
    # A release has no signature. It does not stand for a publication whose signature is not accepted.
    refused = {document.get("version") for document in (pointer, *map(read_entry, list_history(root, name)))
               if document and "signature" in document and keys.find_fault(name, document)}
    releases = [document for document in _from_releases(root, name)
                if not keys.find_fault(name, document) and document["version"] not in refused]
    newest_known = Published(root, name, data, documents[0] if documents else {}, keys)
    seen = newest_known.last_seen_sequence()
    if not documents or (seen <= newest and not find_later_base(newest_known)):
        return documents or releases, _lost_signatures(root, name, keys, documents)
    known = max(document.get("removed", document)["number"] for document in documents)
    later = [release for release in releases if release["number"] > known]
    entries = Published(root, name, data, {}, keys).entries
    is_damaged = not keys.accepted and any(url.endswith(f"/{seen:06d}.json") for url in entries)  # and is named
    return [*later, *documents], range(0) if later or is_damaged else range(newest + 1, seen + 1)


def _publications(root: str, name: str, keys: ReleaseKeys) -> Iterator[dict[str, Any]]:
    """The publications in the history that can be read and trusted, the newest first, each version once.

    The last one may say that the dataset was removed.
    """
    documents, versions = [], set()
    for url in list_history(root, name):
        document = read_entry(url)
        if document is None:
            _log.warning("repair: %s is damaged and is not used", url)
        elif fault := keys.find_fault(name, document):
            _log.warning("repair: %s %s; it is not used", url, fault)
        else:
            documents.append(document)
    for document in sorted(documents, key=lambda document: document["sequence"], reverse=True):
        if "removed" in document:  # nothing before it may be published again
            yield document
            return
        if document["version"] not in versions:
            versions.add(document["version"])
            yield document


def _from_releases(root: str, name: str) -> Iterator[dict[str, Any]]:
    """The pointers that would name the releases, the newest first: a substitute for a lost history."""
    versions = storage.list_folders(storage.join(root, "datasets", name))
    for version in sorted(versions, key=version_number, reverse=True):
        try:
            release, data = release_files.read_release(Dataset(root, name, version))
        except ValueError as error:
            _log.warning("repair: %s", storage.first_line(error))
            continue
        if release is not None:
            yield {"version": version, "number": release["number"], "sequence": 0, "content": release["content"],
                   "release": hashlib.sha256(data).hexdigest(), "published": 0.0, "checked": 0.0, "previous": None,
                   "samples": release["samples"], "recall@10": release["recall@10"]}
