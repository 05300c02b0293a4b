"""Hashes of files and JSON documents, and file names that contain them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.storage.files import sha256_file


def describe_file(name: str, path: Path) -> dict[str, Any]:
    """A manifest's entry of the local file `path` under `name`: name, bytes, sha256."""
    return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def name_by_content(name: str, data: bytes) -> str:
    """`name` with a hash of its content: two plans of the same time do not overwrite each other's lists."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:12]}{dot}{ending}"


def digest(document: Any) -> str:
    """sha256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
