"""Cells are stored without the credentials of the URLs in them."""

import pytest

from pipeline.rows.rows import redact_cells


@pytest.mark.parametrize("text", [
    "http://user:pw@host/x.png", "http:/user:pw@host/x.png", r"http:\user:pw@host\x.png", "//user:pw@host/x.png",
    r"http:\\user:pw@host\x.png", "from http://user:pw@host/x.png, cropped", r"from http:\user:pw@host\x.png"])
def test_a_cell_with_a_url_of_any_form_keeps_no_password(text: str) -> None:
    stored = redact_cells({"source_url": text})["source_url"]
    assert "pw" not in stored and "***@host" in stored


def test_other_cells_stay() -> None:
    cells = {"path": r"C:\pictures\a.png", "ratio": "3:/4", "number": 7, "none": None}
    assert redact_cells(cells) == cells
