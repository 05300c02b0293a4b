"""Images that no database may hold any more: the rows to hide in each version.

    <root>/datasets/<name>/<version>/forgotten.json   rows that searches leave out from now on, like tombstones

The requests are in the takedown list of the root (takedown_list.py). The next version of a database is made without
these images and their metadata.

A removed file must not bring images back. So the list counts the requests that all datasets have applied. The file of
a version names the last request that it has applied. The pointer of a published dataset names the least count.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.metadata import metadata
from pipeline.datasets.takedown_list import (
    NAME,
    Forgotten,
    change_document,
    hash_requests,
    read_document,
)
from pipeline.storage import DamagedFile

_log = logging.getLogger(__name__)
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
        _log.warning("%s: images that %s hides may come back", str(error).splitlines()[0], dataset.label)
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
    return len(change_document(_address(dataset), grown, replace_damaged=True)["rows"]) - before


def read_forgotten_rows(dataset: Dataset) -> np.ndarray:
    """The rows of a version that were forgotten since it was made, ascending (T,) int64.

    ValueError if the version is published and a file is missing that may name more of them.
    """
    document = read_document(_address(dataset))[1]
    if dataset.trusted:
        _refuse_missing(dataset, document.get("through", 0))
    return np.array(document.get("rows", []), np.int64)


def _refuse_missing(dataset: Dataset, through: int) -> None:
    url = storage.join(dataset.root, NAME)
    document = read_document(url)[1]
    requests, (known, sha256) = len(document.get("requests", ())), dataset.takedown_list
    required = max(document.get("applied", 0), dataset.takedowns)
    hint = f"hint: python -m jobs repair {dataset.name} --root {dataset.root}"
    if requests < required:
        raise DamagedFile(f"{url} is missing or was replaced: expected {required} requests, got {requests}\n{hint}")
    if sha256 and hash_requests(document, known) != sha256:
        raise DamagedFile(f"{url} was changed: its first {known} requests are not those that current.json counts\n"
                          f"{hint}")
    if through < required:
        raise DamagedFile(f"{_address(dataset)} is missing or was replaced: expected the rows of {required} requests, "
                          f"got those of {through}\n{hint}")


def _address(dataset: Dataset) -> str:
    return storage.join(dataset.root, "datasets", dataset.name, dataset.version, NAME)
