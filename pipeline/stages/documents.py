"""The shapes of plans, records and manifests. Readers check them first, and name a damaged document."""

import math
import time
from typing import Any

from pipeline import storage
from pipeline.storage import DamagedFile

FORMAT = 2
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
# A shape is a type, or a tuple of shapes of which one fits. [shape] is a list, {"*": shape} a dict with any names.
# A dict of names and shapes is a dict with these names. A name with a question mark may be missing, and other names
# are allowed. Integers are of 64 bits, numbers are finite, and texts can be encoded.
NUMBER = (int, float)
_MOST_LEVELS = 100  # of nested dicts and lists without a shape of their own; Python cannot write a thousand
_COUNTS = {"*": int}


class RootPath(str):
    """The shape of a text that is a path below the root, "" for none."""


class Time(str):
    """The shape of a time in UTC, such as 2026-01-31T12:00:00Z."""


class PathBelow(str):
    """The shape of a text that is a path below the folder of its document."""


class FileName(str):
    """The shape of a name that `storage.manifest_file_url` takes."""


_FILE = {"name": FileName, "bytes": int, "sha256": str}
_LIST_FILE = {"count": int, "file": {"name": PathBelow, "bytes": int, "sha256": str}}
_INPUTS = {"*": {"path": RootPath, "digest": str}}
_RECORD = {"id": PathBelow, "samples?": int, "files": [_FILE], "skipped?": _COUNTS, "noted?": _COUNTS, "info?": dict,
           "run?": {"seconds?": NUMBER, "times?": dict}}
_NEW_RECORD = {"id": PathBelow, "plan": str, "samples": int, "files": [_FILE], "skipped": _COUNTS, "noted": _COUNTS,
               "run": {"seconds": NUMBER, "times?": dict, "device?": str}}
_RECORD_INFO = {"rows?": int, "retried?": int, "filtered?": int, "reused?": int, "dead?": [str]}
_REPORT = {"rows": int, "samples": int, "bytes": int, "skipped": _COUNTS, "again": bool}
_ITEMS = {"items": ([{"id": PathBelow, "inputs": dict}], _LIST_FILE)}
_PLAN = {"format": int, "stage": str, "fingerprint": str, "section": dict, "inputs": _INPUTS, **_ITEMS}
_MANIFEST = {"stage": str, "content": str, "items": ([_RECORD], _LIST_FILE), "files": [_FILE], "inputs?": _INPUTS}
_REPLAN = ("the same command with --overwrite; or python -m jobs rebuild NAME --source SOURCE, if the version is "
           "published")
_RETIRED = [{"host": str, "node": str, "card": str, "reason": str, "items": int}]
_PROGRESS = {"updated": NUMBER, "items": int, "of_items": int, "rows": int, "samples": int, "of_rows": int,
             "retried": int, "bytes": int, "rows_per_s": NUMBER, "seconds_left": (int, float, type(None)),
             "skipped": _COUNTS, "failed_items": int, "retired?": _RETIRED, "devices?": _COUNTS,
             "empty?": int}
_RELEASE = {"manifests": {"*": str}, "content": str, "number": int, "samples": int, "left_out?": int,
            "recall@10": (int, float, type(None)), "base?": (str, type(None)), "change?": _COUNTS, "queries?": [str]}
_SEALED = _MANIFEST | {
    "format": int, "info": dict, "run": {"seconds": NUMBER, "sealed": Time, "retired?": _RETIRED, "devices?": _COUNTS},
    "totals": {"items": int, "samples": int, "bytes": int, "skipped": _COUNTS, "noted": _COUNTS}}


def _is_time(text: str) -> bool:
    try:
        time.strptime(text, TIME_FORMAT)
    except ValueError:
        return False
    return True


_TEXTS = {Time: _is_time, PathBelow: storage.is_path_below,
          RootPath: lambda path: not path or storage.is_path_below(path),
          FileName: lambda name: storage.is_file_name(name) or storage.is_whole_address(name)}


def check_format(document: Any, url: str) -> None:
    """ValueError if a later version of this program wrote a plan or manifest."""
    format_version = document.get("format") if isinstance(document, dict) else None
    if isinstance(format_version, int) and format_version > FORMAT:
        raise ValueError(f"{url} has format {format_version}, and this version reads formats up to {FORMAT}\n"
                         f"hint: install the version that wrote it, or a later one")


def check_plan(document: Any, url: str) -> dict[str, Any]:
    """A plan as it is; DamagedFile if it is damaged, ValueError if a later version of this program wrote it."""
    return _check(document, url, _PLAN, _REPLAN)


def check_more_items(document: Any, url: str) -> dict[str, Any]:
    """More items of a plan as they are; DamagedFile if the document is damaged."""
    return _check(document, url, _ITEMS, _REPLAN)


def check_manifest(document: Any, url: str) -> dict[str, Any]:
    """A manifest as it is, also that of a checkpoint; DamagedFile if it is damaged, ValueError if it is newer."""
    return refuse_outside_files(_check(document, url, _MANIFEST, "python -m jobs verify"), url)


def check_sealed(document: Any, url: str) -> dict[str, Any]:
    """The manifest of a stage as it is, with its counts; DamagedFile if it is damaged, ValueError if it is newer."""
    return refuse_outside_files(_check(document, url, _SEALED, "python -m jobs verify"), url)


def refuse_outside_files(manifest: dict[str, Any], url: str) -> dict[str, Any]:
    """A manifest as it is; DamagedFile if a file has a whole address. Only tars are adopted where they lie."""
    section = manifest.get("section")
    adopted = manifest.get("stage") == "shard" and isinstance(section, dict) and section.get("adopted") is True
    listed = manifest["items"] if isinstance(manifest["items"], list) else []
    for entry in [*manifest["files"], *(entry for record in listed for entry in record["files"])]:
        if storage.is_whole_address(entry["name"]) and not (adopted and entry["name"].endswith(".tar")):
            raise DamagedFile(f"{url} is damaged: it names the file {entry['name']!r}, which is no adopted tar\n"
                              f"hint: python -m jobs verify")
    return manifest


def check_progress(document: Any, url: str) -> dict[str, Any]:
    """The progress of a stage as it is; DamagedFile if it is damaged."""
    return _check(document, url, _PROGRESS, "its driver writes it again in a few seconds")


def check_report(document: Any, url: str) -> dict[str, Any]:
    """The report of a worker on its item as it is; DamagedFile if it is damaged."""
    return check_shape(document, url, _REPORT, "its worker writes it again in a few seconds")


def check_record(document: Any, url: str, info: dict[str, Any]) -> dict[str, Any]:
    """The record of an item as it is; DamagedFile if it is damaged. `info`: the shape of its facts about the stage."""
    shape = _NEW_RECORD | {"info": _RECORD_INFO | info}
    check_shape(document, url, shape, "the same command makes the item again")
    if f"{document['id']}.json" != url.rpartition("/")[2]:
        raise DamagedFile(f"{url} is the record of another item: {document['id']!r}\n"
                          f"hint: the same command makes the item again")
    return document


def check_release(document: Any, url: str) -> dict[str, Any]:
    """The release of a version as it is; DamagedFile if it is damaged."""
    check_shape(document, url, _RELEASE, "python -m jobs verify")
    if wrong := [name for name in document["manifests"] if not storage.is_path_below(name)]:
        raise DamagedFile(f"{url} is damaged: {wrong[0]!r} is no stage\nhint: python -m jobs verify")
    return document


def _check(document: Any, url: str, shape: dict[str, Any], hint: str) -> dict[str, Any]:
    check_format(document, url)
    return check_shape(document, url, shape, hint)


def check_shape(document: Any, url: str, shape: Any, hint: str) -> Any:
    """A JSON document as it is; DamagedFile with the first place that does not have its shape (see above)."""
    if (place := _misfit(document, shape)) is not None:
        raise DamagedFile(f"{url} is damaged{f' at {place}' if place else ''}\nhint: {hint}")
    return document


def _misfit(value: Any, shape: Any) -> str | None:
    """The first place of a document that does not fit a shape, None if all of it fits."""
    if isinstance(shape, type):
        return None if _is_of_type(value, shape) else ""
    if isinstance(shape, tuple):
        places = [_misfit(value, each) for each in shape]
        return None if None in places else max((place for place in places if place is not None), key=len)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return ""
        return _first_misfit((number, each, shape[0]) for number, each in enumerate(value))
    if not isinstance(value, dict):
        return ""
    if "*" in shape:
        return _first_misfit((name, each, shape["*"]) for name, each in value.items())
    names = {name.removesuffix("?"): name for name in shape}
    if missing := [name for name, spelled in names.items() if name == spelled and name not in value]:
        return missing[0]
    parts = [(name, value[name], shape[spelled]) for name, spelled in names.items() if name in value]
    # Others have no shape, but must not be too deep.
    return _first_misfit([*parts, *((name, {name: each}, dict) for name, each in value.items() if name not in names)])


def _is_of_type(value: Any, kind: Any) -> bool:
    if kind in _TEXTS:
        return _is_of_type(value, str) and _TEXTS[kind](value)
    if not isinstance(value, kind):
        return False
    if kind is int:
        return not isinstance(value, bool) and -1 << 63 <= value < 1 << 63
    if kind is float:
        return math.isfinite(value)
    if kind is str:
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    return kind is not dict or _depth(value) <= _MOST_LEVELS


def _depth(value: Any) -> int:
    """How deep dicts and lists are nested, up to one more than `_MOST_LEVELS`."""
    level, depth = [value], 0
    while level and depth <= _MOST_LEVELS:
        level = [inner for each in level if isinstance(each, dict | list)
                 for inner in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def _first_misfit(parts: Any) -> str | None:
    for name, value, shape in parts:
        if (place := _misfit(value, shape)) is not None:
            return f"{str(name)[:80]}{'.' if place else ''}{place}"
    return None
