"""Images that no database may hold any more: a list at the root, and the rows to hide in each version.

    <root>/forgotten.json                             hashes, URLs and domains, and every request with its date
    <root>/takedowns/000003.json                      a copy of each request, from which `repair` restores the list
    <root>/datasets/<name>/<version>/forgotten.json   rows that searches leave out from now on, like tombstones

All of them only grow. The next version of a database is made without these images and their metadata.

A removed file must not bring images back. So the list counts the requests that all datasets have applied. The file of
a version names the last request that it has applied. The pointer of a published dataset names the least count.

A request is lost if a pointer or a version counts it, and neither the list nor a copy has it. Nothing is added to the
list then, or the next request would take its number. `accept_lost_requests` puts a record in its place.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.metadata import metadata
from pipeline.downloads.urls import find_host
from pipeline.stages.documents import check_shape
from pipeline.storage import DamagedFile

_NAME = "forgotten.json"
_COPIES = "takedowns"
_log = logging.getLogger(__name__)
_TRIES = 20
READ_ERRORS = (ValueError, OSError, LookupError, TypeError)
"""What readers of a damaged version raise."""
_KINDS = ("sha256", "urls", "domains")
_REQUEST = {f"{kind}?": [str] for kind in _KINDS}
_DOCUMENT = _REQUEST | {"requests?": [_REQUEST], "rows?": [int], "applied?": int, "through?": int}


@dataclass(frozen=True)
class Forgotten:
    """Pictures by the sha256 of what was fetched or stored, by address, by domain (with those below it)."""

    sha256: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.sha256 or self.urls or self.domains)

    def has_name(self, name: str) -> bool:
        """Whether a picture of that name or address is one of them, as far as the name tells."""
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
    """All requests below a root. ValueError if the list is damaged, or lacks a request of which there is a copy."""
    # Requests are counted in the opposite order of their writing: one that is added meanwhile is not missing.
    refuse_lost_requests(root, replace_damaged=False)
    copies = max(_copy_numbers(root), default=0)
    document = _document(storage.join(root, _NAME))[1]
    requests = len(document.get("requests", ()))
    if requests < copies:
        raise DamagedFile(f"{storage.join(root, _NAME)} is missing or was replaced: expected {copies} requests, got "
                          f"{requests}\nhint: python -m jobs repair NAME --root {root}")
    return Forgotten(*(frozenset(document.get(kind, ())) for kind in _KINDS))


def count_requests(root: str) -> tuple[int, int]:
    """How many requests the list of a root has, and how many of the first were applied to every readable dataset."""
    document = _document(storage.join(root, _NAME))[1]
    return len(document.get("requests", ())), document.get("applied", 0)


def add_takedowns(root: str, more: Forgotten, note: str) -> int:
    """Add a request to the list of a root; how many requests it has now. `note` says why, and is kept."""
    listed = {kind: sorted(getattr(more, kind)) for kind in _KINDS if getattr(more, kind)}
    restore_takedowns(root)  # a removed list must not start again from nothing

    def grown(document: dict[str, Any]) -> dict[str, Any]:
        request = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "note": note, **listed}
        return _with_requests(document, [*document.get("requests", ()), request])

    requests = _change(storage.join(root, _NAME), grown)["requests"]
    for number, request in enumerate(requests, 1):  # those of a process that was killed before it did this too
        storage.create_bytes(storage.json_bytes(request), _copy_url(root, number))
    return len(requests)


def mark_applied(root: str, count: int) -> None:
    """Note that the first `count` requests of the list were applied to every readable dataset."""
    _change(storage.join(root, _NAME), lambda document: document | {
        "applied": max(count, document.get("applied", 0))} if document else document)


def refuse_lost_requests(root: str, *, replace_damaged: bool = True) -> None:
    """DamagedFile if requests are lost. `replace_damaged`: a damaged list counts as one without requests."""
    gaps, path = _find_lost_requests(root, replace_damaged=replace_damaged)
    if gaps:
        name = path.split("/")[1] if path else "NAME"
        lost = ", ".join(f"{gap[0]}..{gap[-1]}" for gap in gaps)
        raise DamagedFile(f"requests {lost} of {storage.join(root, _NAME)} are lost: {path or _COPIES} counts "
                          f"them, and neither the list nor {_COPIES}/ has them: restore {_COPIES}/ from a backup\n"
                          f"hint: if there is none: python -m jobs repair {name} --accept-lost-requests")


def accept_lost_requests(root: str) -> list[int]:
    """Put a record in the place of each lost request, and restore the list; their numbers.

    The first record names the hashes of all images that versions hide, so that no rebuild brings these back. What else
    the requests named, such as images of later sources, is not known any more.
    """
    numbers = [number for gap in _find_lost_requests(root)[0] for number in gap]
    if not numbers:
        return []
    hashes = {value for dataset in datasets(root) if dataset.is_sealed("shards") for value in _hidden_hashes(dataset)}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for number in numbers:
        record = {"at": at, "note": "lost, and accepted as lost by repair", "lost": True}
        known = {"sha256": sorted(hashes)} if number == numbers[0] and hashes else {}
        storage.create_bytes(storage.json_bytes(record | known), _copy_url(root, number))
    restore_takedowns(root)
    return numbers


def _hidden_hashes(dataset: Dataset) -> set[str]:
    """The hashes of the images that a version hides since it was made."""
    try:
        hidden = set(_document(_address(dataset))[1].get("rows", ()))
        rows = find_matching_rows(dataset, lambda row: True) if hidden else []
    except (OSError, ValueError) as error:
        _log.warning("%s: images that %s hides may come back", str(error).splitlines()[0], dataset.label)
        return set()
    return {value for number, (_, row) in enumerate(rows) if number in hidden
            for value in (row["sha256"], row.get("original_sha256")) if value}


def _find_lost_requests(root: str, *, replace_damaged: bool = True) -> tuple[list[range], str]:
    """The numbers of the lost requests, and the path of the file that counts them ("": a copy does)."""
    # The list is read last: it grows first.
    required, path = _count_required(root)
    copies = sorted(_copy_numbers(root))
    try:
        listed = len(_document(storage.join(root, _NAME))[1].get("requests", ()))
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
    """The most requests that a pointer or a version counts, and the path of that file below the root."""
    names = storage.list_folders(storage.join(root, "datasets"))
    paths = [f"datasets/{name}/current.json" for name in names]
    paths += [f"datasets/{dataset.name}/{dataset.version}/{_NAME}" for dataset in datasets(root)]
    counts = storage.map_urls(lambda path: _read_count(storage.join(root, path)), paths)
    return max(zip(counts, paths, strict=True), key=lambda pair: pair[0], default=(0, ""))


def _read_count(url: str) -> int:
    """The requests that a pointer or the file of a version counts; 0 if it is missing, or damaged: others tell that."""
    try:
        document = check_shape(storage.read_json(url), url, {"takedowns?": int, "through?": int}, "")
    except (FileNotFoundError, ValueError):
        return 0
    return max(document.get("takedowns", 0), document.get("through", 0))


def restore_takedowns(root: str) -> bool:
    """Restore the list of a root from the copies of its requests; whether anything was missing.

    DamagedFile if requests are lost.
    """
    refuse_lost_requests(root)
    copies = {number: _read_copy(_copy_url(root, number)) for number in sorted(_copy_numbers(root))}
    missing = False

    def grown(document: dict[str, Any]) -> dict[str, Any]:
        nonlocal missing
        listed = dict(enumerate(document.get("requests", ()), 1))
        missing = max(copies) > len(listed)
        requests = listed | copies
        return _with_requests(document, [requests[number] for number in sorted(requests)]) if missing else document

    if copies:
        _change(storage.join(root, _NAME), grown, replace_damaged=True)
    return missing


def _read_copy(url: str) -> dict[str, Any]:
    return check_shape(storage.read_json(url), url, _REQUEST, "restore the file from a backup: it names images that no "
                                                              "search may find")


def _copy_numbers(root: str) -> set[int]:
    """The numbers of the requests that have a copy."""
    names = storage.list_files(storage.join(root, _COPIES))
    return {int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit()}


def _with_requests(document: dict[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    """A list with these requests, and with all that it held already."""
    return document | {kind: sorted({*document.get(kind, ()), *(value for request in requests
                                                                 for value in request.get(kind, ()))})
                       for kind in _KINDS} | {"requests": requests}


def _copy_url(root: str, number: int) -> str:
    return storage.join(root, _COPIES, f"{number:06d}.json")


def find_rows(dataset: Dataset, forgotten: Forgotten) -> list[tuple[int, dict[str, Any]]]:
    """The samples of a dataset that are among them: global rows, and their metadata."""
    return find_matching_rows(dataset, forgotten.has)


def find_matching_rows(dataset: Dataset, wanted: Callable[[dict[str, Any]], bool],
                       faults: list[Exception] | None = None) -> list[tuple[int, dict[str, Any]]]:
    """The samples of a dataset whose metadata are wanted: global rows, and those.

    Shards whose metadata cannot be read are left out if `faults` is a list, which gets the errors.
    """
    rows, offset = [], 0
    for record in dataset.manifest("shards")["items"]:
        try:
            rows += [(offset + position, row) for position, row in enumerate(metadata(dataset, record)) if wanted(row)]
        except READ_ERRORS as error:
            if faults is None:
                raise
            faults.append(error)
        offset += record["samples"]
    return rows


def hide_rows(dataset: Dataset, rows: list[int], through: int) -> int:
    """Hide these rows from searches from now on; how many more these are than before.

    `through`: the rows are those of the first so many requests of the list.
    """
    before = 0

    def grown(document: dict[str, Any]) -> dict[str, Any]:
        nonlocal before
        before = len(document.get("rows", ()))
        return {"rows": sorted({*document.get("rows", ()), *rows}),
                "through": max(through, document.get("through", 0))}

    # The whole list is applied each time, so a damaged file loses nothing.
    return len(_change(_address(dataset), grown, replace_damaged=True)["rows"]) - before


def read_forgotten_rows(dataset: Dataset) -> np.ndarray:
    """The rows of a version that were forgotten since it was made, ascending (T,) int64.

    ValueError if the version is published and a file is missing that may name more of them.
    """
    document = _document(_address(dataset))[1]
    if dataset.trusted:
        _refuse_missing(dataset, document.get("through", 0))
    return np.array(document.get("rows", []), np.int64)


def _refuse_missing(dataset: Dataset, through: int) -> None:
    requests, applied = count_requests(dataset.root)
    required = max(applied, dataset.takedowns)
    hint = f"hint: python -m jobs repair {dataset.name} --root {dataset.root}"
    if requests < required:
        raise DamagedFile(f"{storage.join(dataset.root, _NAME)} is missing or was replaced: expected {required} "
                          f"requests, got {requests}\n{hint}")
    if through < required:
        raise DamagedFile(f"{_address(dataset)} is missing or was replaced: expected the rows of {required} requests, "
                          f"got those of {through}\n{hint}")


def _address(dataset: Dataset) -> str:
    return storage.join(dataset.root, "datasets", dataset.name, dataset.version, _NAME)


def _document(url: str) -> tuple[bytes | None, dict[str, Any]]:
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None, {}
    return data, check_shape(storage.parse_json(data, url), url, _DOCUMENT, "python -m jobs repair NAME")


def _change(url: str, grown: Any, *, replace_damaged: bool = False) -> dict[str, Any]:
    """Put in place what `grown` makes of a document, though others do the same."""
    for _ in range(_TRIES):
        try:
            data, document = _document(url)
        except ValueError as error:
            if not replace_damaged:
                raise
            _log.warning("%s: it is replaced", str(error).splitlines()[0])
            data, document = storage.read_bytes(url), {}
        after = grown(document)
        if after == document or storage.swap_bytes(storage.json_bytes(json.loads(json.dumps(after))), url, data):
            return after
        time.sleep(0.1)
    raise storage.StorageError(f"{url} is changed by others all the time")
