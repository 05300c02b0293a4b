"""Fixtures of the tests of faults: a web server with images."""

from collections.abc import Iterator

import pytest

from tests.laws.faults.sharding_runs import PICTURES
from tests.pipeline import web_server
from tests.pipeline.synthetic import encoded, noise


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with web_server.serving({f"{number}.jpg": encoded(noise(48, 40, number), "JPEG", quality=95)
                             for number in range(PICTURES)}) as site_address:
        yield site_address
