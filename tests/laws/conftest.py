"""Fixtures of the tests across stages: web servers with images."""

from collections.abc import Iterator

import pytest

from tests.laws.row_accounting import FILES
from tests.laws.sharding_runs import PICTURES
from tests.pipeline import web_server
from tests.pipeline.synthetic import encoded, noise


@pytest.fixture(scope="module")
def image_site() -> Iterator[str]:
    with web_server.serving(FILES) as address:
        yield address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with web_server.serving({f"{number}.jpg": encoded(noise(48, 40, number), "JPEG", quality=95)
                      for number in range(PICTURES)}) as started:
        yield started
