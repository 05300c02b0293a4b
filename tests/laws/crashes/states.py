"""The state of a place: equal for two places that hold the same, whenever and by whatever process it was written."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from pipeline import storage
from pipeline.storage import is_local
from pipeline.takedowns import takedown_list

_RANDOM = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")  # a part of the names of leases and temporary files
_TIMES = {"published", "checked", "at", "start_time", "end_time", "duration"}
_RUN_FACTS = {"run", "token"}


def describe_state(root: str, folder: Path) -> str:
    """A hash of what a root and the folder beside it hold, without times, processes, random names, and their paths.

    A sha256 of a file, in another file, counts as the path of that file. So a sha256 of no file is another state.
    """
    files = _read_files(root, folder)
    documents = {path: _parse(data) for path, data in files.items()}
    names = _name_hashes(files, documents)
    lines = [_RANDOM.sub("RANDOM", upload) for upload in list_uploads(root)]
    for path, data in files.items():
        document = documents[path]
        if document is None:
            content = hashlib.sha256(data).hexdigest()
        elif path.startswith("root/leases/"):
            content = f"exclusive: {document.get('exclusive')}"
        else:
            content = json.dumps(_without_run_facts(document, names), sort_keys=True)
            content = content.replace(root, "ROOT").replace(str(folder), "FOLDER")
        lines.append(f"{_RANDOM.sub('RANDOM', path)}: {content}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def list_uploads(root: str) -> list[str]:
    """The uploads to a root in a bucket that were not completed."""
    if is_local(root):
        return []
    file_system, path = fsspec.core.url_to_fs(root)
    bucket, _, prefix = path.partition("/")
    uploads = file_system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
    return [f"{upload['Key'].removeprefix(prefix)}, an upload that was not completed" for upload in uploads]


def _read_files(root: str, folder: Path) -> dict[str, bytes]:
    """The files of the root, the names of those in scratch, and what this machine remembers of publications."""
    file_system, path = fsspec.core.url_to_fs(root)
    file_system.invalidate_cache()
    found = file_system.find(path)
    files = {f"root{name.removeprefix(path)}": data for name, data in file_system.cat(found).items()} if found else {}
    files |= {f"scratch/{left.relative_to(folder / 'scratch')}": b"" for left in (folder / "scratch").rglob("*")}
    # The name of such a file is a hash that depends on the path of the root, so it differs between places. A copied
    # place also has what was seen of the place before.
    seen = sorted(file.read_bytes() for file in (folder / "cache" / "seen").glob("*.json"))
    return files | {f"seen/{number}.json": data for number, data in enumerate(seen)}


def _parse(data: bytes) -> Any:
    """A JSON object, or None for other files."""
    if not data.startswith(b"{"):
        return None
    try:
        return json.loads(data)
    except ValueError:
        return None


def _name_hashes(files: Mapping[str, bytes], documents: Mapping[str, Any]) -> dict[str, str]:
    """What each sha256 that files may contain stands for."""
    names = {hashlib.sha256(data).hexdigest(): path for path, data in sorted(files.items(), reverse=True)}
    for path, document in documents.items():
        if path.endswith("/release.json") and isinstance(document, dict) and "manifests" in document:
            names[storage.digest(document["manifests"])] = f"the manifests of {path}"
    takedowns = documents.get(f"root/{takedown_list.NAME}") or {}
    for count in range(len(takedowns.get("requests", ())) + 1):
        names[takedown_list.hash_requests(takedowns, count)] = f"{count} takedown requests"
    return names


def _without_run_facts(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: bool(item) if key in _TIMES else _without_run_facts(item, names)
                for key, item in value.items() if key not in _RUN_FACTS}
    if isinstance(value, list):
        return [_without_run_facts(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value
