"""A mark on each version: a command publishes it, or gc or rm removes it. Only one of the two can hold.

    <root>/datasets/<name>/<version>/mark.json    {"state": "publishing" or "removing" or "kept", ...}

Every change of a mark is a compare-and-swap. A command does not publish a version that is marked for removal. `gc` does
not remove a version whose mark has changed since it looked.
"""

import secrets
from typing import Any

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.documents import check_shape
from pipeline.stages.types import StageFailed

_MARK = {"state?": str, "sequence?": int}
NAME = "mark.json"
PUBLISHING, REMOVING, KEPT = "publishing", "removing", "kept"


class RemovedVersion(storage.DamagedFile):
    """A version of a dataset that was published and then removed by gc or rm."""


def mark_publishing(dataset: Dataset, sequence: int) -> None:
    """Mark a version before the pointer names it under `sequence`. StageFailed if it is being removed."""
    data = _new_mark(PUBLISHING, sequence=sequence)
    while True:
        there = read_mark(dataset)
        if _state(there) == REMOVING:
            raise StageFailed(f"{dataset.name}@{dataset.version} cannot be published: it was removed\n"
                              f"hint: the same rebuild makes another version")
        if storage.swap_bytes(data, _url(dataset), there):
            return


def mark_removing(dataset: Dataset, expected: bytes | None) -> bool:
    """Mark a version for removal if its mark is still `expected`; whether it was marked."""
    return storage.swap_bytes(_new_mark(REMOVING), _url(dataset), expected)


def mark_kept(dataset: Dataset) -> None:
    """Take back the mark for removal: nothing of the version was removed."""
    if is_removing(dataset):
        storage.swap_bytes(_new_mark(KEPT), _url(dataset), read_mark(dataset))


def is_removing(dataset: Dataset) -> bool:
    """Whether gc or rm removes or has removed a version."""
    return _state(read_mark(dataset)) == REMOVING


def publishing_sequence(mark: bytes | None) -> int | None:
    """The sequence number under which a version was to be published; None if the mark says something else."""
    return _parse(mark).get("sequence") if _state(mark) == PUBLISHING else None


def read_mark(dataset: Dataset) -> bytes | None:
    """The mark of a version; None if it has none."""
    try:
        return storage.read_bytes(_url(dataset))
    except FileNotFoundError:
        return None


def mark_time(dataset: Dataset) -> float:
    """When a version was marked, by the time of the store; FileNotFoundError if it has no mark."""
    return storage.modified_time(_url(dataset))


def _new_mark(state: str, **more: Any) -> bytes:
    return storage.json_bytes({"state": state, "token": secrets.token_hex(8), **more})


def _state(mark: bytes | None) -> str:
    return _parse(mark).get("state", "")


def _parse(mark: bytes | None) -> dict[str, Any]:
    """The document of a mark. A damaged mark says nothing, and the next command replaces it."""
    try:
        return check_shape(storage.parse_json(mark or b"{}", "mark.json"), "mark.json", _MARK, "")
    except storage.DamagedFile:
        return {}


def _url(dataset: Dataset) -> str:
    return storage.join(dataset.root, "datasets", dataset.name, dataset.version, NAME)
