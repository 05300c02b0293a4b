import numpy as np
import pytest
from PIL import Image

from pipeline.media.contact_sheet import contact_sheet

RED, EMPTY, WHITE = (200, 0, 0), (238, 238, 238), (255, 255, 255)


def red(width: int = 32, height: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), RED)


def test_cells_are_row_by_row_and_a_missing_image_is_gray():
    sheet = contact_sheet([red(), None, red()], 2, cell=32, gap=6)
    assert sheet.mode == "RGB" and sheet.size == (6 + 32 + 6 + 32 + 6, 6 + 32 + 6 + 32 + 6)
    assert sheet.getpixel((6 + 16, 6 + 16)) == RED
    assert sheet.getpixel((44 + 16, 6 + 16)) == EMPTY
    assert sheet.getpixel((6 + 16, 44 + 16)) == RED
    assert sheet.getpixel((44 + 16, 44 + 16)) == WHITE  # the last row is not full


def test_images_are_fitted_undistorted_and_centered():
    pixels = np.asarray(contact_sheet([red(100, 50)], 1, cell=40, gap=5))
    y, x = np.nonzero((pixels == RED).all(2))
    assert (x.min(), x.max()) == (5, 44) and (y.min(), y.max()) == (15, 34)


def test_transparent_parts_of_a_cell_are_white():
    sheet = contact_sheet([Image.new("RGBA", (8, 8), (0, 0, 0, 0))], 1, cell=32)
    assert sheet.getextrema() == ((255, 255),) * 3


def test_text_is_outside_the_cells():
    long = "a very long caption about counterclockwise-arrows-button and nothing else at all"
    plain = contact_sheet([red()] * 6, 3, cell=48)
    sheet = contact_sheet(
        [red()] * 6,
        3,
        cell=48,
        labels=[long, "short", ""] * 2,
        row_labels=["upper", long],
        column_labels=["one", long, "unbreakable" * 9],
    )
    assert sheet.width > plain.width and sheet.height > plain.height
    is_red = (np.asarray(sheet) == RED).all(2)
    assert is_red.sum() == 6 * 48 * 48  # no text covers an image
    ink = np.nonzero(np.asarray(sheet.convert("L")) < 200)
    assert ink[0].min() > 0 and ink[1].min() > 0  # and no text leaves the sheet
    assert ink[0].max() < sheet.height - 1 and ink[1].max() < sheet.width - 1


@pytest.mark.timeout(60)
def test_a_long_word_is_cut():
    """The cut does not measure the remaining text letter by letter, which would be slow."""
    assert contact_sheet([red()], 1, row_labels=["x" * 100_000]).width < 300


def test_same_input_gives_same_pixels():
    first, second = (contact_sheet([red(), None], 2, labels=["a-b", "c d"]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"columns": 0},
        {"cell": 0},
        {"labels": ["one"]},
        {"row_labels": ["one", "two"]},
        {"column_labels": []},
    ],
)
def test_inconsistent_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"columns|labels"):
        contact_sheet([red(), red()], **{"columns": 2, **wrong})


def test_an_empty_sheet_is_white():
    assert contact_sheet([], 3).getextrema() == ((255, 255),) * 3


def test_each_line_of_a_label_is_cut_and_none_is_hidden():
    def ink_below(*lines: str) -> list[bool]:
        pixels = np.asarray(contact_sheet([red()], 1, cell=96, labels=[lines], label_lines=3, text_size=12))
        dark = (pixels[96 + 9:].min(2) < 200).any(1)
        return [bool(dark[15 * number:15 * number + 15].any()) for number in range(3)]
    assert ink_below("long " * 99, "Ann", "MIT") == [True, True, True]
    assert ink_below("long " * 99, "", "MIT") == [True, False, True]
