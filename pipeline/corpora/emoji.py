"""Real images: emoji in eight styles that five projects drew, under open licenses.

The npm packages `@iconify-json/*` hold them as vector drawings (https://iconify.design/docs/types/
iconify-json.html), so the same subjects can be had in every style and at any size.
"""

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from pipeline.corpora.vocabulary import Catalog, CatalogImage, name_hash

FETCH_SECONDS = 120
FEWEST_STYLES = 6
HELD_OUT_ONE_IN = 10
TRANSFORMS = {"hFlip", "vFlip", "rotate"}
TONE = re.compile(r"skin-tone|-tone\d")
TONE_SUFFIX = re.compile(r"(-medium)?-(light|dark)$|-medium$")
FLAG = re.compile(r"^flag(-|$)|(^|-)(?<!lowered-)(?<!raised-)flags?$")
# The text encoder never saw these subjects, so the denoiser may not either.
TEXT_ENCODER_METRICS = Path(__file__).parents[1] / "embeddings" / "tiny_clip" / "metrics.json"

Icon = dict[str, Any]


class NpmUnavailable(OSError):
    """npm is missing, is offline or failed."""


@dataclass(frozen=True)
class Package:
    """An npm package at one version, and the member without which its archive is of no use."""

    name: str
    version: str
    member: str

    def archive(self, cache: Path) -> Path:
        """The path of its archive in the cache."""
        return cache / f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def _icons(style: str, version: str) -> Package:
    return Package(f"@iconify-json/{style}", version, "package/icons.json")


STYLES: dict[str, Package] = {
    "emojione": _icons("emojione", "1.2.3"),
    "emojione-monotone": _icons("emojione-monotone", "1.2.1"),
    "fluent-emoji": _icons("fluent-emoji", "1.2.7"),
    "fluent-emoji-flat": _icons("fluent-emoji-flat", "1.2.6"),
    "fluent-emoji-high-contrast": _icons("fluent-emoji-high-contrast", "1.2.6"),
    "noto": _icons("noto", "1.2.9"),
    "openmoji": _icons("openmoji", "1.2.29"),
    "twemoji": _icons("twemoji", "1.2.5"),
}
TAGS = Package("emojibase-data", "17.0.0", "package/en/data.json")


def fetch(cache: Path) -> None:
    """Bring the packages into `cache`; whole archives that are there already are not fetched again.

    Raises:
        NpmUnavailable: npm is missing, cannot reach its registry, or brings a broken archive.
    """
    cache.mkdir(parents=True, exist_ok=True)
    packages = [*STYLES.values(), TAGS]
    with ThreadPoolExecutor(len(packages)) as pool:
        list(pool.map(lambda package: _fetch_one(package, cache), packages))


def _fetch_one(package: Package, cache: Path) -> None:
    archive = package.archive(cache)
    if _is_whole(archive, package.member):
        return
    # Packed beside the cache's files, so the rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".npm-") as scratch:
        _npm_pack(f"{package.name}@{package.version}", Path(scratch))
        packed = sorted(Path(scratch).glob("*.tgz"))
        if len(packed) != 1 or not _is_whole(packed[0], package.member):
            raise NpmUnavailable(
                f"npm pack brought no whole archive of {package.name}@{package.version} "
                f"with {package.member}"
            )
        os.replace(packed[0], archive)


def _npm_pack(spec: str, folder: Path) -> None:
    command = ["npm", "pack", spec, "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_SECONDS,
        )
    except FileNotFoundError as error:
        raise NpmUnavailable(
            f"npm is not on the PATH, so {spec} cannot be fetched\n"
            "hint: install Node.js, or use the drawn corpus, which needs no download"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise NpmUnavailable(
            f"npm pack {spec} did not end within {FETCH_SECONDS} s\nhint: is the network there?"
        ) from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.strip()), "no message")
        raise NpmUnavailable(
            f"npm pack {spec} failed with status {done.returncode}: {said.strip()}\n"
            "hint: is the registry within reach? `npm ping` tells"
        )


def _is_whole(archive: Path, member: str) -> bool:
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            is_member = member in [entry.name for entry in tar]
            # gzip's checksum stands at the end: only reading that far finds a cut-off file.
            while stream.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return False
    return is_member


def _read_json(package: Package, cache: Path, member: str) -> Any:
    archive = package.archive(cache)
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile(member)
            if file is None:
                raise KeyError(f"{member} is not a file")
            return json.load(file)
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError, ValueError) as error:
        raise ValueError(
            f"{archive} is missing or broken: {error}\nhint: fetch the emoji into {cache} again"
        ) from error


def catalog(cache: Path) -> Catalog[str]:
    """The subjects that at least six of the eight styles have, without skin tones and flags.

    The drawings are SVG texts on a white square. A drawing belongs to one subject of a style only:
    some sets repeat a drawing, and a held-out subject must not return under another name.

    Raises:
        ValueError: an archive is missing from `cache` or broken.
    """
    sets = {style: _read_json(package, cache, package.member) for style, package in STYLES.items()}
    kept_back = set(json.loads(TEXT_ENCODER_METRICS.read_text())["held_out_subjects"])
    subjects = _subjects(sets, first=kept_back)
    held_out = _held_out(subjects, kept_back)
    words = _search_words(cache)
    pictures, drawings = [], {}
    for style in sorted(STYLES):
        for subject in sorted(subjects):
            icon = subjects[subject].get(style)
            if icon is None:
                continue
            tags = tuple(tag for tag in words.get(subject, ()) if tag not in subject.split("-"))
            caption = subject.replace("-", " ")
            picture = CatalogImage(style, subject, caption, tags, subject in held_out)
            pictures.append(picture)
            drawings[picture.key] = _svg(icon, sets[style])
    return Catalog(tuple(pictures), drawings)


def _subjects(sets: Mapping[str, dict], first: set[str]) -> dict[str, dict[str, Icon]]:
    """Subject -> style -> icon; names that most sets share, and those in `first`, choose first."""
    shared: Counter[str] = Counter()
    for icon_set in sets.values():
        names = {name for name, icon in icon_set["icons"].items() if not icon.get("hidden")}
        shared.update(name for name in names if not _is_variant(name, names))
    bodies: dict[str, set[str]] = {style: set() for style in sets}
    subjects = {}
    for name in sorted(shared, key=lambda name: (-shared[name], name not in first, name)):
        icons = {style: _find(icon_set, name) for style, icon_set in sets.items()}
        # An alias may lead to another subject's drawing: one set's `cricket` is its bat and ball.
        free = {s: icon for s, icon in icons.items() if icon and icon["body"] not in bodies[s]}
        if len(free) >= FEWEST_STYLES:
            subjects[name] = free
            for style, icon in free.items():
                bodies[style].add(icon["body"])
    return subjects


def _is_variant(name: str, names: set[str]) -> bool:
    """Whether `name` is a skin tone (`-dark` only where its family is there too) or a flag."""
    if TONE.search(name) or FLAG.search(name):
        return True
    family = TONE_SUFFIX.sub("", name)
    return family != name and f"{family}-medium-dark" in names


def _find(icon_set: dict, name: str) -> Icon | None:
    """The icon of that name or behind its alias; None if absent, hidden, or turned or mirrored."""
    aliases, seen = icon_set.get("aliases", {}), set()
    overrides: Icon = {}
    while name not in icon_set["icons"]:
        if name not in aliases or name in seen:
            return None
        seen.add(name)
        alias = aliases[name]
        overrides = {**alias, **overrides}
        name = alias["parent"]
    icon = {**icon_set["icons"][name], **overrides}
    return None if icon.get("hidden") or TRANSFORMS & set(icon) else icon


def _held_out(subjects: Mapping[str, dict], kept_back: set[str]) -> set[str]:
    """The subjects that are held out already, and one in ten of the subjects that lack a style."""
    lacking = (name for name, icons in subjects.items() if len(icons) < len(STYLES))
    chosen = {name for name in lacking if name_hash(name) % HELD_OUT_ONE_IN == 0}
    return (kept_back & set(subjects)) | chosen


def _search_words(cache: Path) -> dict[str, tuple[str, ...]]:
    """Subject -> search words; the label `jack-o’-lantern` is the subject `jack-o-lantern`."""
    words: dict[str, tuple[str, ...]] = {}
    for entry in _read_json(TAGS, cache, TAGS.member):
        label = entry["label"].lower().replace("’", "").replace("'", "")
        plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
        # The icon sets drop letters with accents whole (`piata`); others spell them plainly.
        for spelling in (plain, label.encode("ascii", "ignore").decode()):
            name = re.sub(r"[^a-z0-9]+", "-", spelling).strip("-")
            words.setdefault(name, tuple(entry.get("tags", ())))
    return words


def _svg(icon: Icon, icon_set: dict) -> str:
    """The icon centered on a square, undistorted; the set's own measures stand where it has none."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    view_x, view_y, width, height = (
        float(icon.get(side, icon_set.get(side, default))) for side, default in defaults.items()
    )
    square = max(width, height)
    x, y = (square - width) / 2, (square - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {square:g} {square:g}" color="#000">'
        f'<svg x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'viewBox="{view_x:g} {view_y:g} {width:g} {height:g}">{icon["body"]}</svg></svg>'
    )


def render(catalog: Catalog[str], picture: CatalogImage, size: int) -> bytes:
    """A PNG of size x size, RGB on white; the same bytes each time.

    Raises:
        ValueError: the drawing cannot be rendered or comes out blank; names the image.
    """
    svg = catalog.drawings[picture.key]
    try:
        rendered = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
    except ValueError as error:
        raise ValueError(f"{picture.key} cannot be rendered: {error}") from error
    image = Image.open(io.BytesIO(rendered)).convert("RGB")
    if image.getextrema() == ((255, 255),) * 3:
        raise ValueError(f"{picture.key} comes out blank")
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def sources(cache: Path) -> list[dict]:
    """Per style where its drawings come from and under which license, and last the search words.

    Raises:
        ValueError: an archive is missing from `cache` or broken.
    """
    rows = []
    for style, package in sorted(STYLES.items()):
        info = _read_json(package, cache, "package/info.json")
        row = _source(style, package, info["license"], info["author"])
        rows.append({**row, "drawings": info["total"]})
    about = _read_json(TAGS, cache, "package/package.json")
    home = about["repository"]["url"].replace("git@github.com:", "https://github.com/")
    home = home.removesuffix(".git")
    name = about["license"]
    licence = {"title": name, "spdx": name, "url": f"{home}/blob/HEAD/LICENSE"}
    author = {"name": about["author"], "url": home}
    return [*rows, {**_source(None, TAGS, licence, author), "drawings": 0}]


def _source(style: str | None, package: Package, licence: dict, author: dict) -> dict:
    return {
        "style": style,
        "package": package.name,
        "version": package.version,
        "licence_spdx": licence.get("spdx", ""),
        "licence_title": licence.get("title", ""),
        "licence_url": licence.get("url", ""),
        "author_name": author.get("name", ""),
        "author_url": author.get("url", ""),
    }
