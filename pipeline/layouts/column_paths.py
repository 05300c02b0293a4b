"""Cells by the name of a column, a dotted path into objects and lists, a template, or several of these.

* `url`: the column of this name, whatever letters it has
* `content.media.url`: a field of objects; of a list, the field of each of its objects
* `content.media.0.url`: the field of the first object of a list
* `https://host/iiif/{image_id}/full`: a template, whose braces hold names or paths
* `small;large`: the first of the two that has a value
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from pipeline.tables.cells import cell_text

_FIELD = re.compile(r"\{([^{}]+)\}")
_KEPT = "/:%?&=,+@!$'()*;~"  # letters of a cell that stay as they are in a URL


def find_roots(expression: str, names: Collection[str]) -> list[str]:
    """The columns among `names` that an expression reads, [] if it cannot be read from these."""
    if expression in names:
        return [expression]
    if fields := _FIELD.findall(expression):
        roots = [_root(field, names) for field in fields]
        return roots if all(roots) else []
    return [root for path in expression.split(";") if (root := _root(path.strip(), names))]


def find_dead_path(expression: str, types: Mapping[str, pa.DataType]) -> str:
    """The first path of an expression that no cell of these types can have, "" if each may have a value."""
    if expression in types:
        return ""
    paths = _FIELD.findall(expression) or [path.strip() for path in expression.split(";")]
    return next((path for path in paths if (root := _root(path, types)) and not _may_hold(
        types[root], path[len(root) + 1:].split(".") if len(path) > len(root) else [])), "")


def _may_hold(kind: pa.DataType, parts: list[str]) -> bool:
    """Whether a cell of a type may have a value at a path. Objects may be in cells of text."""
    if not parts:
        return True
    if pa.types.is_struct(kind):
        return kind.get_field_index(parts[0]) >= 0 and _may_hold(kind.field(parts[0]).type, parts[1:])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _may_hold(kind.value_type, parts[1:] if parts[0].isdecimal() else parts)
    return not (pa.types.is_primitive(kind) or pa.types.is_boolean(kind))


def cell_at(cells: Mapping[str, Any], expression: str) -> Any:
    """The value that an expression has in a row, None without one. A path through a list gives a list of values.

    A template has no value if one of its cells is empty. If it is a URL, its cells are percent-encoded. Whole numbers
    have no point: pandas makes floats of integers beside nulls.
    """
    if expression in cells:
        return cells[expression]
    if _FIELD.search(expression):
        return _fill(cells, expression)
    values = (_follow(cells, path.strip()) for path in expression.split(";"))
    return next((value for value in values if cell_text(value).strip()), None)


def _fill(cells: Mapping[str, Any], template: str) -> str | None:
    values = {field: _follow(cells, field) for field in _FIELD.findall(template)}
    texts = {field: cell_text(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
             for field, value in values.items()}
    if not all(texts.values()):
        return None
    if "://" in template:
        texts = {field: quote(text, _KEPT) for field, text in texts.items()}
    return _FIELD.sub(lambda match: texts[match[1]], template)


def _root(path: str, names: Collection[str]) -> str:
    """The column in which a path begins, "" if there is none. Names of columns may have dots themselves."""
    parts = path.split(".")
    return next((name for count in range(len(parts), 0, -1) if (name := ".".join(parts[:count])) in names), "")


def _follow(cells: Mapping[str, Any], path: str) -> Any:
    root = _root(path, cells)
    rest = path[len(root) + 1:]
    return _inside(cells[root], rest.split(".") if rest else []) if root else None


def _inside(value: Any, parts: list[str]) -> Any:
    for number, part in enumerate(parts):
        if isinstance(value, str):
            value = _parse(value)
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
            continue
        if isinstance(value, list):
            values = [_inside(each, parts[number:]) for each in value]
            flat = [each for found in values for each in (found if isinstance(found, list) else [found])]
            return [each for each in flat if each not in (None, "")] or None
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _parse(text: str) -> Any:
    """The object or list in a cell of text, as CSV has them; None if it is none."""
    try:
        return json.loads(text) if text.lstrip()[:1] in {"{", "["} else None
    except (ValueError, RecursionError):
        return None
