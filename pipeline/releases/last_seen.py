"""The last publication of each dataset that this machine has seen: an older pointer is not accepted after it.

The Update Framework (TUF) guards against rollback attacks in the same way. The number is kept in the cache folder of
this machine. It belongs to one history: a new root at the same place has another first publication. Signed
publications have a number of their own: a writer without the key can replace the first publication, but cannot sign.
The number of takedown requests is kept too: a backup that is older than a request does not bring images back.
"""

import contextlib
import hashlib
import logging
import time
from typing import Any

from pipeline import storage
from pipeline.releases.history import hash_first

SIGNED, TAKEDOWNS = "signed", "takedowns"
_log = logging.getLogger(__name__)


def read_last_seen(root: str, name: str, kind: str = "") -> dict[str, Any]:
    """{"sequence": int, "first": sha256 of the first publication}; empty if this machine has seen none.

    `kind`: SIGNED for the last one with an accepted signature, whatever the first publication is. TAKEDOWNS for the
    number of requests that a pointer counted.
    """
    with contextlib.suppress(OSError, ValueError):
        document = storage.read_json(_url(root, name, kind))
        if isinstance(document, dict) and isinstance(document.get("sequence"), int):
            return document
    return {}


def write_last_seen(root: str, name: str, sequence: int, first: str, kind: str = "") -> None:
    """Keep the sequence number of a pointer that was accepted, or its number of takedown requests."""
    try:
        storage.put_json({"sequence": sequence, "first": first}, _url(root, name, kind))
        storage.remove_unfinished(str(storage.cache_folder() / "seen"), time.time())
    except (OSError, ValueError) as error:  # a reader needs no place to write
        _log.warning("%s: this machine cannot remember publication %d, so it would accept an older one later: %s", name,
                     sequence, error)


def count_seen_takedowns(root: str, name: str) -> int:
    """The most takedown requests that this machine has seen a pointer of this history count; 0 if it has seen none."""
    seen = read_last_seen(root, name, TAKEDOWNS)
    return seen["sequence"] if seen and seen.get("first") == hash_first(root, name) else 0


def note_takedowns(root: str, name: str, count: int) -> None:
    """Keep the number of takedown requests that a pointer counts, unless this machine has seen as many."""
    if count and read_last_seen(root, name, TAKEDOWNS).get("sequence") != count and (
            first := hash_first(root, name)) and count > count_seen_takedowns(root, name):
        write_last_seen(root, name, count, first, TAKEDOWNS)


def _url(root: str, name: str, kind: str) -> str:
    key = hashlib.sha256("\n".join([root, name, *([kind] if kind else [])]).encode()).hexdigest()
    return str(storage.cache_folder() / "seen" / f"{key}.json")
