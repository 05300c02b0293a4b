"""Licenses as SPDX identifiers, and the author, title and page of an image, whatever a source calls them."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.rows.license_texts import PUBLIC, canonical, denies_use, find_spdx, names_owner
from pipeline.tables.cells import cell_text

# In any case, without what is not a letter.
_LICENSE_COLUMNS = ("licensespdx", "licencespdx", "spdx", "license", "licence", "licenseurl", "licenceurl",
                    "licensename", "licencename", "licensetitle", "licencetitle", "licenseshortname", "licenseid",
                    "licenses", "licences", "imagelicense", "imagelicence", "rightsandreproduction",
                    "rights", "rightsstatement", "rightsurl", "usageterms", "usage",
                    "usageaccess", "copyright", "copyrightstatus", "objectrights", "accessrights")
_PUBLIC_DOMAIN_COLUMNS = ("ispublicdomain", "ispublicdomainwork", "publicdomain")
_TRUE, _FALSE = {"true", "1", "yes"}, {"false", "0", "no"}
_COLUMNS = {
    "author": ("author", "authorname", "creator", "creatorname", "artist", "artistname", "artistdisplayname",
               "artisttitle", "artistdisplay", "photographer", "photographername", "principalorfirstmaker",
               "objectcreator", "attribution", "credit", "creditline", "ownername", "owner", "uploader"),
    "title": ("title", "objecttitle", "imagetitle", "worktitle", "objectname"),
    "page": ("originallandingurl", "landingurl", "foreignlandingurl", "pageurl", "page", "landingpage", "linkresource",
             "objecturl", "descriptionurl", "sourceurl", "objectpersistentidentifier", "weburl", "recordlink",
             "flickrurl", "permalink", "source"),
}
_PARTS = (0, -2, -1)  # of media.usage.access: the whole, the last two, the last one


class License(NamedTuple):
    """The license of an image: its SPDX identifier, empty if unknown, and the text of the source."""

    spdx: str
    text: str


def license_of(cells: Mapping[str, Any]) -> License:
    """The license of an image by the columns of its source; unknown if one column permits less than another."""
    known: dict[str, str] = {}
    others, is_denied = [], False
    for name, cell in _named_cells(cells, _LICENSE_COLUMNS):
        for text in _leaf_texts(cell):
            is_number = name.startswith("licen") or not text.isdigit()
            if is_number and (spdx := find_spdx(text)):
                known.setdefault(spdx, text)
                continue
            others.append(text)
            is_denied |= is_number and denies_use(text)
    flags = {text.lower() for _, cell in _named_cells(cells, _PUBLIC_DOMAIN_COLUMNS) for text in _leaf_texts(cell)}
    if not known and flags & _TRUE and not any(map(names_owner, others)):
        known["CC-PDM-1.0"] = others[0] if others else "public domain"
    if not known:
        return License("", others[0] if others else "")
    if is_denied or (flags & _FALSE and known.keys() <= PUBLIC) or (flags & _TRUE and flags & _FALSE):
        return License("", "; ".join(dict.fromkeys([*known.values(), *others])))
    least = {spdx: text for spdx, text in known.items() if spdx not in PUBLIC} or dict([next(iter(known.items()))])
    # CC-BY-3.0-DE is the same license as CC-BY-3.0.
    least = {spdx: text for spdx, text in least.items() if not any(other.startswith(f"{spdx}-") for other in least)}
    return License(*next(iter(least.items()))) if len(least) == 1 else License("", "; ".join(known.values()))


def license_columns(names: Iterable[str]) -> list[str]:
    """The columns that tell a license."""
    wanted = {*_LICENSE_COLUMNS, *_PUBLIC_DOMAIN_COLUMNS}
    return [name for name in names if wanted & {_plain_name(name, parts) for parts in _PARTS}]


def attribution_of(cells: Mapping[str, Any]) -> dict[str, str]:
    """The author, title and page of an image by the columns of its source; empty where it has none."""
    texts = {part: [cell_text(cell).strip() for _, cell in _named_cells(cells, names)]
             for part, names in _COLUMNS.items()}
    return {part: next((text for text in candidates if part != "page" or "://" in text), "")
            for part, candidates in texts.items()}


def _named_cells(cells: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The plain names and cells of the columns that have one of these plain names, in their order."""
    by_name: dict[str, dict[str, Any]] = {}
    for parts in _PARTS:
        for name, cell in cells.items():
            plain = _plain_name(name, parts)
            if plain in names and cell_text(cell).strip():
                by_name.setdefault(plain, {})[name] = cell
    return ((name, cell) for name in names for cell in by_name.get(name, {}).values())


def _leaf_texts(cell: Any) -> list[str]:
    """The texts in a cell, which may be a list or an object, or one of these as JSON text."""
    if isinstance(cell, str) and cell.lstrip()[:1] in {"[", "{"}:
        with contextlib.suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    if isinstance(cell, list | tuple | dict):
        return [text for each in (cell.values() if isinstance(cell, dict) else cell) for text in _leaf_texts(each)]
    if isinstance(cell, float) and cell.is_integer():  # pandas makes floats of integers beside nulls
        cell = int(cell)
    return [text] if (text := cell_text(cell).strip()) else []


def _plain_name(name: str, parts: int) -> str:
    return re.sub(r"[^a-z]", "", ".".join(name.lower().split(".")[parts:]))


_NO_BRACKETS = str.maketrans("", "", "()")


class Licenses:
    """Patterns of SPDX identifiers that a license must match."""

    def __init__(self, text: str) -> None:
        """`text` has patterns with commas between them: `CC-BY-*` is any version of CC BY, and `CC-BY*` also others.

        ValueError for a pattern that matches no identifier of the SPDX list.
        """
        self.patterns = [pattern.strip() for pattern in text.split(",") if pattern.strip()]
        self._matches = [re.compile(_expression(pattern), re.IGNORECASE) for pattern in self.patterns]
        for pattern in self.patterns:
            versions = ("1.0", "2.0", "2.1", "2.5", "3.0", "4.0")
            names = [pattern[:-1] + version for version in versions] if pattern.endswith("-*") else [pattern]
            if not any("*" in name or "?" in name or (canonical(name) and " " not in name) for name in names):
                raise ValueError(f"shard.licenses has {pattern!r}: no SPDX identifier matches it\n"
                                 f"hint: --licenses 'CC0-1.0,CC-PDM-1.0,CC-BY-*'")

    def allow(self, spdx: str) -> bool:
        """Whether an identifier matches; an unknown license does not. `A OR B` needs one match."""
        choices = [spdx] if "(" in spdx else spdx.split(" OR ")
        return bool(spdx) and any(all(any(match.fullmatch(part) for match in self._matches)
                                      for part in re.split(" AND | OR ", choice.translate(_NO_BRACKETS)))
                                  for choice in choices)


def _expression(pattern: str) -> str:
    # CC-BY-NC-4.0 must not pass as a version of CC BY.
    head, version = (pattern[:-1], r"\d[\w.-]*") if pattern.endswith("-*") else (pattern, "")
    return re.escape(head).replace(r"\*", ".*").replace(r"\?", ".") + version
