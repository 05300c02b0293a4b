"""The grid of a sampling run: a cell for each query and database, which workers make and the driver arranges."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from pipeline.media import tars

SHOWN_NEIGHBORS = 4
_GAP = 4
"""Pixels between an image and its neighbors."""


def grid_cell(image: Image.Image, neighbors: Sequence[Image.Image]) -> Image.Image:
    """An image at twice its size, and a column of its first neighbors at half size."""
    size = image.width
    cell = Image.new("RGB", (2 * size + _GAP + size // 2, 2 * size), "white")
    cell.paste(image.resize((2 * size, 2 * size), Image.Resampling.LANCZOS), (0, 0))
    for rank, neighbor in enumerate(neighbors[:SHOWN_NEIGHBORS]):
        small = neighbor.resize((size // 2, size // 2), Image.Resampling.LANCZOS)
        cell.paste(small, (2 * size + _GAP, rank * size // 2))
    return cell


def write_cells(path: Path, cells: Sequence[Image.Image]) -> None:
    """Write the cells of one item as a tar of PNG files, in the order of the queries."""
    tars.write(path, ({"__key__": f"{number:06d}", "png": _png(cell)} for number, cell in enumerate(cells)))


def read_cells(path: Path) -> Iterator[Image.Image]:
    """The cells that `write_cells` wrote, in their order."""
    for sample in tars.read(path):
        yield Image.open(io.BytesIO(sample["png"])).convert("RGB")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
