import gzip
import io
import json
import os
import shutil
import stat
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.corpora import emoji

SQUARE = '<path fill="{}" d="M0 0h8v8H0z"/>'
STYLES = sorted(emoji.STYLES)
# Subjects beside those that a test adds; enough of them lack a style for a tenth to be held out.
MANY = [f"thing-{number}" for number in range(200)]


def icon_set(style: str) -> dict:
    """A tiny package with a different drawing per subject, so that no image has two subjects."""
    names = ["red-apple", "ghost", "police-car", "police-car-light", "black-flag", "flag-chad"]
    names += [f"baby{tone}" for tone in ("", "-light", "-medium", "-medium-dark", "-dark")]
    names += ["boy", "boy-medium-skin-tone", "breast-feeding-tone1", *MANY]
    icons = {name: {"body": path(number)} for number, name in enumerate(names)}
    return {"prefix": style, "icons": icons, "aliases": {}, "width": 8, "height": 8}


def path(number: int) -> str:
    return SQUARE.format(f"#00{number:04x}")


@pytest.fixture
def sets() -> dict[str, dict]:
    return {style: icon_set(style) for style in STYLES}


def pack(archive: Path, members: dict[str, dict]) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            text = json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))


def pack_all(cache: Path, sets: dict[str, dict]) -> Path:
    cache.mkdir(exist_ok=True)
    for style, package in emoji.STYLES.items():
        info = {
            "total": len(sets[style]["icons"]),
            "author": {"name": f"the {style} people", "url": "https://example.org"},
            "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://example.org/by"},
        }
        members = {"package/icons.json": sets[style], "package/info.json": info}
        pack(package.archive(cache), members)
    labels = [
        {"label": "red apple", "tags": ["apple", "fruit", "red", "ripe"]},
        {"label": "jack-o’-lantern", "tags": ["pumpkin"]},
        {"label": "piñata", "tags": ["party"]},
    ]
    about = {
        "license": "MIT",
        "author": "Someone",
        "repository": {"url": "git@github.com:someone/emojibase.git"},
    }
    pack(
        emoji.TAGS.archive(cache),
        {"package/en/data.json": labels, "package/package.json": about},
    )
    return cache


def styles_of(catalog, subject: str) -> list[str]:
    return [picture.style for picture in catalog.pictures if picture.subject == subject]


def pixels(catalog, key: str, size: int = 32) -> np.ndarray:
    picture = next(picture for picture in catalog.pictures if picture.key == key)
    image = Image.open(io.BytesIO(emoji.render(catalog, picture, size)))
    assert image.format == "PNG" and image.mode == "RGB" and image.size == (size, size)
    return np.asarray(image)


def test_subjects_are_those_that_six_styles_have(tmp_path, sets):
    for style in STYLES[:5]:
        sets[style]["icons"]["rare"] = {"body": path(1001)}
    for style in STYLES[:6]:
        sets[style]["icons"]["usual"] = {"body": path(1002)}
        sets[style]["icons"]["old"] = {"body": path(1003), "hidden": True}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    assert styles_of(catalog, "usual") == STYLES[:6]
    assert styles_of(catalog, "ghost") == STYLES == list(catalog.styles)
    assert not {"rare", "old"} & set(catalog.subjects)
    order = [(picture.style, picture.subject) for picture in catalog.pictures]
    assert order == sorted(order)


def test_skin_tones_and_flags_are_left_out(tmp_path, sets):
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    subjects = set(catalog.subjects) - set(MANY)
    assert subjects == {"red-apple", "ghost", "police-car", "police-car-light", "baby", "boy"}


def test_mailboxes_with_flags_are_no_flags():
    assert not emoji._is_variant("closed-mailbox-with-lowered-flag", set())
    assert not emoji._is_variant("open-mailbox-with-raised-flag", set())
    for flag in ("flag-in-hole", "crossed-flags", "rainbow-flag", "flag"):
        assert emoji._is_variant(flag, set())


def test_tags_do_not_repeat_the_caption(tmp_path, sets):
    for style in STYLES:
        sets[style]["icons"]["jack-o-lantern"] = {"body": path(1001)}
        sets[style]["icons"]["piata"] = {"body": path(1002)}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    by_subject = {picture.subject: picture for picture in catalog.pictures}
    assert by_subject["red-apple"].caption == "red apple"
    assert by_subject["red-apple"].tags == ("fruit", "ripe")  # what the caption says is not repeated
    assert by_subject["jack-o-lantern"].tags == ("pumpkin",) and by_subject["piata"].tags == ("party",)
    assert by_subject["ghost"].tags == ()


def test_an_alias_gives_a_style_the_subject_it_lacks(tmp_path, sets):
    icons = sets["noto"]["icons"]
    icons["specter"] = icons.pop("ghost")
    sets["noto"]["aliases"] = {"ghost": {"parent": "spirit"}, "spirit": {"parent": "specter"}}
    sets["twemoji"]["icons"].pop("ghost")
    sets["twemoji"]["aliases"] = {"ghost": {"parent": "ghost"}}  # has no target
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    assert styles_of(catalog, "ghost") == [style for style in STYLES if style != "twemoji"]
    assert "specter" not in catalog.subjects


@pytest.mark.parametrize("transform", [{"hFlip": True}, {"vFlip": True}, {"rotate": 1}])
def test_a_turned_alias_is_not_followed(tmp_path, sets, transform):
    sets["noto"]["icons"]["specter"] = sets["noto"]["icons"].pop("ghost")
    sets["noto"]["aliases"] = {"ghost": {"parent": "specter", **transform}}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    assert styles_of(catalog, "ghost") == [style for style in STYLES if style != "noto"]


def test_a_drawing_has_one_subject_and_a_held_out_one_comes_first(tmp_path, sets):
    """The text encoder holds `ghost` out, so its drawing must not be in training under another name."""
    for style in STYLES:
        sets[style]["icons"]["apparition"] = {"body": path(1001)}
    sets["noto"]["icons"]["apparition"] = dict(sets["noto"]["icons"]["ghost"])
    sets["twemoji"]["icons"].pop("red-apple")
    sets["twemoji"]["aliases"] = {"red-apple": {"parent": "boy"}}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    assert styles_of(catalog, "ghost") == STYLES
    assert styles_of(catalog, "apparition") == [style for style in STYLES if style != "noto"]
    assert styles_of(catalog, "red-apple") == [style for style in STYLES if style != "twemoji"]


def test_held_out_subjects_are_the_same_in_every_style(tmp_path, sets):
    for number, name in enumerate(MANY):
        sets[STYLES[number % 8]]["icons"].pop(name)
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    verdicts = {(picture.subject, picture.held_out) for picture in catalog.pictures}
    assert len(verdicts) == len(catalog.subjects)
    held_out = {subject for subject, kept_back in verdicts if kept_back}
    assert "ghost" in held_out and "red-apple" not in held_out
    assert 0.05 < len(held_out & set(MANY)) / len(MANY) < 0.15


def test_icons_are_centered_undistorted_on_white(tmp_path, sets):
    wide = {"body": '<path fill="#f00" d="M4 6h16v8H4z"/>'}
    sets["noto"]["icons"]["ghost"] = {**wide, "left": 4, "top": 6, "width": 16, "height": 8}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    red = (pixels(catalog, "noto/ghost") == (255, 0, 0)).all(2)
    y, x = np.nonzero(red)
    assert (x.min(), x.max(), y.min(), y.max()) == (0, 31, 8, 23) and red.sum() == 32 * 16
    white = (pixels(catalog, "noto/ghost") == 255).all(2)
    assert white.sum() == 32 * 16


def test_an_icon_without_a_size_has_the_size_of_its_set(tmp_path, sets):
    sets["noto"] |= {"width": 16, "height": 16, "left": -8}
    sets["noto"]["icons"]["ghost"] = {"body": SQUARE.format("#f00")}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    y, x = np.nonzero((pixels(catalog, "noto/ghost") == (255, 0, 0)).all(2))
    assert (x.min(), x.max(), y.min(), y.max()) == (16, 31, 0, 15)


def test_current_color_is_black(tmp_path, sets):
    sets["noto"]["icons"]["ghost"] = {"body": SQUARE.format("currentColor")}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    assert pixels(catalog, "noto/ghost").max() == 0


def test_rendering_is_deterministic_and_of_any_size(tmp_path, sets):
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    again = emoji.catalog(tmp_path)
    assert again == catalog
    for size in (1, 7, 64, 200):
        first = emoji.render(catalog, catalog.pictures[0], size)
        assert first == emoji.render(again, again.pictures[0], size)
        assert Image.open(io.BytesIO(first)).size == (size, size)


@pytest.mark.parametrize("body", ["<path d=", SQUARE.format("#fff"), "<text>no fonts</text>"])
def test_a_drawing_that_fails_is_named(tmp_path, sets, body):
    sets["noto"]["icons"]["ghost"] = {"body": body}
    catalog = emoji.catalog(pack_all(tmp_path, sets))
    with pytest.raises(ValueError, match="noto/ghost"):
        pixels(catalog, "noto/ghost")


def test_sources_state_every_license(tmp_path, sets):
    rows = emoji.sources(pack_all(tmp_path, sets))
    assert [row["style"] for row in rows] == [*STYLES, None]
    assert rows[0]["package"] == f"@iconify-json/{STYLES[0]}"
    assert rows[0]["drawings"] == len(sets[STYLES[0]]["icons"])
    assert rows[0]["author_name"] == f"the {STYLES[0]} people"
    assert rows[-1]["package"] == "emojibase-data" and rows[-1]["licence_spdx"] == "MIT"
    assert rows[-1]["author_url"] == "https://github.com/someone/emojibase"
    assert len({tuple(row) for row in rows[:-1]}) == 1 and set(rows[-1]) == set(rows[0])


@pytest.fixture
def registry(tmp_path, sets, monkeypatch) -> Path:
    """A folder that a script named `npm` packs from. The script logs its requests."""
    shelf = pack_all(tmp_path / "registry", sets)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    npm = binaries / "npm"
    npm.write_text(
        "#!/bin/sh\n"
        f'echo "$2" >> "{shelf}/log"\n'
        f'if [ -e "{shelf}/offline" ]; then echo "npm error network down" >&2; exit 1; fi\n'
        "name=$(echo \"${2#@}\" | sed 's|/|-|; s|@|-|').tgz\n"
        f'cp "{shelf}/$name" . && echo "$name"\n'
    )
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    return shelf


def requested_packages(registry: Path) -> list[str]:
    log = registry / "log"
    return sorted(log.read_text().split()) if log.exists() else []


def test_fetch_downloads_every_package_once(tmp_path, registry):
    cache = tmp_path / "deep" / "cache"
    emoji.fetch(cache)
    packages = [*emoji.STYLES.values(), emoji.TAGS]
    specs = sorted(f"{package.name}@{package.version}" for package in packages)
    assert requested_packages(registry) == specs
    assert sorted(cache.iterdir()) == sorted(package.archive(cache) for package in packages)
    emoji.fetch(cache)
    assert requested_packages(registry) == specs  # nothing was requested again
    assert emoji.catalog(cache).pictures


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_cut_off_archive_is_fetched_again(tmp_path, registry, share):
    cache = tmp_path / "cache"
    emoji.fetch(cache)
    archive = emoji.STYLES["noto"].archive(cache)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * share)])
    if share == 0.5:
        with pytest.raises(ValueError, match="missing or broken"):
            emoji.catalog(cache)
    emoji.fetch(cache)
    assert archive.read_bytes() == whole
    packages = requested_packages(registry)
    assert Counter(packages)["@iconify-json/noto@1.2.9"] == 2 and len(packages) == len(emoji.STYLES) + 2


@pytest.mark.parametrize("bad", ["cut", "other"])
def test_a_broken_archive_from_npm_does_not_enter_the_cache(tmp_path, registry, bad):
    archive = emoji.STYLES["noto"].archive(registry)
    if bad == "cut":
        archive.write_bytes(archive.read_bytes()[:-100])
    else:
        with gzip.open(archive, "wb") as file:
            file.write(b"\0" * 1024)
    cache = tmp_path / "cache"
    with pytest.raises(emoji.NpmUnavailable, match="no whole archive of @iconify-json/noto"):
        emoji.fetch(cache)
    assert not emoji.STYLES["noto"].archive(cache).exists()
    assert not list(cache.glob(".npm-*"))


def test_npm_offline_or_missing_has_a_clear_message(tmp_path, registry, monkeypatch):
    (registry / "offline").touch()
    with pytest.raises(emoji.NpmUnavailable, match="npm error network down"):
        emoji.fetch(tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="npm is not on the PATH"):
        emoji.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_archive_has_a_clear_message(tmp_path):
    with pytest.raises(ValueError, match="hint: fetch"):
        emoji.catalog(tmp_path)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_real_packages_are_read(tmp_path):
    emoji.fetch(tmp_path)
    catalog = emoji.catalog(tmp_path)
    count = Counter(picture.style for picture in catalog.pictures)
    held_out = Counter(picture.style for picture in catalog.pictures if picture.held_out)
    assert set(count) == set(STYLES) and min(count.values()) > 1000
    assert all(0.08 < held_out[style] / count[style] < 0.12 for style in STYLES)
    for picture in catalog.pictures[::200]:
        assert emoji.render(catalog, picture, 64) == emoji.render(catalog, picture, 64)
    assert all(row["licence_spdx"] for row in emoji.sources(tmp_path))
