"""The documents that name the published version of a dataset.

    <root>/datasets/<name>/current.json    the pointer
    <root>/published/<name>/000007.json    the history: every pointer that there was

The newest one may say that the dataset was removed.
"""

from typing import Any

from pipeline import storage
from pipeline.datasets.names import is_name
from pipeline.stages.documents import NUMBER, check_shape
from pipeline.storage import DamagedFile

_POINTER = {"version": str, "number": int, "sequence": int, "release": str, "published": NUMBER, "checked?": NUMBER,
            "previous?": (str, type(None)), "rolled_back?": str, "takedowns?": int,
            "takedown_list?": {"requests": int, "sha256": str}, "content?": str, "samples?": int,
            "recall@10?": (int, float, type(None)), "removed?": {"at": NUMBER, "number": int}}


class DamagedPointer(DamagedFile):
    """The current.json of a dataset cannot be trusted, or is missing although the dataset has publications."""

    def __init__(self, root: str, name: str, fault: str, options: str = "") -> None:
        super().__init__(f"{storage.join(root, 'datasets', name, 'current.json')} {fault}\n"
                         f"hint: python -m jobs repair {name} --root {storage.quote(root)}{options}")
        self._named = root, name, fault, options

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._named


def read_pointer(root: str, name: str) -> bytes | None:
    """The bytes of current.json; None if there is none."""
    try:
        with storage.verify_replaced(lambda: f"python -m jobs repair {name} --root {storage.quote(root)}"):
            return storage.read_bytes(storage.join(root, "datasets", name, "current.json"))
    except FileNotFoundError:
        return None


def parse_pointer(data: bytes) -> dict[str, Any] | None:
    """The document in the bytes of a current.json; None if it is damaged."""
    try:
        document = check_shape(storage.parse_json(data, "current.json"), "current.json", _POINTER, "")
    except DamagedFile:
        return None
    return document if is_name(document["version"]) else None
