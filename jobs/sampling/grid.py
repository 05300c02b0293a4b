"""The grid of a sampling run: a cell for each query and database, which workers make and the driver arranges."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from pipeline.media import tars

SHOWN_NEIGHBORS = 4
_GAP = 4
"""Pixels between an image and its neighbors."""
_LEAST = 128
"""The least pixels of a side of an image on the grid."""


def grid_cell(image: Image.Image, neighbors: Sequence[Image.Image]) -> Image.Image:
    """An image, enlarged at least twice and to at least 128 pixels, and a column of its first neighbors beside it."""
    size = image.width * max(2, -(-_LEAST // image.width))
    small = size // SHOWN_NEIGHBORS
    cell = Image.new("RGB", (size + _GAP + small, size), "white")
    cell.paste(image.resize((size, size), Image.Resampling.LANCZOS), (0, 0))
    for rank, neighbor in enumerate(neighbors[:SHOWN_NEIGHBORS]):
        fitted = ImageOps.pad(neighbor, (small, small), Image.Resampling.LANCZOS, "white")
        cell.paste(fitted, (size + _GAP, rank * small))
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
