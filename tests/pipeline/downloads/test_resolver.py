"""Name lookup: shared, retried, and bounded in time."""

import asyncio
import socket
import threading
import time

import pytest

from pipeline.downloads.downloader import Downloader
from pipeline.media.types import BadImage
from tests.pipeline.downloads.download_requests import FILES, config, get, reason, results

pytestmark = pytest.mark.usefixtures("no_warnings")


def test_missing_names_are_looked_up_once(names):
    for error in (socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL):
        names.answers[f"e{-error}.test"] = [error]
        assert results([f"http://e{-error}.test/"] * 20, retries=2) == ["dns: no such name"] * 20
        assert names.lookups[f"e{-error}.test"] == 1


def test_silent_name_servers_are_retried_and_then_fail(site, names):
    port = site.rpartition(":")[2]
    names.answers["shaky.test"] = [socket.EAI_AGAIN, socket.EAI_AGAIN, ["127.0.0.1"]]
    assert get(f"http://shaky.test:{port}/a.jpg", retries=2, allow_hosts=("shaky.test",)) == FILES["a.jpg"]
    names.answers["dead.test"] = [socket.EAI_AGAIN]

    async def one_after_the_other() -> None:
        async with Downloader(config(retries=2)) as downloader:
            for _ in range(5):
                with pytest.raises(BadImage, match="dns: no answer"):
                    await downloader.get("http://dead.test/")
    asyncio.run(one_after_the_other())
    assert names.lookups["dead.test"] == 3


def test_parallel_requests_share_one_lookup(site, names):
    port = site.rpartition(":")[2]

    def slowly() -> list[str]:
        time.sleep(0.2)
        return ["127.0.0.1"]
    names.answers["mine.test"] = [slowly]
    assert results([f"http://mine.test:{port}/a.jpg"] * 20, allow_hosts=("mine.test",)) == [FILES["a.jpg"]] * 20
    assert names.lookups["mine.test"] == 1


def test_a_cancelled_lookup_does_not_cancel_others(names):
    def slowly() -> int:
        time.sleep(0.3)
        return socket.EAI_NONAME
    names.answers["slow.test"] = [slowly]

    async def two() -> None:
        async with Downloader(config()) as downloader:
            first, second = (asyncio.create_task(downloader.get("http://slow.test/")) for _ in range(2))
            await asyncio.sleep(0.1)
            first.cancel()
            with pytest.raises(BadImage, match="dns: no such name"):
                await second
            assert first.cancelled() and names.lookups["slow.test"] == 1
    asyncio.run(two())


def test_slow_names_delay_neither_each_other_nor_the_end(names):
    def slowly() -> int:
        time.sleep(0.4)
        return socket.EAI_NONAME
    hosts = [f"slow{number}.test" for number in range(60)]
    names.answers.update({host: [slowly] for host in hosts})
    began = time.monotonic()
    assert results([f"http://{host}/" for host in hosts]) == ["dns: no such name"] * 60
    assert time.monotonic() - began < 3
    woken = threading.Event()
    names.answers["stuck.test"] = [lambda: woken.wait(20) and socket.EAI_NONAME]
    began = time.monotonic()
    assert reason("http://stuck.test/", timeout=0.3) == "timeout"
    assert time.monotonic() - began < 2
    woken.set()
