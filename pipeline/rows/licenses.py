"""Licenses as SPDX identifiers, and the author, title and page of an image, whatever a source calls them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from pipeline.tables.cells import cell_text

# In any case, without what is not a letter. The first one that has a cell with a known license counts.
_LICENSE_COLUMNS = ("licensespdx", "licencespdx", "spdx", "license", "licence", "licenseurl", "licenceurl",
                    "licensename", "licencename", "licensetitle", "licencetitle", "licenseshortname", "licenseid",
                    "rightsandreproduction", "rights", "rightsstatement", "rightsurl", "usageterms", "usage",
                    "usageaccess", "copyright", "copyrightstatus", "objectrights", "accessrights")
_PUBLIC_DOMAIN_COLUMNS = ("ispublicdomain", "ispublicdomainwork", "publicdomain")
_COLUMNS = {
    "author": ("author", "authorname", "creator", "creatorname", "artist", "artistname", "artistdisplayname",
               "artisttitle", "artistdisplay", "photographer", "photographername", "principalorfirstmaker",
               "objectcreator", "attribution", "credit", "creditline", "ownername", "owner", "uploader"),
    "title": ("title", "objecttitle", "imagetitle", "worktitle", "objectname"),
    "page": ("originallandingurl", "landingurl", "foreignlandingurl", "pageurl", "page", "landingpage", "linkresource",
             "objecturl", "descriptionurl", "sourceurl", "objectpersistentidentifier", "weburl", "recordlink",
             "flickrurl", "permalink", "source"),
}
# Numbers that Flickr's interface and COCO use. 0 is all rights reserved, 7 and 8 are no licenses.
_NUMBERS = {"1": "CC-BY-NC-SA-2.0", "2": "CC-BY-NC-2.0", "3": "CC-BY-NC-ND-2.0", "4": "CC-BY-2.0", "5": "CC-BY-SA-2.0",
            "6": "CC-BY-ND-2.0", "9": "CC0-1.0", "10": "CC-PDM-1.0", "11": "CC-BY-4.0", "12": "CC-BY-SA-4.0",
            "13": "CC-BY-ND-4.0", "14": "CC-BY-NC-4.0", "15": "CC-BY-NC-SA-4.0", "16": "CC-BY-NC-ND-4.0"}
_NAMES = {"apache license 2.0": "Apache-2.0", "apache license, version 2.0": "Apache-2.0", "apache 2.0": "Apache-2.0",
          "mit license": "MIT", "the mit license": "MIT", "open government licence v3.0": "OGL-UK-3.0",
          "open government licence": "OGL-UK-3.0", "ogl v3.0": "OGL-UK-3.0", "sil open font license 1.1": "OFL-1.1",
          "sil ofl 1.1": "OFL-1.1", "the unlicense": "Unlicense", "public domain": "CC-PDM-1.0", "pd": "CC-PDM-1.0",
          "pdm": "CC-PDM-1.0"}
_URL = re.compile(r"creativecommons\.org/(?:licen[cs]es|publicdomain)/([a-z-]+)(?:/(\d\.\d))?"
                  r"(?:/(?!deed|rdf|legalcode)(igo|[a-z]{2})\b)?", re.IGNORECASE)
_PUBLIC = {"zero": "CC0-1.0", "mark": "CC-PDM-1.0", "publicdomain": "CC-PDDC"}
# Words of the names of licenses, as their letters in identifiers.
_WORDS = ((r"creative[\s_-]*commons", "cc"), (r"non[\s_-]*commercial", "nc"), (r"share[\s_-]*alike", "sa"),
          (r"no[\s_-]*deriv(?:ative)?s?(?:[\s_-]*works)?", "nd"), (r"attribution", "attr"))
_CODE = re.compile(r"(?i:(?:\bcc[\s_:-]*(?:by|attr)|\battr)((?:[\s_+/-]*(?:nc|nd|sa))*)(?![a-z])"
                   r"(?:[\s_,:-]*licen[cs]e)?(?:[\s_,:-]*v(?:er|ersion)?[.:]?)?[\s_-]*)"
                   r"([1-4](?:\.\d)?)(?!\.?\d)(?:[\s_/-]*\(?(IGO|[A-Z]{2})\b)?")
_ZERO = re.compile(r"\b(?:cc[\s_-]?0|cc[\s_-]?zero|creative commons zero|public domain dedication)\b", re.IGNORECASE)
_MARK = re.compile(r"\bpublic[\s_-]?domain[\s_-]?mark\b", re.IGNORECASE)


_PARTS = (0, -2, -1)  # of media.usage.access: the whole, the last two, the last one


class License(NamedTuple):
    """The license of an image: its SPDX identifier, empty if unknown, and the text of the source."""

    spdx: str
    text: str


def find_spdx(value: Any) -> str:
    """The SPDX identifier of a license by its URL, name, identifier or Flickr's number; empty if it is not known.

    A port of a Creative Commons license has its own identifier where SPDX has one, else that of the license. The name
    of a license that comes in versions is not enough without the version.
    """
    text = re.sub(r"\s+", " ", cell_text(value)).strip().rstrip(".")
    if text in _NUMBERS:
        return _NUMBERS[text]
    if known := _NAMES.get(text.lower()) or _canonical(text) or _canonical(re.sub(r"[\s_]+", "-", text)):
        return known
    if url := _URL.search(text):
        code, version, port = (part and part.lower() for part in url.groups())
        return _PUBLIC.get(code) or (_creative_commons(code, version, port) if version and code[:2] == "by" else "")
    if _ZERO.search(text):
        return "CC0-1.0"
    if _MARK.search(text):
        return "CC-PDM-1.0"
    for words, letters in _WORDS:
        text = re.sub(words, letters, text, flags=re.IGNORECASE)
    code_match = _CODE.search(text)
    return _creative_commons(code_match[1], code_match[2], code_match[3]) if code_match else ""


def _canonical(text: str) -> str:
    if not text or " " in text:
        return ""
    try:
        return canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        return ""


def _creative_commons(code: str, version: str, port: str | None) -> str:
    kinds = re.findall("NC|ND|SA", code.upper())
    name = "-".join(["CC", "BY", *(kind for kind in ("NC", "ND", "SA") if kind in kinds),
                     version if "." in version else f"{version}.0"])
    return (port and _canonical(f"{name}-{port}")) or _canonical(name)


def license_of(cells: Mapping[str, Any]) -> License:
    """The license of an image by the columns of its source."""
    texts = []
    for name, text in _texts(cells, _LICENSE_COLUMNS):
        if (name.startswith("licen") or not text.isdigit()) and (spdx := find_spdx(text)):
            return License(spdx, text)
        texts.append(text)
    if any(text.lower() in {"true", "1", "yes"} for _, text in _texts(cells, _PUBLIC_DOMAIN_COLUMNS)):
        return License("CC-PDM-1.0", texts[0] if texts else "public domain")
    return License("", texts[0] if texts else "")


def license_columns(names: Iterable[str]) -> list[str]:
    """The columns that tell a license."""
    wanted = {*_LICENSE_COLUMNS, *_PUBLIC_DOMAIN_COLUMNS}
    return [name for name in names if wanted & {_plain_name(name, parts) for parts in _PARTS}]


def attribution_of(cells: Mapping[str, Any]) -> dict[str, str]:
    """The author, title and page of an image by the columns of its source; empty where it has none."""
    return {part: next((text for _, text in _texts(cells, names) if part != "page" or "://" in text), "")
            for part, names in _COLUMNS.items()}


def _texts(cells: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The plain names and texts of the columns that have one of these plain names, in their order."""
    by_name: dict[str, str] = {}
    for parts in _PARTS:
        for name, cell in cells.items():
            plain = _plain_name(name, parts)
            if plain in names and (text := cell_text(cell).strip()):
                by_name.setdefault(plain, text)
    return ((name, by_name[name]) for name in names if name in by_name)


def _plain_name(name: str, parts: int) -> str:
    return re.sub(r"[^a-z]", "", ".".join(name.lower().split(".")[parts:]))


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
            if not any("*" in name or "?" in name or _canonical(name) for name in names):
                raise ValueError(f"shard.licenses has {pattern!r}: no SPDX identifier matches it\n"
                                 f"hint: --licenses 'CC0-1.0,CC-PDM-1.0,CC-BY-*'")

    def allow(self, spdx: str) -> bool:
        """Whether an identifier matches; an unknown license does not."""
        return bool(spdx) and any(match.fullmatch(spdx) for match in self._matches)


def _expression(pattern: str) -> str:
    # CC-BY-NC-4.0 must not pass as a version of CC BY.
    head, version = (pattern[:-1], r"\d[\w.-]*") if pattern.endswith("-*") else (pattern, "")
    return re.escape(head).replace(r"\*", ".*").replace(r"\?", ".") + version
