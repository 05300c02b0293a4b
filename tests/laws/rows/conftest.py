"""Fixtures of the tests of rows: a web server with images that fail in known ways."""

from collections.abc import Iterator

import pytest

from tests.laws.rows.row_accounting import FILES
from tests.pipeline import web_server


@pytest.fixture(scope="module")
def image_site() -> Iterator[str]:
    with web_server.serving(FILES) as address:
        yield address
