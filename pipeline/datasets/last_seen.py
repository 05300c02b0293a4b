"""The last publication of each dataset that this machine has seen: an older pointer is not accepted after it.

The Update Framework (TUF) guards against rollback attacks in the same way. The number is kept in the cache folder of
this machine. It belongs to one history: a new root at the same place has another first publication. Signed
publications have a number of their own: a writer without the key can replace the first publication, but cannot sign.
"""

import contextlib
import hashlib
import logging
import time
from typing import Any

from pipeline import storage

_log = logging.getLogger(__name__)


def read_last_seen(root: str, name: str, *, signed: bool = False) -> dict[str, Any]:
    """{"sequence": int, "first": sha256 of the first publication}; empty if this machine has seen none.

    `signed`: the last one with an accepted signature, whatever the first publication is.
    """
    with contextlib.suppress(OSError, ValueError):
        document = storage.read_json(_url(root, name, signed))
        if isinstance(document, dict) and isinstance(document.get("sequence"), int):
            return document
    return {}


def write_last_seen(root: str, name: str, sequence: int, first: str, *, signed: bool = False) -> None:
    """Keep the sequence number of a pointer that was accepted."""
    try:
        storage.put_json({"sequence": sequence, "first": first}, _url(root, name, signed))
        storage.remove_unfinished(str(storage.cache_folder() / "seen"), time.time())
    except (OSError, ValueError) as error:  # a reader needs no place to write
        _log.warning("%s: this machine cannot remember publication %d, so it would accept an older one later: %s", name,
                     sequence, error)


def _url(root: str, name: str, signed: bool) -> str:
    kind = "\nsigned" if signed else ""
    key = hashlib.sha256(f"{root}\n{name}{kind}".encode()).hexdigest()
    return str(storage.cache_folder() / "seen" / f"{key}.json")
