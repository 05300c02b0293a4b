"""Fixtures of the tests on Ray: pools of workers, and stages that a test defines."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from jobs.cluster.config import ClusterConfig

if TYPE_CHECKING:
    from jobs.cluster.actor_pool import Pool


@pytest.fixture
def pickle_by_value(request: pytest.FixtureRequest) -> None:
    """Send the classes of the test by value, because workers cannot import a test."""
    from ray import cloudpickle
    cloudpickle.register_pickle_by_value(request.module)


@pytest.fixture
def start_pool(pickle_by_value: None) -> Iterator[Callable[..., "Pool"]]:
    """A function that starts a pool of `workers` workers with `gpus` GPUs each. Each pool is closed after the test."""
    from jobs.cluster.actor_pool import Pool
    pools: list[Pool] = []

    def start(workers: int, gpus: float = 0.0) -> Pool:
        pools.append(Pool(ClusterConfig(workers=workers, gpus=gpus)))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()
