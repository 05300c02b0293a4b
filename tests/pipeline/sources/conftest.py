"""A web server with images, for the tests of sources."""

from collections.abc import Iterator

import pytest

from tests.pipeline import web_server
from tests.pipeline.sources.list_datasets import PICTURES


@pytest.fixture(scope="module")
def image_site() -> Iterator[str]:
    with web_server.serving(PICTURES) as address:
        yield address
