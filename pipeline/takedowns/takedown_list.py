"""The takedown list of a root: what no database may hold any more, and every request for it.

    <root>/forgotten.json           hashes, URLs and domains, and every request with its date
    <root>/takedowns/000003.json    a copy of each request, from which `repair` restores the list

The list only grows. Pointers, their history and versions count its requests. The pointer of a published dataset has a
hash of them too. So readers refuse a list of equal length with other content.

A request is lost if something counts it, and neither the list nor a copy has it. Nothing is added to the list then, or
the next request would take its number.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.datasets.dataset import datasets
from pipeline.datasets.pointer import parse_pointer, read_pointer
from pipeline.downloads.urls import find_host
from pipeline.releases.last_seen import count_seen_takedowns
from pipeline.stages.documents import check_shape
from pipeline.storage import DamagedFile

NAME = "forgotten.json"
_COPIES = "takedowns"
_log = logging.getLogger(__name__)
_TRIES = 20
_KINDS = ("sha256", "urls", "domains")
_REQUEST = {f"{kind}?": [str] for kind in _KINDS}
_DOCUMENT = _REQUEST | {"requests?": [_REQUEST], "rows?": [int], "applied?": int, "through?": int,
                        "shards?": str, "digest?": str}


@dataclass(frozen=True)
class Forgotten:
    """Images by the sha256 of the fetched or stored bytes, by URL, and by domain (with its subdomains)."""

    sha256: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.sha256 or self.urls or self.domains)

    def has_name(self, name: str) -> bool:
        """Whether an image with that name or URL is in the list, as far as the name tells."""
        if self.urls and (name in self.urls or storage.redact_url(name) in self._stored_urls):
            return True
        labels = find_host(name).split(".") if self.domains else []
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of metadata (sha256, original_sha256, url) is about one of them."""
        return (row["sha256"] in self.sha256 or row.get("original_sha256") in self.sha256
                or self.has_name(row.get("url") or ""))

    def mask(self, table: pa.Table) -> np.ndarray:
        """Which rows of a table of metadata (sha256, original_sha256, url) are among them, (N,) bool."""
        among = np.zeros(table.num_rows, bool)
        for column in {"sha256", "original_sha256"} & set(table.column_names):
            hashes = pa.array(sorted(self.sha256), table[column].type)
            among |= pc.is_in(table[column], value_set=hashes).to_numpy()
        if (self.urls or self.domains) and "url" in table.column_names:
            among |= np.array([self.has_name(name or "") for name in table["url"].to_pylist()], bool)
        return among

    @cached_property
    def _stored_urls(self) -> frozenset[str]:
        """The URLs as rows have them: requests and rows of earlier versions may have more parameters."""
        return frozenset(map(storage.redact_url, self.urls))

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        return storage.digest([sorted(getattr(self, kind)) for kind in _KINDS])


def read_takedowns(root: str) -> Forgotten:
    """All requests below a root. ValueError if the list is damaged or changed, or lacks a request."""
    # Requests are counted in the opposite order of their writing: one that is added meanwhile is not missing.
    refuse_lost_requests(root, replace_damaged=False)
    copies = count_copies(root)
    counted = _counted_requests(root)
    document = read_document(storage.join(root, NAME))[1]
    requests = len(document.get("requests", ()))
    if requests < copies:
        raise DamagedFile(f"{storage.join(root, NAME)} is missing or was replaced: expected {copies} requests, got "
                          f"{requests}\nhint: python -m jobs repair NAME --root {storage.quote(root)}")
    if path := _find_other_hash(document, counted):
        raise DamagedFile(f"{storage.join(root, NAME)} was changed: its requests are not those that {path} counts\n"
                          f"hint: python -m jobs repair {path.split('/')[1]} --root {storage.quote(root)}")
    return parse_list(document)


def parse_list(document: Mapping[str, Any]) -> Forgotten:
    """What a takedown list names. A value that was removed beside the requests is not lost."""
    return Forgotten(*(frozenset(values) for values in _merge_kinds(document, document.get("requests", ())).values()))


def has_requests(root: str) -> bool:
    """Whether the list of a root or its copies have a request. A damaged list counts as one with requests."""
    try:
        return bool(count_copies(root) or read_document(storage.join(root, NAME))[1].get("requests"))
    except DamagedFile:
        return True


def count_copies(root: str) -> int:
    """The number of the last request that has a copy."""
    return max(_copy_numbers(root), default=0)


def count_requests(root: str) -> tuple[int, int]:
    """How many requests the list of a root has, and how many of the first were applied to every readable dataset."""
    document = read_document(storage.join(root, NAME))[1]
    return len(document.get("requests", ())), document.get("applied", 0)


def describe_list(root: str) -> dict[str, Any]:
    """The entry of a pointer about the list of a root: how many requests it has, and their hash."""
    document = read_document(storage.join(root, NAME))[1]
    count = len(document.get("requests", ()))
    return {"requests": count, "sha256": hash_requests(document, count)}


def hash_requests(document: Mapping[str, Any], count: int) -> str:
    """sha256 of the first `count` requests of a list, and of values that no request names, as in older lists."""
    requests = document.get("requests", ())
    named = _merge_kinds({}, requests)
    others = {kind: sorted(set(document.get(kind, ())) - set(named[kind])) for kind in _KINDS}
    return storage.digest([requests[:count], others])


def add_takedowns(root: str, more: Forgotten, note: str) -> int:
    """Add a request to the list of a root; how many requests it has now. `note` says why, and is kept."""
    listed = {kind: sorted(getattr(more, kind)) for kind in _KINDS if getattr(more, kind)}
    restore_takedowns(root)  # a removed list must not start again from nothing

    def grown(document: dict[str, Any]) -> dict[str, Any]:
        request = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "note": note, **listed}
        return _with_requests(document, [*document.get("requests", ()), request])

    requests = change_document(storage.join(root, NAME), grown)["requests"]
    for number, request in enumerate(requests, 1):  # those of a process that was killed before it did this too
        storage.create_bytes(storage.json_bytes(request), _copy_url(root, number))
    return len(requests)


def mark_applied(root: str, count: int) -> None:
    """Note that the first `count` requests of the list were applied to every readable dataset."""
    change_document(storage.join(root, NAME), lambda document: document | {
        "applied": max(count, document.get("applied", 0))} if document else document)


def refuse_lost_requests(root: str, *, replace_damaged: bool = True) -> None:
    """DamagedFile if requests are lost. `replace_damaged`: a damaged list counts as one without requests."""
    gaps, path = _find_lost_requests(root, replace_damaged=replace_damaged)
    if gaps:
        name = path.split("/")[1] if path else "NAME"
        lost = ", ".join(f"{gap[0]}..{gap[-1]}" for gap in gaps)
        raise DamagedFile(f"requests {lost} of {storage.join(root, NAME)} are lost: {path or _COPIES} counts "
                          f"them, and neither the list nor {_COPIES}/ has them: restore {_COPIES}/ from a backup\n"
                          f"hint: if there is none: python -m jobs repair {name} --accept-lost-requests")


def accept_lost_requests(root: str, hashes: Callable[[], Sequence[str]]) -> tuple[list[int], bool]:
    """Put a record in the place of each lost request, and restore the list; their numbers, and whether it was changed.

    A list that was changed is accepted as it is, with one more request. The first record, or this request, names
    `hashes`: those of all images that versions hide, so that no rebuild brings these back. Other things that the
    requests named, such as images of later sources, are not known any more.
    """
    numbers = [number for gap in _find_lost_requests(root)[0] for number in gap]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = {"sha256": list(hashes())} if numbers else {}
    for number in numbers:
        record = {"at": at, "note": "lost, and accepted as lost by repair", "lost": True}
        storage.create_bytes(storage.json_bytes(record | (known if number == numbers[0] else {})),
                             _copy_url(root, number))
    try:
        restore_takedowns(root, accept_changes=bool(numbers))  # no hash fits a list in which requests are replaced
        return numbers, False
    except DamagedFile as error:
        _log.warning("%s", storage.first_line(error))
    restore_takedowns(root, accept_changes=True)
    record = {"at": at, "note": "the list was changed, and accepted as it is by repair", "sha256": list(hashes())}
    requests = change_document(storage.join(root, NAME), lambda document: _with_requests(
        document, [*document.get("requests", ()), record]))["requests"]
    storage.create_bytes(storage.json_bytes(record), _copy_url(root, len(requests)))
    return numbers, True


def _find_lost_requests(root: str, *, replace_damaged: bool = True) -> tuple[list[range], str]:
    """The numbers of the lost requests, and the path of the file that counts them ("": a copy does)."""
    # The list is read last: it grows first.
    required, path = _count_required(root)
    copies = sorted(_copy_numbers(root))
    try:
        listed = len(read_document(storage.join(root, NAME))[1].get("requests", ()))
    except ValueError:
        if not replace_damaged:
            raise
        listed = 0
    gaps, expected = [], listed + 1
    for number in [*(copy for copy in copies if copy > listed), required + 1]:
        if number > expected:
            gaps.append(range(expected, number))
        expected = max(expected, number + 1)
    return gaps, path


def _count_required(root: str) -> tuple[int, str]:
    """The most requests that a pointer, its history or a version counts or this machine has seen; and where."""
    names = storage.list_folders(storage.join(root, "datasets"))
    paths = [f"datasets/{name}/current.json" for name in names]
    for name in names:
        with contextlib.suppress(PermissionError):  # one closed folder must not stop the requests of a whole root
            paths += [f"published/{name}/{file}" for file in storage.list_files(storage.join(root, "published", name))
                      if file.endswith(".json")]
    paths += [f"datasets/{dataset.name}/{dataset.version}/{NAME}" for dataset in datasets(root, {})]
    counts = storage.map_urls(lambda path: _read_count(storage.join(root, path)), paths)
    counts += [count_seen_takedowns(root, name) for name in names]
    paths += [f"datasets/{name}/current.json, as this machine has seen it," for name in names]
    return max(zip(counts, paths, strict=True), key=lambda pair: pair[0], default=(0, ""))


def _read_count(url: str) -> int:
    """The requests that a pointer or the file of a version counts; 0 if it cannot be read: others tell that."""
    try:
        document = check_shape(storage.read_json(url), url, {"takedowns?": int, "through?": int}, "")
    except (FileNotFoundError, PermissionError, ValueError):
        return 0
    return max(document.get("takedowns", 0), document.get("through", 0))


def _counted_requests(root: str) -> dict[str, dict[str, Any]]:
    """The entries of the pointers of a root about its list, by the path of the pointer."""
    counted = {}
    for name in storage.list_folders(storage.join(root, "datasets")):
        try:
            document = parse_pointer(read_pointer(root, name) or b"") or {}
        except (DamagedFile, PermissionError):
            continue  # others tell that it cannot be read
        if "takedown_list" in document:
            counted[f"datasets/{name}/current.json"] = document["takedown_list"]
    return counted


def _find_other_hash(document: Mapping[str, Any], counted: Mapping[str, dict[str, Any]]) -> str:
    """The path of a pointer that has another hash of the requests than a list; "" if the list fits them all."""
    return next((path for path, known in counted.items()
                 if hash_requests(document, known["requests"]) != known["sha256"]), "")


def restore_takedowns(root: str, *, accept_changes: bool = False) -> bool:
    """Restore the list of a root from the copies of its requests, and copies from the list; whether it was changed.

    DamagedFile if requests are lost, or if neither the list nor the copies have the requests that the pointers count.
    `accept_changes`: the list is right then.
    """
    refuse_lost_requests(root)
    copies = {number: _read_copy(_copy_url(root, number)) for number in sorted(_copy_numbers(root))}
    counted = {} if accept_changes else _counted_requests(root)
    restored = False

    def grown(document: dict[str, Any]) -> dict[str, Any]:
        nonlocal restored
        listed = dict(enumerate(document.get("requests", ()), 1))
        known = {number: request for number, request in copies.items() if request is not None}
        if lost := copies.keys() - known.keys() - listed.keys():
            raise DamagedFile(f"{_copy_url(root, min(lost))} is damaged, and the list does not have it\n"
                              f"hint: restore the file from a backup: it names images that no search may find")
        requests = [request for _, request in sorted((listed | known).items())]
        choices = [_with_requests(document, requests), _with_requests({
            key: value for key, value in document.items() if key not in _KINDS}, requests)]
        if copies.keys() <= listed.keys():
            choices.insert(0, document)
        for number, choice in enumerate(choices):
            if not (path := _find_other_hash(choice, counted)):
                restored = number > 0 or choice is not document
                return choice
        raise DamagedFile(f"{storage.join(root, NAME)} was changed: neither it nor {_COPIES}/ has the requests that "
                          f"{path} counts: restore {_COPIES}/ from a backup\nhint: if there is none: python -m jobs "
                          f"repair {path.split('/')[1]} --accept-lost-requests")

    if copies or counted:
        document = change_document(storage.join(root, NAME), grown, replace_damaged=True)
        for number, request in enumerate(document.get("requests", ()), 1):
            if copies.get(number) != request:
                storage.put_json(request, _copy_url(root, number))
    return restored


def find_changed_copies(root: str) -> Iterator[str]:
    """The paths of the copies that are not the requests of the list, or are missing, below the root."""
    # A request that no pointer counts yet may have no copy: its command is running, or was killed.
    counted = max((known["requests"] for known in _counted_requests(root).values()), default=0)
    requests = read_document(storage.join(root, NAME))[1].get("requests", ())
    for number, request in enumerate(requests, 1):
        try:
            is_right = _read_copy(_copy_url(root, number)) == request
        except FileNotFoundError:
            is_right = number > counted
        if not is_right:
            yield f"{_COPIES}/{number:06d}.json"


def _read_copy(url: str) -> dict[str, Any] | None:
    """The copy of a request; None if it is damaged."""
    try:
        return check_shape(storage.read_json(url), url, _REQUEST, "")
    except DamagedFile as error:
        _log.warning("%s", storage.first_line(error))
        return None


def _copy_numbers(root: str) -> set[int]:
    """The numbers of the requests that have a copy."""
    names = storage.list_files(storage.join(root, _COPIES))
    return {int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit()}


def _copy_url(root: str, number: int) -> str:
    return storage.join(root, _COPIES, f"{number:06d}.json")


def _with_requests(document: Mapping[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    """A list with these requests, and with all that it held already."""
    return {**document, **_merge_kinds(document, requests), "requests": requests}


def _merge_kinds(document: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The hashes, URLs and domains that a list or its requests name."""
    return {kind: sorted({*document.get(kind, ()), *(value for request in requests for value in request.get(kind, ()))})
            for kind in _KINDS}


def read_document(url: str) -> tuple[bytes | None, dict[str, Any]]:
    """The bytes and the document of a list, or of the rows of a version; (None, {}) if there is none."""
    try:
        with storage.verify_replaced(lambda: _repair_command(url)):
            data = storage.read_bytes(url)
            return data, check_shape(storage.parse_json(data, url), url, _DOCUMENT, "python -m jobs verify")
    except FileNotFoundError:
        return None, {}


def _repair_command(url: str) -> str:
    """The command that restores the list of a root, or the rows of a version. It restores those of all datasets."""
    folder = url.rpartition("/")[0]
    names = storage.list_folders(storage.join(folder, "datasets")) or folder.split("/")[-2:-1] or ["NAME"]
    return f"python -m jobs repair {names[0]}"


def change_document(url: str, grown: Any, *, replace_damaged: bool = False) -> dict[str, Any]:
    """Put in place what `grown` makes of a document, though others do the same."""
    for _ in range(_TRIES):
        try:
            data, document = read_document(url)
        except ValueError as error:
            if not replace_damaged:
                raise
            with storage.verify_replaced(lambda: _repair_command(url)):
                data, document = storage.read_bytes(url), {}  # an error if that is no file
            _log.warning("%s: it is replaced", storage.first_line(error))
        after = grown(document)
        if after == document or storage.swap_bytes(storage.json_bytes(json.loads(json.dumps(after))), url, data):
            return after
        time.sleep(0.1)
    raise storage.StorageError(f"{url} is changed by others all the time")
