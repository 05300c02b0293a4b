"""Images that no database may hold any more: the rows to hide in each version.

    <root>/datasets/<name>/<version>/forgotten.json   rows that searches leave out from now on, like tombstones

The requests are in the takedown list of the root (takedown_list.py). The next version of a database is made without
these images and their metadata.

A removed file must not bring images back. So the list counts the requests that all datasets have applied. The file of
a version names the last request that it has applied, the shards that its rows are of, and a hash. The pointer of a
published dataset names the least count. `shard` writes the file of a dataset that it makes. As long as no file fits the
shards, their readers compare the list with all rows.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.metadata import metadata
from pipeline.storage import DamagedFile
from pipeline.takedowns.takedown_list import (
    NAME,
    Forgotten,
    change_document,
    count_copies,
    describe_list,
    hash_requests,
    parse_list,
    read_document,
    read_takedowns,
)

_log = logging.getLogger(__name__)
_SLOW: set[str] = set()  # files of versions of which the log has said that they make readers slow
READ_ERRORS = (ValueError, OSError, LookupError, TypeError)
"""The errors that readers of a damaged version raise."""


def hidden_hashes(root: str) -> list[str]:
    """The hashes of the images that the versions below a root hide since they were made."""
    return sorted({value for dataset in datasets(root) if dataset.is_sealed("shards")
                   for value in _hidden_hashes(dataset)})


def _hidden_hashes(dataset: Dataset) -> set[str]:
    """The hashes of the images that a version hides since it was made."""
    try:
        hidden = set(read_document(_address(dataset))[1].get("rows", ()))
        rows = find_matching_rows(dataset, lambda row: True) if hidden else []
    except (OSError, ValueError) as error:
        _log.warning("%s: images that %s hides may come back", storage.first_line(error), dataset.label)
        return set()
    return {value for number, (_, row) in enumerate(rows) if number in hidden
            for value in (row["sha256"], row.get("original_sha256")) if value}


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


def apply_list(dataset: Dataset) -> dict[str, Any]:
    """Hide the rows of the whole takedown list in one dataset. Returns the fields of a pointer; {} without requests."""
    listed = describe_list(dataset.root)  # first: the list can grow meanwhile
    if not listed["requests"]:
        return {}
    content = shards_content(dataset)
    rows = find_rows(dataset, read_takedowns(dataset.root))
    hide_rows(dataset, [row for row, _ in rows], listed["requests"], content)
    return {"takedowns": listed["requests"], "takedown_list": listed}


def apply_list_to_new(dataset: Dataset) -> None:
    """`apply_list` for shards that were made just now. Without it each reader would compare all rows with the list.

    A list that cannot be read is only a warning: the readers refuse it.
    """
    try:
        apply_list(dataset)
    except (ValueError, OSError) as error:
        _log.warning("%s: the takedown list was not applied: %s", dataset.label, storage.first_line(error))


def hide_rows(dataset: Dataset, rows: list[int], through: int, content: str | None = None) -> int:
    """Hide these rows from searches from now on; how many more these are than before.

    `through`: the rows are those of the first so many requests of the list.
    `content`: the `shards_content` before the rows were looked for; None: that of now. If `shard` made others
    meanwhile, the file does not fit them, and readers compare all rows.
    """
    before, content = 0, shards_content(dataset) if content is None else content

    def grown(document: dict[str, Any]) -> dict[str, Any]:
        nonlocal before
        if document.get("shards", content) != content:
            document = {}  # the shards were made again, and the rows are those of others
        before = len(document.get("rows", ()))
        kept, applied = sorted({*document.get("rows", ()), *rows}), max(through, document.get("through", 0))
        return {"rows": kept, "through": applied, "shards": content, "digest": _digest(kept, applied, content)}

    # The whole list is applied each time, so a damaged file loses nothing.
    return len(change_document(_address(dataset), grown, replace_damaged=True)["rows"]) - before


def read_forgotten_rows(dataset: Dataset) -> np.ndarray:
    """The rows of a version that were forgotten since it was made, ascending (T,) int64.

    All rows are compared with the takedown list if the file of the version was changed, lacks requests or is of other
    shards. ValueError if requests are lost, or if the version is published and its file is missing.
    """
    document = read_document(_address(dataset))[1]
    rows, through = document.get("rows", []), document.get("through", 0)
    listed = read_document(storage.join(dataset.root, NAME))[1]
    required = _required_requests(dataset, listed, through)
    if not document and not required and not parse_list(listed):
        return np.array([], np.int64)
    content = shards_content(dataset)
    if through >= required and document.get("digest") == _digest(rows, through, content):
        return np.array(rows, np.int64)
    samples = dataset.manifest("shards")["totals"]["samples"]
    if _address(dataset) not in _SLOW and listed.get("requests"):
        _SLOW.add(_address(dataset))
        _log.info("%s: each reader compares all %d rows with the takedown list, because %s is old or lacks requests\n"
                  "hint: to end this: python -m jobs repair %s --root %s",
                  dataset.label, samples, _address(dataset), dataset.name, storage.redact_credentials(dataset.root))
    stored = [row for row in rows if 0 <= row < samples] if document.get("shards", content) == content else []
    found = [row for row, _ in find_rows(dataset, parse_list(listed))]
    return np.array(sorted({*stored, *found}), np.int64)


def read_stored_rows(dataset: Dataset) -> np.ndarray:
    """The rows that the file of a version hides, ascending (T,) int64; DamagedFile if it was changed."""
    document = read_document(_address(dataset))[1]
    rows, through, content = document.get("rows", []), document.get("through", 0), shards_content(dataset)
    expected = {"shards": content, "digest": _digest(rows, through, content)}
    if any(document.get(name, value) != value for name, value in expected.items()):
        raise DamagedFile(f"{_address(dataset)} was changed, or is of other shards\n"
                          f"hint: python -m jobs repair {dataset.name} --root {storage.quote(dataset.root)}")
    return np.array(rows, np.int64)


def _required_requests(dataset: Dataset, listed: dict[str, Any], through: int) -> int:
    """How many requests the file of a version must have applied; DamagedFile if it or the list misses some."""
    url, requests = storage.join(dataset.root, NAME), len(listed.get("requests", ()))
    hint = f"hint: python -m jobs repair {dataset.name} --root {storage.quote(dataset.root)}"
    required = max(listed.get("applied", 0), dataset.takedowns)
    least = required if dataset.trusted else max(required, through, count_copies(dataset.root))
    if requests < least:
        raise DamagedFile(f"{url} is missing or was replaced: expected {least} requests, got {requests}\n{hint}")
    if not dataset.trusted:
        return requests  # a published version gets its file before readers see it, others may be made after a request
    known, sha256 = dataset.takedown_list
    if sha256 and hash_requests(listed, known) != sha256:
        raise DamagedFile(f"{url} was changed: its first {known} requests are not those that current.json counts\n"
                          f"{hint}")
    if through < required:
        raise DamagedFile(f"{_address(dataset)} is missing or was replaced: expected the rows of {required} requests, "
                          f"got those of {through}\n{hint}")
    return required


def shards_content(dataset: Dataset) -> str:
    """The hash of the shards that rows are counted in; "" if they are not sealed."""
    return dataset.manifest("shards")["content"] if dataset.is_sealed("shards") else ""


def _digest(rows: list[int], through: int, content: str) -> str:
    return storage.digest([rows, through, content])


def _address(dataset: Dataset) -> str:
    return storage.join(dataset.root, "datasets", dataset.name, dataset.version, NAME)
