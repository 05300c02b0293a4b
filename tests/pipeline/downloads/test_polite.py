"""Downloads keep the limits of hosts, wait for hosts that refuse, and lose no row by that."""

import asyncio
import time
from collections import Counter

import pytest

from pipeline.downloads import host_limits
from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.urls import parse_host_rates
from tests.pipeline.downloads.download_requests import results
from tests.pipeline.downloads.strict_server import StrictServer, jpeg, running

HOSTS = ("127.0.0.1", "127.0.0.2")


def fetched(server: StrictServer, urls: list[str], **options) -> tuple[list[bytes | str], float]:
    began = time.monotonic()
    outcome = results(urls, **{"allow_hosts": HOSTS, "retries": 2, "timeout": 20.0, "read_timeout": 10.0} | options)
    return outcome, time.monotonic() - began


def reasons(outcome: list[bytes | str]) -> Counter[str]:
    return Counter("image" if isinstance(result, bytes) else result.partition(":")[0] for result in outcome)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_limits, "_PAUSES_S", (0.2, 0.4, 0.8, 1.6))


def test_a_limit_is_kept_and_other_hosts_are_not_slowed():
    with running(StrictServer({HOSTS[0]: 20, HOSTS[1]: 0})) as server:
        urls = [url for pair in zip(server.urls(HOSTS[0], 45), server.urls(HOSTS[1], 45), strict=True) for url in pair]
        outcome, seconds = fetched(server, urls, host_rate=(f"{HOSTS[0]}=17",), connections=8)
    assert outcome[::2] == outcome[1::2] == [jpeg(number) for number in range(45)]
    assert not server.refused and 2.0 < seconds < 6
    first, second = (server.times[host] for host in HOSTS)
    assert first[-1] - first[0] > 2.0 and second[-1] - second[0] < 1.0


@pytest.mark.parametrize(("status", "retry_after"), [
    ("403 Forbidden", ""), ("429 Too Many Requests", ""), ("429 Too Many Requests", "1"),
    ("503 Service Unavailable", "1")])
def test_downloads_wait_for_a_host_that_bans_and_lose_no_row(short_pauses, status, retry_after):
    """No limit is configured: the client learns the rate from the refusals."""
    server = StrictServer({HOSTS[0]: 20, HOSTS[1]: 0}, ban_s=0.8, status=status, retry_after=retry_after)
    with running(server):
        outcome, _ = fetched(server, server.urls(HOSTS[0], 60) + server.urls(HOSTS[1], 60), connections=16)
    assert reasons(outcome) == {"image": 120}
    # The requests in flight at the ban, and few after that.
    assert 0 < server.refused[HOSTS[0]] < 60
    others = server.times[HOSTS[1]]
    assert others[-1] - others[0] < 1.5


def test_single_urls_that_are_forbidden_pause_a_host_once(short_pauses):
    """A bucket answers 403 for missing keys."""
    with running(StrictServer({HOSTS[0]: 0})) as server:
        urls = server.urls(HOSTS[0], 300)
        urls[::10] = server.urls(HOSTS[0], 30, "forbidden")
        outcome, seconds = fetched(server, urls, connections=8)
        assert reasons(outcome) == {"image": 270, "http_403": 30}
        assert [result == "http_403: Forbidden" for result in outcome] == [number % 10 == 0 for number in range(300)]
    assert seconds < 8 and server.requests[HOSTS[0]] < 345


def test_few_urls_half_of_them_forbidden_end_with_their_status(short_pauses):
    """All requests are sent before the first answer, so no new request can tell a ban from single URLs."""
    with running(StrictServer({HOSTS[0]: 0})) as server:
        urls = server.urls(HOSTS[0], 12)
        urls[::2] = server.urls(HOSTS[0], 6, "forbidden")
        outcome, seconds = fetched(server, urls)
    assert [result == "http_403: Forbidden" for result in outcome] == [True, False] * 6
    assert seconds < 15


def test_a_host_that_forbids_everything_costs_little(short_pauses):
    with running(StrictServer({HOSTS[0]: 0})) as server:
        outcome, seconds = fetched(server, server.urls(HOSTS[0], 100, "forbidden"))
    assert reasons(outcome) == {"http_403": 100} and seconds < 5


def test_a_single_refused_url_ends_with_its_status(short_pauses):
    with running(StrictServer({HOSTS[0]: 0})) as server:
        urls = server.urls(HOSTS[0], 40) + server.urls(HOSTS[0], 1, "busy")
        assert reasons(fetched(server, urls, connections=4)[0]) == {"image": 40, "http_429": 1}


def test_a_host_that_keeps_refusing_is_abandoned_and_others_are_not(short_pauses):
    with running(StrictServer({HOSTS[0]: 5, HOSTS[1]: 0}, ban_s=1000)) as server:
        outcome, seconds = fetched(server, server.urls(HOSTS[0], 200) + server.urls(HOSTS[1], 200), connections=8,
                                 host_patience=1.0)
    counts = reasons(outcome)
    assert counts["image"] == 205 and counts["host_banned"] > 180 and seconds < 10
    assert set(counts) <= {"image", "host_banned", "http_403"}
    assert server.refused[HOSTS[0]] < 30  # no request for every URL


def test_a_too_long_retry_after_ends_requests_to_the_host():
    with running(StrictServer({HOSTS[0]: 5}, ban_s=1000, status="429 Slow", retry_after="3600")) as server:
        outcome, seconds = fetched(server, server.urls(HOSTS[0], 50), connections=1)
    assert outcome[5] == "http_429: Too Many Requests; the host asks to wait 3600 s"
    assert reasons(outcome) == {"image": 5, "http_429": 1, "host_banned": 44} and seconds < 3
    assert outcome[-1] == "host_banned: the host answers 429, and gets the next request in 3600 s"
    assert server.requests[HOSTS[0]] == 6


def test_connections_to_a_host_have_a_limit():
    with running(StrictServer({HOSTS[0]: 0}, answer_s=0.05)) as server:
        outcome, _ = fetched(server, server.urls(HOSTS[0], 40), host_connections=3)
    assert reasons(outcome) == {"image": 40} and server.most_at_once[HOSTS[0]] == 3


def test_robots_txt_is_obeyed_if_configured():
    rules = "User-agent: otherbot\nDisallow: /\n\nUser-agent: *\nDisallow: /*1$\nCrawl-delay: 0.1\n"
    with running(StrictServer(dict.fromkeys(HOSTS, 0), robots={HOSTS[0]: rules})) as server:
        urls = server.urls(HOSTS[0], 20) + server.urls(HOSTS[1], 20)
        assert reasons(fetched(server, urls)[0]) == {"image": 40}
        assert server.requests.total() == 40
        outcome, seconds = fetched(server, urls, robots_txt=True)
        assert reasons(outcome) == {"image": 38, "robots": 2} and seconds > 1.5
        excluded = {number for number, result in enumerate(outcome) if result == "robots: robots.txt excludes it"}
        assert excluded == {1, 11}
        assert server.requests.total() == 40 + 38 + 2  # each robots.txt once
        assert reasons(fetched(server, urls, robots_txt=True, robots_agent="otherbot")[0]) == {
            "image": 20, "robots": 20}


def test_a_robots_txt_without_an_answer_is_no_permission():
    with running(StrictServer({HOSTS[0]: 0})) as server:
        url = f"http://{HOSTS[1]}:{server.port}/image/1"  # a closed port
        assert fetched(server, [url], robots_txt=True, retries=0)[0] == [
            "connect: robots.txt: Connection refused"]


@pytest.mark.parametrize(("agent", "contact", "header"), [
    (None, "me@example.org", "Mozilla/5.0 (compatible; retrieval-diffusion/0.1; me@example.org)"),
    (None, "https://example.org/bot", "Mozilla/5.0 (compatible; retrieval-diffusion/0.1; +https://example.org/bot)"),
    ("mybot/1", "me@example.org", "mybot/1 (me@example.org)"), ("mybot/1", "", "mybot/1")])
def test_the_user_agent_names_a_contact(agent, contact, header):
    options = {"contact": contact} | ({"user_agent": agent} if agent else {})
    with running(StrictServer({HOSTS[0]: 0})) as server:
        fetched(server, server.urls(HOSTS[0], 1), **options)
    assert server.agents == {f"User-Agent: {header}"}


@pytest.mark.parametrize(("options", "message"), [
    *(({"host_rate": (entry,)}, "shard.download.host_rate = .*: must be a number above 0, or HOST=NUMBER")
      for entry in ("0", "-1", "many", "a.example=", "a/b=2", "nan", "inf", "")),
    ({"host_connections": -1}, "shard.download.host_connections = -1: must be at least 0"),
    ({"contact": "a)\r\n"}, "shard.download.contact = .*: must be printable ASCII")])
def test_senseless_limits_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DownloadConfig(**options)


def test_an_error_of_the_limits_ends_downloads_and_does_not_hang():
    from pipeline.downloads.downloader import Downloader

    class Broken(host_limits.ProcessLimits):
        async def exchange(self, reports, wants):
            raise RuntimeError("lost")

    async def both() -> None:
        async with Downloader(DownloadConfig(host_rate=("1",)), Broken()) as downloader:
            for _ in range(2):
                with pytest.raises(RuntimeError, match="lost"):
                    await asyncio.wait_for(downloader.get("http://example.invalid/"), 5)
    asyncio.run(both())


def test_the_rate_of_a_host_is_kept():
    assert parse_host_rates(("*.example.org=5", "10", "Images.example.org=2")) == [
        ("images.example.org", 2.0), ("*.example.org", 5.0), ("*", 10.0)]
    with pytest.raises(ValueError, match=r"expected a host without a port, .*\nhint: --host-rate example.org=2"):
        parse_host_rates(("example.org:8080=2",))
