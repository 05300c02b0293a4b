"""Outlines and names of the shapes of the synthetic corpus."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Points = np.ndarray  # (P, 2) float64, x to the right and y down, within the unit circle or near it


@dataclass(frozen=True)
class Shape:
    """A closed outline, its name in the plural, and search words for it."""

    plural: str
    tags: tuple[str, ...]
    outline: Points
    hole: float = 0.0  # the same outline once more, this much smaller, is left out
    turns: bool = True  # whether it looks another when it is tilted
    roomy: bool = True  # whether another shape fits inside


def rotate(points: Points, degrees: float) -> Points:
    """The points turned clockwise about the origin."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _polar(radius: Callable[[np.ndarray], np.ndarray], count: int = 60) -> Points:
    """The curve radius(angle), the angle running from the top clockwise."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * radius(angle)[:, None]


def _corners(count: int, inner: float | None = None) -> Points:
    """A regular polygon, or with `inner` a star whose notches lie at that radius."""
    if inner is None:
        return _polar(np.ones_like, count)
    return _polar(lambda angle: np.where(np.arange(2 * count) % 2, inner, 1.0), 2 * count)


def _petals(count: int, inner: float) -> Points:
    """A flower whose petals meet at the radius `inner`."""
    return _polar(lambda a: inner + (1 - inner) * np.abs(np.cos(count * a / 2)) ** 0.7, 90)


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], 1) / 17


def _crescent() -> Points:
    outer = np.radians(np.linspace(-130, 130, 40))
    inner = np.radians(np.linspace(115, -115, 32))
    big = np.stack([-np.cos(outer), np.sin(outer)], 1)
    small = np.stack([0.35 - 0.82 * np.cos(inner), 0.85 * np.sin(inner)], 1)
    return np.concatenate([big, small])


def _drop() -> Points:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    return np.stack([0.95 * np.sin(t) * np.sin(t / 2) ** 1.5, -np.cos(t)], 1)


def _leaf() -> Points:
    t = np.linspace(-1, 1, 30)
    side = 0.5 * (1 - t**2)
    edge = np.concatenate([np.stack([side, t], 1), np.stack([-side, t], 1)[-2:0:-1]])
    return rotate(edge, 35)


def _gear() -> Points:
    step = np.arange(32)
    return rotate(_polar(lambda angle: np.where(step % 4 < 2, 1.0, 0.74), 32), -6)


def _cloud() -> Points:
    t = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    puffs = [
        (-0.58, 0.14, 0.4), (-0.15, -0.2, 0.5), (0.35, -0.05, 0.42), (0.65, 0.22, 0.33),
        (0, 0.1, 0.52),
    ]  # fmt: skip
    ray = np.stack([np.cos(t), np.sin(t)], 1)
    reach = np.zeros_like(t)
    for x, y, radius in puffs:
        along = ray @ np.array([x, y])
        inside = along**2 - (x * x + y * y - radius**2)
        reach = np.maximum(reach, along + np.sqrt(np.maximum(inside, 0)) * (inside > 0))
    cloud = ray * np.maximum(reach, 0.2)[:, None]
    return np.minimum(cloud, [1.0, 0.52])


def _outline(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=float)


ARROW = _outline(
    (-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28)
)  # fmt: skip
BOLT = _outline((0.3, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25))
HOUSE = _outline(
    (0, -0.95), (0.95, -0.1), (0.68, -0.1), (0.68, 0.85),
    (-0.68, 0.85), (-0.68, -0.1), (-0.95, -0.1),
)  # fmt: skip
CROSS = _outline(
    (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95),
    (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
)  # fmt: skip
CIRCLE = _polar(lambda angle: np.full_like(angle, 0.92))

SHAPES: dict[str, Shape] = {
    "circle": Shape("circles", ("disc", "round"), CIRCLE, turns=False),
    "ring": Shape("rings", ("hoop", "round", "hollow"), CIRCLE, hole=0.58, turns=False),
    "square": Shape("squares", ("box", "corners"), 1.15 * rotate(_corners(4), 45)),
    "triangle": Shape("triangles", ("three", "corners"), _corners(3) + np.array([0, 0.15])),
    "diamond": Shape("diamonds", ("rhombus", "card"), _corners(4) * [0.72, 1]),
    "pentagon": Shape("pentagons", ("five", "corners"), _corners(5)),
    "hexagon": Shape("hexagons", ("six", "corners", "honeycomb"), _corners(6)),
    "star": Shape("stars", ("points", "sky", "night"), _corners(5, 0.42)),
    "spark": Shape("sparks", ("twinkle", "four", "points"), _corners(4, 0.3), roomy=False),
    "sun": Shape("suns", ("rays", "sky", "day"), _corners(12, 0.68), turns=False),
    "moon": Shape("moons", ("crescent", "sky", "night"), rotate(_crescent(), -20), roomy=False),
    "cloud": Shape("clouds", ("sky", "weather", "rain"), _cloud(), roomy=False),
    "bolt": Shape("bolts", ("lightning", "storm", "weather"), BOLT, roomy=False),
    "drop": Shape("drops", ("water", "rain", "weather"), _drop()),
    "leaf": Shape("leaves", ("plant", "tree", "nature"), _leaf(), roomy=False),
    "flower": Shape("flowers", ("plant", "petals", "nature"), _petals(5, 0.5), turns=False),
    "clover": Shape("clovers", ("plant", "luck", "nature"), _petals(3, 0.3), roomy=False),
    "heart": Shape("hearts", ("love", "card"), _heart()),
    "cross": Shape("crosses", ("plus", "help"), CROSS, roomy=False),
    "arrow": Shape("arrows", ("pointing", "direction", "right"), ARROW, roomy=False),
    "house": Shape("houses", ("home", "building", "roof"), HOUSE),
    "gear": Shape("gears", ("machine", "teeth", "wheel"), _gear(), turns=False),
}
