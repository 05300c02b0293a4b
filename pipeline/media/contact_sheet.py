"""Many small images on one sheet of white, with headings and captions, for reports."""

import re
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

INK = (34, 34, 34)
QUIET = (110, 110, 110)
EMPTY = (238, 238, 238)
LINE_SPACING = 1.25


def contact_sheet(images: Sequence[Image.Image | None], columns: int, *,
                  labels: Sequence[str | Sequence[str]] | None = None, row_labels: Sequence[str] | None = None,
                  column_labels: Sequence[str] | None = None, cell: int = 64, gap: int = 6,
                  text_size: int | None = None, label_lines: int = 2) -> Image.Image:
    """A sheet of the images, row by row, each fitted undistorted into a square cell.

    None leaves a light gray cell. `labels` stand below the cells, at most `label_lines` lines
    each. A label that is a sequence has one line for each member. `row_labels` stand at the left,
    `column_labels` on top. Text that does not fit ends in an ellipsis. Lengths are in pixels;
    `text_size` follows the cell if not given. RGB.

    Raises:
        ValueError: labels do not match the cells, rows or columns, or a length is too small.
    """
    if columns < 1 or cell < 1 or gap < 0 or label_lines < 1:
        raise ValueError(f"columns={columns}, cell={cell} and label_lines={label_lines} must be at least 1, "
                         f"gap={gap} at least 0")
    rows = -(-len(images) // columns)
    _same_length("labels", labels, "pictures", len(images))
    _same_length("row_labels", row_labels, "rows", rows)
    _same_length("column_labels", column_labels, "columns", columns)

    font = _font(text_size or max(10, min(20, round(cell * 0.17))))
    cell_texts = [_wrap(label, font, cell, label_lines) if isinstance(label, str) else
                  [_cut(line, font, cell) for line in label[:label_lines]] for label in labels or ()]
    column_texts = [_wrap(label, font, cell, 3) for label in column_labels or ()]
    row_texts = [_wrap(label, font, round(cell * 1.6), 3) for label in row_labels or ()]

    margin = max(gap, 4)
    grid_x = margin + _widest(row_texts, font) + (gap + 2 if row_texts else 0)
    grid_y = margin + _tallest(column_texts, font) + (gap if column_texts else 0)
    caption = _tallest(cell_texts, font) + (3 if cell_texts else 0)
    width = grid_x + columns * (cell + gap) - gap + margin
    height = grid_y + rows * (cell + caption + gap) - gap + margin
    sheet = Image.new("RGB", (width, max(height, grid_y + margin)), "white")
    pen = ImageDraw.Draw(sheet)

    for column, lines in enumerate(column_texts):
        x = grid_x + column * (cell + gap) + cell / 2
        # Headings stand on the images, so short ones do not float above long ones.
        _write(pen, lines, font, x, grid_y - gap - _tallest([lines], font), INK, "m")
    for row, lines in enumerate(row_texts):
        y = grid_y + row * (cell + caption + gap) + (cell - _tallest([lines], font)) / 2
        _write(pen, lines, font, grid_x - gap - 2, y, INK, "r")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x, y = grid_x + column * (cell + gap), grid_y + row * (cell + caption + gap)
        _place(sheet, pen, image, x, y, cell)
        if cell_texts:
            _write(pen, cell_texts[number], font, x + cell / 2, y + cell + 3, QUIET, "m")
    return sheet


def _same_length(name: str, labels: Sequence[object] | None, what: str, count: int) -> None:
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} {name} do not match {count} {what}")


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # another one only if Pillow was built without FreeType
    return font


def _place(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    image: Image.Image | None,
    x: int,
    y: int,
    cell: int,
) -> None:
    if image is None:
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=EMPTY)
        return
    scale = cell / max(image.size)
    fitted = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # Modes with a palette or alpha cannot be resampled as they are; white shows through.
    pixels = image.convert("RGBA")
    if fitted != image.size:
        pixels = pixels.resize(fitted, Image.Resampling.LANCZOS)
    sheet.paste(pixels, (x + (cell - fitted[0]) // 2, y + (cell - fitted[1]) // 2), pixels)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The text in at most `most` lines no wider than `width`, the last cut short if need be."""
    lines: list[str] = []
    for blank, word in re.findall(r"(\s*)([^\s-]+-?|-)", text):
        # Lines may break after a hyphen too; its parts are joined without a blank.
        longer = lines[-1] + " " * bool(blank) + word if lines else ""
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line[:width]  # a letter takes a pixel at least
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip(" -,") + "…"


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * LINE_SPACING)


def _widest(texts: list[list[str]], font: ImageFont.FreeTypeFont) -> int:
    return max((-int(-font.getlength(line) // 1) for lines in texts for line in lines), default=0)


def _tallest(texts: list[list[str]], font: ImageFont.FreeTypeFont) -> int:
    return max((len(lines) for lines in texts), default=0) * _line_height(font)


def _write(
    pen: ImageDraw.ImageDraw,
    lines: list[str],
    font: ImageFont.FreeTypeFont,
    x: float,
    y: float,
    ink: tuple[int, int, int],
    side: str,
) -> None:
    """Lines downwards from y; x is their middle (`side` m) or their right end (r)."""
    for number, line in enumerate(lines):
        middle = y + (number + 0.5) * _line_height(font)
        pen.text((x, middle), line, fill=ink, font=font, anchor=f"{side}m")
