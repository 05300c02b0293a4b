"""Texts of licenses as SPDX identifiers. A text counts only if all of it is understood: nothing is guessed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

PUBLIC = {"CC0-1.0", "CC-PDM-1.0", "CC-PDDC"}
"""The identifiers of works without an owner."""
# Numbers that Flickr's interface and COCO use. 0 is all rights reserved, 7 and 8 are no licenses.
_NUMBERS = {"1": "CC-BY-NC-SA-2.0", "2": "CC-BY-NC-2.0", "3": "CC-BY-NC-ND-2.0", "4": "CC-BY-2.0", "5": "CC-BY-SA-2.0",
            "6": "CC-BY-ND-2.0", "9": "CC0-1.0", "10": "CC-PDM-1.0", "11": "CC-BY-4.0", "12": "CC-BY-SA-4.0",
            "13": "CC-BY-ND-4.0", "14": "CC-BY-NC-4.0", "15": "CC-BY-NC-SA-4.0", "16": "CC-BY-NC-ND-4.0"}
_NAMES = {"apache license 2.0": "Apache-2.0", "apache license, version 2.0": "Apache-2.0", "apache 2.0": "Apache-2.0",
          "mit license": "MIT", "the mit license": "MIT", "open government licence v3.0": "OGL-UK-3.0",
          "ogl v3.0": "OGL-UK-3.0", "sil open font license 1.1": "OFL-1.1",
          "sil ofl 1.1": "OFL-1.1", "the unlicense": "Unlicense", "pd": "CC-PDM-1.0", "pdm": "CC-PDM-1.0"}

_TAG = re.compile(r"""<[^<>]*?\bhref=["']?([^"'\s>]*)[^<>]*>|<[^<>]*>""")
_OWNER = re.compile(r"^(?:©|\(c\)|copyright\b)[^,;/|]{1,80}[,;/|]", re.IGNORECASE)
_URL = re.compile(r"(?:https?:)?(?://)?(?:www\.)?creativecommons\.org/(?:licen[cs]es|publicdomain)/([a-z+-]+)"
                  r"(?:/(\d\.\d))?(?:/(igo|[a-z]{2})(?![a-z]))?(?:/(?:deed|rdf|legalcode)(?:\.[a-z_-]+)?)?/?"
                  r"(?:[?#][\w=&.%-]*)?(?![\w/])", re.IGNORECASE)
# Words of the names of licenses, as their letters in identifiers.
_WORDS = ((r"creative[\s_-]*commons", "cc"), (r"non[\s_-]*commercial", "nc"), (r"share[\s_-]*alike", "sa"),
          (r"no[\s_-]*deriv(?:ative)?s?(?:[\s_-]*works)?", "nd"), (r"attribution", "attr"))
_CODE = re.compile(r"(?i:(?:\bcc[\s_:-]*(?:by|attr)|\battr)((?:[\s_+/-]*(?:nc|nd|sa))*)(?![a-z])"
                   r"(?:[\s_,:-]*(?:public\s)?licen[cs]e)?)"
                   r"(?:(?i:[\s_,:-]*v(?:er|ersion)?[.:]?)?[\s_-]*([1-4](?:\.\d)?)(?!\.?\d)"
                   r"(?:[\s_/-]*\(?(?!NC|ND|SA|NO)(IGO|[A-Z]{2})\b\)?)?)?")
_ZERO = re.compile(r"\b(?:cc[\s_-]?(?:0|zero)(?![a-z0-9])|public[\s_-]domain[\s_-]dedication\b)(?:[\s_-]*v?1\.0)?",
                   re.IGNORECASE)
_MARK = re.compile(r"\bpublic[\s_-]?domain[\s_-]?mark\b(?:[\s_-]*v?1\.0)?", re.IGNORECASE)
_PUBLIC_DOMAIN = re.compile(r"\bpublic[\s_-]?domain\b", re.IGNORECASE)
_FILLERS = re.compile(r"""(?:[\s.,;:()\[\]'"/|–—-]|\b(?:some\ rights\ reserved|(?:public\ )?licen[cs]ed?|legal\ code
                      |deed|under|terms\ of|the|a|this|is|available|images?|photo(?:graph)?s?|pictures?|works?|files?|cc
                      |universal|international|unported|generic)\b)*""", re.IGNORECASE | re.VERBOSE)

_DENIAL = re.compile(r"(?<!some )\brights? reserved|\bnot\b|\bno deriv|non[\s_-]*commercial|\bn[cd]\b|\bin copyright\b|"
                     r"\bcopyrighted|\bpermission|\brestricted|\bprohibit|\bfair use|/inc\b|\bnoc-nc\b|\bonly\b|"
                     r"\bno (?!known\b|copyright|(?:known )?restrictions|rights reserved)|\bexcept\b|\bexcluding\b|"
                     r"\bsubject to\b|\bcontact\b|\bfees?\b|\beditorial\b|\beducational\b|"
                     r"\b(?:personal|private|academic|research) (?:use|purpose)", re.IGNORECASE)
_OWNED = re.compile(r"©|\(c\)|(?<!no )(?<!no known )\bcopyright\b", re.IGNORECASE)


class _Mention(NamedTuple):
    """A license that a part of a text names: CC0-1.0, BY-NC and so on; "" if it is of no known kind."""

    name: str
    version: str = ""
    port: str = ""


@lru_cache(1 << 14)
def find_spdx(text: str) -> str:
    """The SPDX identifier of a license by its URL, name, identifier or Flickr's number; empty if it is not known.

    A text with any word that is not part of a known form is unknown, as is one that names several licenses. A port of a
    Creative Commons license has its own identifier where SPDX has one, else that of the license. The name of a license
    that comes in versions is not enough without the version.
    """
    text = re.sub(r"\s+", " ", text).strip().rstrip(".")
    if known := (_NUMBERS.get(text) or _NAMES.get(text.lower()) or canonical(text)
                 or canonical(re.sub(r"[\s_]+", "-", text))):
        return known
    mentions, rest = _split_mentions(text)
    if not mentions or not _FILLERS.fullmatch(rest):
        return ""
    names = {mention.name for mention in mentions}
    if names > {"PD"}:  # of no license: CC0 is a dedication to the public domain
        names -= {"PD"}
        if not names <= PUBLIC:
            return ""
    versions, ports = ({part for part in parts if part} for parts in zip(*(each[1:] for each in mentions), strict=True))
    if len(names) != 1 or len(versions) > 1 or len(ports) > 1:
        return ""
    name, version, port = names.pop(), "".join(versions), "".join(ports)
    if name == "PD":
        return "CC-PDM-1.0"
    if name in PUBLIC or not (name and version):
        return name if name in PUBLIC else ""
    full = f"CC-{name}-{version if '.' in version else f'{version}.0'}"
    return (canonical(f"{full}-{port}") if port else "") or canonical(full)


def denies_use(text: str) -> bool:
    """Whether a text that is no known license restricts what another column may permit."""
    return bool(_DENIAL.search(text)) or text.strip() == "0"


def names_owner(text: str) -> bool:
    """Whether a text says that the work has an owner."""
    return bool(_OWNED.search(text))


def canonical(text: str) -> str:
    """An SPDX identifier or expression in its usual spelling, "" for other texts."""
    if not text:
        return ""
    try:
        return canonicalize_license_expression(text)
    except InvalidLicenseExpression:
        return ""


def _split_mentions(text: str) -> tuple[list[_Mention], str]:
    """The licenses that a text names, and the rest of the text."""
    mentions = []

    def take_url(match: re.Match[str]) -> str:
        code, version, port = ((part or "").lower() for part in match.groups())
        public = {"zero": "CC0-1.0", "mark": "CC-PDM-1.0", "publicdomain": "CC-PDDC"}.get(code)
        mentions.append(_Mention(public) if public else _Mention(_kinds(code) if code[:2] == "by" else "",
                                                                 version, port))
        return " "

    def take_code(match: re.Match[str]) -> str:
        kinds, version, port = match.groups()
        mentions.append(_Mention(_kinds(kinds), version if not version or "." in version else f"{version}.0",
                                 (port or "").lower()))
        return " "

    rest = _URL.sub(take_url, _TAG.sub(lambda match: f" {match[1] or ''} ", text))
    for words, letters in _WORDS:
        rest = re.sub(words, letters, rest, flags=re.IGNORECASE)
    rest = _CODE.sub(take_code, rest)
    for pattern, name in ((_ZERO, "CC0-1.0"), (_MARK, "CC-PDM-1.0"), (_PUBLIC_DOMAIN, "PD")):
        mentions += [_Mention(name)] * len(pattern.findall(rest))
        rest = pattern.sub(" ", rest)
    return mentions, rest if denies_use(rest) else _OWNER.sub(" ", rest.strip())


def _kinds(code: str) -> str:
    kinds = re.findall("NC|ND|SA", code.upper())
    return "-".join(["BY", *(kind for kind in ("NC", "ND", "SA") if kind in kinds)])
