"""Synthetic images: colored shapes in six styles, for tests and without npm.

Subjects differ in the things that a caption names: shape, color, size, tilt, number, a second shape.
Styles differ in the way of drawing. It needs no download, and a corpus may have any size.
"""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pipeline.corpora.shapes import SHAPES, rotate
from pipeline.corpora.vocabulary import Catalog, CatalogImage, name_hash

HELD_OUT_ONE_IN = 10
SUPERSAMPLED = 512  # pixels a side up to which sampling is threefold, past it twofold

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 204, 21),
    "green": (46, 160, 67),
    "blue": (37, 99, 235),
    "purple": (126, 58, 190),
    "pink": (244, 114, 182),
    "brown": (133, 77, 38),
    "turquoise": (20, 184, 176),
    "grey": (120, 128, 138),
}
WARM = {"red", "orange", "yellow", "pink", "brown"}


SIZES = {"small": 0.55, "": 0.8, "large": 1.0}
TILTS = {"": 0.0, "tilted": 24.0}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
# Places of the shapes of a group, and half of the room of each, in halves of the image.
PLACES: dict[int, tuple[tuple[tuple[float, float], ...], float]] = {
    1: (((0, 0),), 0.94),
    2: (((-0.47, 0), (0.47, 0)), 0.46),
    3: (((0, -0.45), (-0.47, 0.42), (0.47, 0.42)), 0.42),
    4: (((-0.47, -0.47), (0.47, -0.47), (-0.47, 0.47), (0.47, 0.47)), 0.42),
    5: (((-0.6, -0.6), (0.6, -0.6), (0, 0), (-0.6, 0.6), (0.6, 0.6)), 0.34),
}
JOINTS = ("left of", "above", "inside")


@dataclass(frozen=True)
class Group:
    """Equal shapes: how many, how large, tilted or not, which color and which shape."""

    colour: str
    shape: str
    size: str = ""
    tilt: str = ""
    number: str = ""

    @property
    def name(self) -> str:
        """The words of a caption, as in `two small red stars`."""
        noun = SHAPES[self.shape].plural if self.number else self.shape
        words = (self.number, self.size, self.tilt, self.colour, noun)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """One group, or two of one shape each and how they stand: left of, above or inside."""

    first: Group
    joint: str = ""
    second: Group | None = None

    @property
    def name(self) -> str:
        """The caption."""
        if self.second is None:
            return self.first.name
        return f"{self.first.name} {self.joint} {self.second.name}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Search words that the caption lacks."""
        words = list(SHAPES[self.first.shape].tags)
        words += SHAPES[self.second.shape].tags if self.second else ()
        words.append("warm" if self.first.colour in WARM else "cool")
        words += ("group",) if self.first.number else ()
        return tuple(word for word in dict.fromkeys(words) if word not in self.name.split())


def catalog(subjects: int, seed: int = 0) -> Catalog[Scene]:
    """Subjects in six styles. A smaller catalog of the same seed is the start of a larger one.

    One shape comes first, then groups of one shape, then two shapes. `seed` shuffles each kind. One
    subject in ten is held out, by its name.

    Raises:
        ValueError: there are not as many subjects.
    """
    if not 1 <= subjects <= POSSIBLE:
        raise ValueError(f"subjects={subjects} is not between 1 and {POSSIBLE}, all there are")
    scenes = list(itertools.islice(_scenes(seed), subjects))
    held_out = {
        min((scene.name for scene in scenes[start : start + HELD_OUT_ONE_IN]), key=name_hash)
        for start in range(0, subjects - HELD_OUT_ONE_IN + 1, HELD_OUT_ONE_IN)
    }
    scenes.sort(key=lambda scene: scene.name.replace(" ", "-"))
    pictures, drawings = [], {}
    for style in sorted(STYLES):
        for scene in scenes:
            name = scene.name
            picture = CatalogImage(style, name.replace(" ", "-"), name, scene.tags, name in held_out)
            pictures.append(picture)
            drawings[picture.key] = scene
    return Catalog(tuple(pictures), drawings)


PLAIN = [Group(colour, shape) for colour in COLOURS for shape in SHAPES]
VARIED = [
    Group(colour, shape, size, tilt, number)
    for number, size, tilt, colour, shape in itertools.product(
        ("", *NUMBERS), SIZES, TILTS, COLOURS, SHAPES
    )
    if (number or size or tilt) and (SHAPES[shape].turns or not tilt)
]
# Two shapes are too many to list: they are counted, and made from their number.
PAIR_SIZES = sorted(itertools.product(SIZES, SIZES), key=lambda sizes: sizes != ("", ""))
PAIRS = len(PLAIN) * (len(PLAIN) - 1) * len(JOINTS)
CRAMPED = (len(PLAIN) - 1) * sum(not SHAPES[group.shape].roomy for group in PLAIN)
POSSIBLE = len(PLAIN) + len(VARIED) + (PAIRS - CRAMPED) * len(PAIR_SIZES)


def _scenes(seed: int) -> Iterator[Scene]:
    for kind, groups in enumerate((PLAIN, VARIED)):
        for number in _shuffled(len(groups), seed, kind):
            yield Scene(groups[number])
    for kind, sizes in enumerate(PAIR_SIZES, 2):
        pairs = (_pair(int(number), *sizes) for number in _shuffled(PAIRS, seed, kind))
        yield from (pair for pair in pairs
                    if pair.joint != "inside" or (pair.second and SHAPES[pair.second.shape].roomy))


def _shuffled(count: int, seed: int, kind: int) -> np.ndarray:
    return np.random.default_rng((seed, kind)).permutation(count)


def _pair(number: int, first_size: str, second_size: str) -> Scene:
    number, joint = divmod(number, len(JOINTS))
    first_number, second_number = divmod(number, len(PLAIN) - 1)
    first, second = PLAIN[first_number], PLAIN[second_number + (second_number >= first_number)]  # never twice the same
    return Scene(
        Group(first.colour, first.shape, first_size),
        JOINTS[joint],
        Group(second.colour, second.shape, second_size),
    )


def render(catalog: Catalog[Scene], picture: CatalogImage, size: int) -> bytes:
    """A PNG of size x size, RGB on white; the same bytes each time."""
    over = max(2, min(3, SUPERSAMPLED // size))
    canvas = Image.new("RGB", (size * over, size * over), "white")
    for layer in _layers(catalog.drawings[picture.key], picture.key, canvas.width):
        STYLES[picture.style](canvas, layer)
    png = io.BytesIO()
    canvas.reduce(over).save(png, "PNG")
    return png.getvalue()


@dataclass(frozen=True)
class Layer:
    """Shapes of one color on a square canvas: the area within and their closed lines."""

    colour: Colour
    mask: Image.Image  # L, 255 within
    lines: list[list[tuple[float, float]]]  # in pixels
    is_inner: bool  # stands on another layer, so it is set off by white

    def stroke(self, share: float) -> Image.Image:
        """A mask (L) of the lines, as wide as this share of the canvas."""
        stroke = Image.new("L", self.mask.size)
        pen, width = ImageDraw.Draw(stroke), max(1, round(share * stroke.width))
        for line in self.lines:
            # Once round and one side more, so that the first corner is joined too.
            pen.line([*line, *line[:2]], fill=255, width=width, joint="curve")
        return stroke


Spots = tuple[tuple[float, float], ...]


def _placed(scene: Scene) -> list[tuple[Group, Spots, float]]:
    """The groups in the order of painting, their spots, and half the room of each shape."""
    if scene.second is None:
        return [(scene.first, *PLACES[NUMBERS.get(scene.first.number, 1)])]
    if scene.joint == "inside":
        # A large shape inside a small one is large for the room there is.
        room = 0.5 * SIZES[scene.second.size]
        return [(scene.second, ((0, 0),), 1.05), (scene.first, ((0, 0),), room)]
    spots, room = PLACES[2]
    if scene.joint == "above":
        spots = tuple((y, x) for x, y in spots)
    return [(scene.first, spots[:1], room), (scene.second, spots[1:], room)]


def _layers(scene: Scene, key: str, side: int) -> Iterator[Layer]:
    # By chance, so that no two styles put a subject on exactly the same spot.
    chance = np.random.default_rng(name_hash(key))
    shift, turn, scale = chance.uniform((-0.03, -0.03), 0.03), *chance.uniform((-5, 0.9), (5, 1))
    for number, (group, spots, room) in enumerate(_placed(scene)):
        shape = SHAPES[group.shape]
        outline = rotate(shape.outline, TILTS[group.tilt] + turn)
        outline = outline * (SIZES[group.size] * room * scale)
        mask = Image.new("L", (side, side))
        pen, lines = ImageDraw.Draw(mask), []
        for spot, (part, fill) in itertools.product(spots, ((1.0, 255), (shape.hole, 0))):
            if part:
                corners = (outline * part + np.array(spot) * scale + shift + 1) * (side / 2)
                lines.append([tuple(corner) for corner in corners.tolist()])
                pen.polygon(lines[-1], fill=fill)
        is_inner = scene.joint == "inside" and number == 1
        yield Layer(COLOURS[group.colour], mask, lines, is_inner)


def _mixed(colour: Colour, other: int, share: float) -> Colour:
    """The color with a share of gray level `other`: lighter with 255, darker with 0."""
    red, green, blue = (round(level + (other - level) * share) for level in colour)
    return red, green, blue


def _clear(canvas: Image.Image, layer: Layer, rim: float) -> None:
    if layer.is_inner:
        canvas.paste("white", mask=ImageChops.lighter(layer.mask, layer.stroke(2 * rim)))


def _flat(canvas: Image.Image, layer: Layer) -> None:
    _clear(canvas, layer, 0.02)
    canvas.paste(layer.colour, mask=layer.mask)


def _outlined(canvas: Image.Image, layer: Layer) -> None:
    _clear(canvas, layer, 0.03)
    canvas.paste(_mixed(layer.colour, 255, 0.55), mask=layer.mask)
    canvas.paste((24, 24, 27), mask=layer.stroke(0.038))


def _silhouette(canvas: Image.Image, layer: Layer) -> None:
    _clear(canvas, layer, 0.04)
    canvas.paste("black", mask=layer.mask)


def _line_art(canvas: Image.Image, layer: Layer) -> None:
    _clear(canvas, layer, 0.03)
    canvas.paste("black", mask=layer.stroke(0.02))


def _soft(canvas: Image.Image, layer: Layer) -> None:
    side = canvas.width
    # A blurred shadow needs no detail, and small it is blurred in a tenth of the time.
    low = max(8, side // 8)
    shadow = layer.mask.resize((low, low), Image.Resampling.BOX)
    shadow = shadow.filter(ImageFilter.GaussianBlur(low / 22)).point(lambda level: level * 0.45)
    shadow = shadow.resize((side, side), Image.Resampling.BILINEAR)
    canvas.paste((70, 60, 90), (0, side // 28, side, side + side // 28), shadow)
    _clear(canvas, layer, 0.01)
    light, dark = _mixed(layer.colour, 255, 0.72), _mixed(layer.colour, 0, 0.18)
    canvas.paste(dark, mask=layer.mask)
    canvas.paste(light, mask=ImageChops.multiply(layer.mask, _light(side)))


def _hatched(canvas: Image.Image, layer: Layer) -> None:
    _clear(canvas, layer, 0.03)
    ink = _mixed(layer.colour, 0, 0.3)
    canvas.paste(_mixed(layer.colour, 255, 0.85), mask=layer.mask)
    canvas.paste(ink, mask=ImageChops.multiply(layer.mask, _hatching(canvas.width)))
    canvas.paste(ink, mask=layer.stroke(0.016))


@lru_cache(maxsize=8)
def _light(side: int) -> Image.Image:
    """Light (L) that falls in from the upper left."""
    y, x = np.mgrid[0:side, 0:side] / side
    return Image.fromarray((255 * np.clip(1.15 - 0.45 * x - 0.95 * y, 0, 1)).astype(np.uint8))


@lru_cache(maxsize=8)
def _hatching(side: int) -> Image.Image:
    """Diagonal strokes (L), 12 to the side."""
    y, x = np.mgrid[0:side, 0:side] / side
    return Image.fromarray(np.where((x + y) * 12 % 1 < 0.42, 255, 0).astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image, Layer], None]] = {
    "flat": _flat,
    "hatched": _hatched,
    "lineart": _line_art,
    "outline": _outlined,
    "silhouette": _silhouette,
    "soft": _soft,
}


def sources() -> list[dict]:
    """Per style where its drawings come from: this program, free of rights."""
    styles = {
        "package": "pipeline.drawn",
        "version": "1",
        "licence_spdx": "CC0-1.0",
        "licence_title": "CC0 1.0 Universal",
        "licence_url": "https://creativecommons.org/publicdomain/zero/1.0/",
        "author_name": "drawn by this program",
        "author_url": "",
        "drawings": POSSIBLE,
    }
    return [{"style": style, **styles} for style in sorted(STYLES)]
