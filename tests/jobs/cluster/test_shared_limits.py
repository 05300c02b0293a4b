"""All workers of a cluster keep one limit for each host, through an actor or by their shares."""

import asyncio
import collections
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cluster.config import ClusterConfig
from pipeline.datasets.dataset import Dataset
from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.host_limits import Report, Want
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages.driver import run_stage
from tests.pipeline.downloads.strict_server import StrictServer, running

pytestmark = pytest.mark.ray
STRICT, FREE = "127.0.0.1", "127.0.0.2"


@pytest.fixture
def pool(cluster: Any) -> Iterator[Any]:
    from jobs.cluster.actor_pool import Pool
    pool = Pool(ClusterConfig(workers=4))
    yield pool
    pool.close()


def shard(server: StrictServer, folder: Path, pool: Any, strict: int, free: int, **download: Any) -> dict[str, Any]:
    """Shard a list in which a row of the strict host comes before each few rows of the other, with 4 workers."""
    every = free // strict
    urls = []
    for number, url in enumerate(server.urls(STRICT, strict)):
        urls += [url, *server.urls(FREE, free)[number * every:(number + 1) * every]]
    pq.write_table(pa.table({"url": urls, "caption": [f"number {row}" for row in range(len(urls))]}),
                   folder / "list.parquet")
    config = ShardConfig(source=str(folder / "list.parquet"), image_size=32, samples_per_shard=-(-len(urls) // 8),
                         download=DownloadConfig(allow_hosts=(STRICT, FREE), **download))
    return run_stage(Shard(Dataset.parse(str(folder / "root"), "web"), config), pool)


def most_in_a_second(times: list[float]) -> int:
    recent: collections.deque[float] = collections.deque()
    most = 0
    for moment in sorted(times):
        recent.append(moment)
        while recent[0] < moment - 1:
            recent.popleft()
        most = max(most, len(recent))
    return most


@pytest.mark.parametrize(("limit", "rate", "strict", "free"), [
    pytest.param(50, 30, 160, 800, marks=pytest.mark.slow), pytest.param(20, 14, 2000, 2000, marks=pytest.mark.slow)])
def test_a_limit_holds_for_all_workers_and_another_host_is_served_at_full_speed(
        pool: Any, tmp_path: Path, limit: int, rate: int, strict: int, free: int) -> None:
    """The strict host answers 403 for 5 seconds to clients that send more than `limit` requests in a second."""
    with running(StrictServer({STRICT: limit, FREE: 0}, ban_s=5)) as server:
        manifest = shard(server, tmp_path, pool, strict, free, host_rate=(f"{STRICT}={rate}",), connections=16)
    assert manifest["totals"]["samples"] == strict + free and not manifest["totals"]["skipped"]
    assert not server.refused and server.requests == {STRICT: strict, FREE: free}
    times, others = server.times[STRICT], server.times[FREE]
    assert most_in_a_second(times) <= limit
    # The limit is used, and rows of the other host do not wait for it: each item has one eighth of them.
    assert strict / (times[-1] - times[0]) > 0.4 * rate
    assert most_in_a_second(others) > 2 * limit


@pytest.mark.slow
def test_workers_find_the_limit_of_a_host_that_bans_them(pool: Any, tmp_path: Path) -> None:
    with running(StrictServer({STRICT: 30, FREE: 0}, ban_s=2)) as server:
        manifest = shard(server, tmp_path, pool, 120, 120, connections=16)
    assert manifest["totals"]["samples"] == 240 and not manifest["totals"]["skipped"]
    # At first all that were under way, then few: one worker asks whether the ban is over.
    assert 0 < server.refused[STRICT] < 120


def test_a_pause_holds_for_all_clients(cluster: Any) -> None:
    from jobs.cluster import connect, shared_limits
    connect.connect()

    async def both() -> None:
        first, second = shared_limits.SharedLimits(4), shared_limits.SharedLimits(4)
        second._client = "another"
        await second.exchange([], {})
        await first.exchange([Report("host.example", "refused", 0, status=429, retry_after=30.0)], {})
        now = time.monotonic()
        answer = await second.exchange([], {"host.example": Want(5, 0.0), "other.example": Want(5, 10.0)})
        state = answer.states["host.example"]
        assert state == second.known("host.example") and state.status == 429 and 28 < state.until - now < 31
        assert answer.slots.keys() == {"other.example"} and answer.slots["other.example"].interval == 0.1
    asyncio.run(both())


def test_a_late_answer_does_not_shift_the_clock() -> None:
    from jobs.cluster.shared_limits import _Clock
    clock = _Clock()
    assert clock.shift("a", 10.0, 110.5) == 100.5
    assert clock.shift("a", 11.0, 111.1) == pytest.approx(100.1)
    assert clock.shift("a", 12.0, 115.0) == pytest.approx(100.1, abs=1e-3)  # not 103
    assert clock.shift("another life of the actor", 1.0, 116.0) == 115.0


def test_workers_keep_their_shares_without_the_actor_and_reconnect(
        cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import ray

    from jobs.cluster import connect, shared_limits
    connect.connect()
    monkeypatch.setattr(shared_limits, "_RETRY_S", 0.5)
    actor = shared_limits.find_actor()

    async def lose_it() -> None:
        limits = shared_limits.SharedLimits(4)
        await limits.exchange([Report("paused.example", "refused", 0, status=403, retry_after=60.0)], {})
        # The actor starts again with nothing known, which must not lift the pause as long as the worker is alone.
        os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
        wants = {"paused.example": Want(5, 10.0), "open.example": Want(5, 10.0)}
        while limits._own is None:
            answer = await limits.exchange([], wants)
        assert answer.slots.keys() == {"open.example"} and answer.slots["open.example"].interval == 0.4
        assert "its share, 1/4 of each limit" in caplog.text
        deadline = time.monotonic() + 60
        while limits._own is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            answer = await limits.exchange([], {"new.example": Want(5, 10.0)})
        assert limits._own is None and limits.alone_s > 0
        assert answer.slots["new.example"].interval == 0.1
    caplog.set_level("INFO")
    asyncio.run(lose_it())
    assert "answers again" in caplog.text


@pytest.mark.slow
def test_a_run_survives_the_loss_of_the_actor(pool: Any, tmp_path: Path) -> None:
    import ray

    from jobs.cluster import shared_limits
    killed: Counter[str] = Counter()
    with running(StrictServer({STRICT: 50, FREE: 0}, ban_s=2)) as server:
        def kill() -> None:
            while len(server.times[STRICT]) < 40:
                time.sleep(0.05)
            os.kill(ray.get(shared_limits.find_actor().pid.remote()), signal.SIGKILL)
            killed["actor"] += 1
        thread = threading.Thread(target=kill)
        thread.start()
        manifest = shard(server, tmp_path, pool, 200, 200, host_rate=(f"{STRICT}=30",), connections=16)
        thread.join()
    assert killed and manifest["totals"]["samples"] == 400 and not manifest["totals"]["skipped"]
    assert not server.refused  # shares are no more than the limit
