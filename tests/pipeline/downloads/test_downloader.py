"""The downloader: bodies, connections, TLS, X-Robots-Tag and cancellation."""

import asyncio
import socket
import ssl
import threading
import time

import pytest

from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.downloader import Downloader
from pipeline.media.types import BadImage
from tests.pipeline import web_server
from tests.pipeline.downloads.download_requests import FILES, config, get, reason, results, run

pytestmark = pytest.mark.usefixtures("no_warnings")


def test_bodies_arrive_unchanged(site):
    assert get(f"http://{site}/a.jpg") == FILES["a.jpg"]
    assert get(f"http://{site}/large.jpg") == FILES["large.jpg"]
    assert get(f"http://{site}/empty.jpg") == b"" == get(f"http://{site}/status/204")
    for path in ("chunked?file=large.jpg", "until-closed?file=large.jpg", "gzipped?file=large.jpg"):
        assert get(f"http://{site}/{path}") == FILES["large.jpg"], path
    assert get(f"http://{site}/chunked") == get(f"http://{site}/gzipped") == web_server.BODY
    assert get(f"http://{site}/gzipped?chunked&file=zeros.jpg") == FILES["zeros.jpg"]
    assert get(f"http://{site}/gzipped?until-closed&file=zeros.jpg") == FILES["zeros.jpg"]
    assert get(f"http://{site}/gzipped?close&file=zeros.jpg") == FILES["zeros.jpg"]
    assert get(f"http://{site}/type-lie?file=a.jpg") == FILES["a.jpg"]
    assert get(f"http://{site}/long?file=large.jpg") == FILES["large.jpg"]
    # If the body arrives together with the headers, aiohttp rejects the answer.
    assert results([f"http://{site}/long"])[0] in {web_server.BODY, "protocol: malformed answer (BadStatusLine)"}


def test_requests_have_only_the_configured_headers(site, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def twice() -> list[bytes]:
        async with Downloader(config(user_agent="me/1")) as downloader:
            return [await downloader.get(f"http://{site}/echo") for _ in range(2)]
    for head in asyncio.run(twice()):
        lines = head.decode().lower().split("\r\n")
        assert lines[0] == "get /echo http/1.1" and f"host: {site}" in lines
        assert "user-agent: me/1" in lines and "accept-encoding: identity" in lines
        assert not any(line.startswith(("cookie", "authorization", "proxy")) for line in lines)


def test_connections_are_used_again(site):
    web_server.seen(site)
    assert results([f"http://{site}/a.jpg"] * 600, connections=64) == [FILES["a.jpg"]] * 600
    seen = web_server.seen(site)
    assert seen["requests"] == 600 and seen["connections"] <= 64


@pytest.mark.parametrize("limits", [{"connections": 1}, {"connections_per_host": 1}])
def test_waiting_for_a_connection_is_no_timeout(site, limits):
    web_server.seen(site)
    assert results([f"http://{site}/slow-body?pause=0.03"] * 4, timeout=0.9, **limits) == [b"0123456789" * 10] * 4
    assert web_server.seen(site)["most_at_once"] == 1


def test_a_busy_host_delays_no_other_host(site, names):
    names.answers["other.test"] = [["127.0.0.1"]]
    port = site.rpartition(":")[2]

    async def times() -> list[float]:
        began = time.monotonic()

        async def seconds_for(url: str) -> float:
            await downloader.get(url)
            return time.monotonic() - began
        async with Downloader(config(connections=2, connections_per_host=1,
                                     allow_hosts=("127.0.0.1", "other.test"))) as downloader:
            return await asyncio.gather(*(seconds_for(f"http://{site}/slow-body?pause=0.05") for _ in range(3)),
                                        seconds_for(f"http://other.test:{port}/a.jpg"))
    *slow, quick = asyncio.run(times())
    assert quick < min(slow)


def test_idle_connections_to_many_hosts_do_not_pile_up(site, names):
    hosts = [f"h{number}.test" for number in range(60)]
    names.answers.update({host: [["127.0.0.1"]] for host in hosts})
    port = site.rpartition(":")[2]
    web_server.seen(site)
    open_sockets = []

    async def fetch_all() -> list[bytes]:
        async with Downloader(config(connections=4, allow_hosts=tuple(hosts))) as downloader:
            bodies = []
            for start in range(0, len(hosts), 20):
                bodies += await asyncio.gather(*(downloader.get(f"http://{host}:{port}/a.jpg")
                                                 for host in hosts[start:start + 20]))
                await asyncio.sleep(0.2)  # those that are being closed are not idle
                open_sockets.append(sum(each.fileno() >= 0 for each in list(downloader._sockets)))
            return bodies
    assert asyncio.run(fetch_all()) == [FILES["a.jpg"]] * 60
    assert len(open_sockets) == 3 and max(open_sockets) <= 2 * 4 + 4
    assert web_server.seen(site)["most_at_once"] > 4


@pytest.mark.parametrize(("tags", "agent", "kept"), [
    ([], "", True), (["all"], "", True), (["noarchive, nofollow"], "", True), (["noai"], "", False),
    (["NoAI"], "", False), (["nofollow,noimageai"], "", False), (["nofollow", "noindex"], "", False),
    (["otherbot: noai"], "", True), (["otherbot: noindex, noai"], "mybot", True), (["mybot: noai"], "", True),
    (["MyBot: noai"], "mybot", False), (["mybot: noai"], "MYBOT", False), (["mybot: nofollow, noai"], "mybot", False),
    (["otherbot: noai, mybot: nofollow"], "mybot", True), (["otherbot: nofollow, mybot: noai"], "mybot", False),
    (["otherbot: noai", "noindex"], "", False), (["max-snippet: 20, noai"], "", False),
    (["max-image-preview:large"], "", True), (["unavailable_after: 25 Jun 2030 15:00:00 PST"], "", True),
    (["unavailable_after: Tue, 25 Jun 2030 15:00:00 PST, noai"], "", False), ([" , ,:, noai "], "", False),
    (["noaix, xnoai"], "", True), (["otherbot:noai"], "", True),
    (["none"], "", False), (["otherbot: none"], "", True),
    (["*: noai"], "", False), (["otherbot: noai, *: noindex"], "", False),
])
def test_robots_directives_are_obeyed(site, tags, agent, kept):
    url = f"http://{site}/robots?" + "&".join(f"value={tag.replace(' ', '%20')}" for tag in tags)
    if kept:
        assert get(url, robots_agent=agent) == web_server.BODY
    else:
        assert reason(url, robots_agent=agent) == "robots"
    assert get(url, robots_agent=agent, robots=()) == web_server.BODY


def test_other_directives_may_be_chosen(site):
    assert reason(f"http://{site}/robots?value=NoArchive", robots=("noarchive",)) == "robots"
    assert get(f"http://{site}/robots?value=noai", robots=("noarchive",)) == web_server.BODY


def test_certificates_are_checked(site, certificate):
    with web_server.serving(FILES, certificate) as address:
        result = results([f"https://{address}/a.jpg"], retries=2)[0]
        assert result.startswith("tls: self") and "certificate" in result

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(web_server.answer(b"", status="400 Bad Request"))
        writer.close()

    async def both() -> None:
        server = await asyncio.start_server(plain, "127.0.0.1", 0)
        async with server, Downloader(config()) as downloader:
            with pytest.raises(BadImage) as caught:
                await downloader.get(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            assert caught.value.reason == "tls"
    asyncio.run(both())


def test_a_session_leaves_nothing_behind(site, certificate):
    """Each URL has a new event loop, with and without TLS; some answers stay partly unread. Warnings are errors."""
    script = """
        import asyncio, gc, sys
        from pipeline.downloads.config import DownloadConfig
        from pipeline.downloads.downloader import Downloader
        from pipeline.media.types import BadImage
        async def main(url):
            config = DownloadConfig(allow_hosts=("127.0.0.1",), max_bytes=4_000_000, retries=0, read_timeout=0.5)
            async with Downloader(config) as downloader:
                try:
                    print(len(await downloader.get(url)))
                except BadImage as bad:
                    print(bad.reason)
        for address in sys.argv[1:]:
            for path in ("a.jpg", "missing.jpg", "large.jpg", "forever", "hang", "cut", "hops/3", "chunked?file=a.jpg"):
                asyncio.run(main(f"{address}/{path}"))
                gc.collect()"""
    expected = [str(len(FILES["a.jpg"])), "http_404", "too_large", "too_large", "timeout", "cut",
                str(len(web_server.BODY)), str(len(FILES["a.jpg"]))]
    with web_server.serving(FILES, certificate) as address:
        assert run(script, f"http://{site}", f"https://{address}",
                   SSL_CERT_FILE=str(certificate)).split() == expected * 2


def test_a_server_that_does_not_close_tls_is_abandoned(certificate):
    """It takes the request over TLS, and then neither reads nor writes nor closes."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def hold() -> None:
            held.append(context.wrap_socket(server.accept()[0], server_side=True))
        thread = threading.Thread(target=hold)
        thread.start()
        began = time.monotonic()
        assert run("""
            import asyncio, sys
            from pipeline.downloads.config import DownloadConfig
            from pipeline.downloads.downloader import Downloader
            async def main():
                async with Downloader(DownloadConfig(allow_hosts=("127.0.0.1",), retries=0, timeout=0.5)) as downloader:
                    try:
                        await downloader.get(sys.argv[1])
                    except Exception as error:
                        print(error)
            asyncio.run(main())""", f"https://127.0.0.1:{server.getsockname()[1]}/",
                   SSL_CERT_FILE=str(certificate)) == "timeout: not done within 0.5 s\n"
        assert time.monotonic() - began < 10
        thread.join()
        held[0].close()


def test_one_downloader_may_serve_several_loops(site):
    downloader = Downloader(config())

    async def once() -> bytes:
        async with downloader:
            return await downloader.get(f"http://{site}/a.jpg")
    assert asyncio.run(once()) == asyncio.run(once()) == FILES["a.jpg"]


@pytest.mark.slow
def test_a_cancelled_download_stops(site):
    async def stopped() -> None:
        async with Downloader(config(connections=1, retries=2, max_bytes=1 << 50)) as downloader:
            for path in ("/hang", "/forever", "/slow-body?pause=1", "/busy?after=9&n=9"):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(downloader.get(f"http://{site}{path}"), 0.1)
            assert await downloader.get(f"http://{site}/a.jpg") == FILES["a.jpg"]
    asyncio.run(stopped())


@pytest.mark.parametrize(("options", "message"), [
    ({"retries": -1}, "shard.download.retries = -1: must be at least 0"),
    ({"connections": 0}, "shard.download.connections = 0: must be at least 1"),
    ({"connections_per_host": -1}, "shard.download.connections_per_host = -1: must be at least 0"),
    ({"max_bytes": 0}, "shard.download.max_bytes = 0: must be at least 1"),
    ({"timeout": 0.0}, "shard.download.timeout = 0.0: must be above 0 and below inf"),
    ({"read_timeout": float("nan")}, "shard.download.read_timeout = nan: must be above 0 and below inf"),
    ({"connect_timeout": float("inf")}, "shard.download.connect_timeout = inf"),
    ({"user_agent": "a\r\nCookie: b"}, "shard.download.user_agent = .*: must be printable ASCII"),
    ({"robots_agent": "two words"}, "shard.download.robots_agent = 'two words': must be one word"),
    *(({"allow_hosts": (host,)}, "shard.download.allow_hosts = .*: must be a host or host:port")
      for host in ("", "http://a", "a/b", "a b", "a:b", "a:99999", "user@a", "[::1", "a?b")),
])
def test_senseless_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DownloadConfig(**options)
