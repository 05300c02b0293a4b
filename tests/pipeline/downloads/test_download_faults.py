"""Downloads that fail: each has a named reason, a time limit and a size limit."""

import asyncio
import datetime
import email.utils
import gc
import random
import socket
import time
import tracemalloc
from collections import Counter
from urllib.parse import quote_from_bytes

import pytest

from pipeline.downloads import http_text
from pipeline.downloads.downloader import Downloader
from pipeline.media.types import BadImage
from tests.pipeline import web_server
from tests.pipeline.downloads.download_requests import FILES, config, get, reason, results

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.mark.parametrize(("path", "expected"), [
    ("/cut", "cut"), ("/chunked?cut&file=a.jpg", "cut"), ("/reset?after=500", "cut"), ("/garbage", "protocol"),
    ("/headers", "protocol"), ("/headers?one", "protocol"), ("/gzipped?as=br", "protocol"),
    ("/gzipped?as=deflate", "protocol"), ("/reset", "connect"), ("/raw", "connect"), ("/missing.jpg", "http_404"),
    ("/status/403", "http_403"), ("/status/404", "http_404"), ("/status/500", "http_500"), ("/status/299", "http_299"),
    ("/status/304", "http_304"), ("/status/302", "http_302"), ("/status/799", "http_799"), ("/status/206", "http_206"),
    ("/raw?HTTP/1.1 200 OK%0d%0aTransfer-Encoding: chunked%0d%0a%0d%0a5%0d%0aabcdefghij", "protocol"),
    ("/raw?HTTP/1.1 200 OK%0d%0aTransfer-Encoding: chunked%0d%0a%0d%0azz%0d%0aabcdefghij", "protocol"),
    ("/raw/open?HTTP/1.1 200 OK%0d%0aTransfer-Encoding: chunked%0d%0a%0d%0azz%0d%0aabcdefghij", "protocol"),
    ("/raw?HTTP/1.1 200 OK%0d%0aContent-Length: -5%0d%0a%0d%0aabcde", "protocol"),
    ("/raw?HTTP/1.1 200 OK%0d%0aContent-Length: 5%0d%0aContent-Length: 6%0d%0a%0d%0aabcdef", "protocol"),
    ("/raw?HTTP/1.1 101 Other%0d%0aConnection: upgrade%0d%0aUpgrade: websocket%0d%0a%0d%0aabc", "http_101"),
])
def test_every_failed_download_has_a_reason(site, path, expected):
    assert reason(f"http://{site}{path}") == expected


def test_broken_chunks_are_a_protocol_error_without_a_wait(site):
    async def halfway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n")
        await asyncio.sleep(0.1)
        writer.write(b"nonsense\r\n")
        await reader.read()
        writer.close()

    async def both() -> None:
        server = await asyncio.start_server(halfway, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Downloader(config()) as downloader:
            began = time.monotonic()
            with pytest.raises(BadImage) as caught:
                await downloader.get(f"http://127.0.0.1:{port}/")
            assert caught.value.reason == "protocol" and time.monotonic() - began < 1
    asyncio.run(both())


def test_slow_answers_end_with_a_timeout(site):
    paths = {"/hang": "nothing came for 0.3 s", "/slow-body?pause=5": "nothing came for 0.3 s",
             "/slow-body?pause=0.2": "not done within 1 s", "/forever": "not done within 1 s",
             "/raw/open?HTTP/1.1 200 OK%0d%0aContent-Length: 5%0d%0a%0d%0aabc": "nothing came for 0.3 s",
             "/raw/open?HTTP/1.1 100 Continue%0d%0a%0d%0a": "not done within 1 s"}
    began = time.monotonic()
    assert results([f"http://{site}{path}" for path in paths], read_timeout=0.3, timeout=1, max_bytes=1 << 50) == [
        f"timeout: {detail}" for detail in paths.values()]
    assert time.monotonic() - began < 3


def test_a_silent_host_is_a_timeout_and_a_closed_port_is_not():
    with socket.socket() as full, socket.socket() as closed:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        closed.bind(("127.0.0.1", 0))
        clients = [socket.socket() for _ in range(3)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        assert results([f"http://127.0.0.1:{full.getsockname()[1]}/", f"http://127.0.0.1:{closed.getsockname()[1]}/"],
                       connect_timeout=0.3) == [
            "timeout: no connection within 0.3 s", "connect: Connection refused"]
        for client in clients:
            client.close()


def test_failed_downloads_are_attempted_again(site):
    web_server.seen(site)
    assert get(f"http://{site}/flaky?n=2&name=one&file=a.jpg", retries=2) == FILES["a.jpg"]
    assert web_server.seen(site)["requests"] == 3
    assert reason(f"http://{site}/flaky?n=3&name=two", retries=2) == "http_500"
    assert web_server.seen(site)["requests"] == 3
    for status in (408, 425, 429, 500, 502, 503, 504, 521):
        assert get(f"http://{site}/flaky?status={status}&name={status}", retries=1) == web_server.BODY
    for path, expected in (("/cut", "cut"), ("/garbage", "protocol"), ("/status/404", "http_404"),
                           ("/status/410", "http_410"), ("/robots?value=noai", "robots"), ("/hang", "timeout")):
        web_server.seen(site)
        assert reason(f"http://{site}{path}", retries=2, read_timeout=0.2) == expected
        assert web_server.seen(site)["requests"] == (3 if expected in {"cut", "timeout"} else 1), path
    web_server.seen(site)
    assert reason(f"http://{site}/reset", retries=2) == "connect"
    assert 3 <= web_server.seen(site)["requests"] <= 6  # aiohttp may repeat one too


def test_a_stale_connection_costs_no_attempt():
    """A server may close an idle connection at the moment when the next request leaves."""
    served = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(web_server.answer(b"x"))
        await reader.read(1)  # the next request, unanswered
        writer.close()

    async def both() -> None:
        server = await asyncio.start_server(once, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Downloader(config()) as downloader:
            for _ in range(3):
                assert await downloader.get(f"http://127.0.0.1:{port}/") == b"x"
    asyncio.run(both())
    assert served == 3


def test_valid_retry_after_is_obeyed_up_to_its_limit(site):
    began = time.monotonic()
    assert get(f"http://{site}/busy?after=1&name=seconds", retries=1) == web_server.BODY
    assert time.monotonic() - began >= 1
    assert get(f"http://{site}/busy?after=soon&name=words", retries=1) == web_server.BODY
    assert get(f"http://{site}/busy?after=-5&name=negative", retries=1) == web_server.BODY
    past = "Wed,%2021%20Oct%202015%2007:28:00%20GMT"
    assert get(f"http://{site}/busy?after={past}&name=past", retries=1) == web_server.BODY
    tomorrow = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(1), usegmt=True)
    web_server.seen(site)
    for after in ("121", "9" * 5000, tomorrow.replace(" ", "%20")):
        result = results([f"http://{site}/busy?after={after}&name={after[:20]}"], retries=2)[0]
        assert result.startswith("http_429: Too Many Requests; the host asks to wait")
    assert web_server.seen(site)["requests"] == 3


@pytest.mark.parametrize("text", ["", "x", "Wed, 99 Oct 2015", "1e9", "٣", "Wed, 21 Oct 99999 07:28:00 GMT", "\udcff"])
def test_an_invalid_retry_after_is_ignored(text):
    assert http_text.retry_after(text) == 0


def test_too_large_answers_are_refused(site):
    for path in ("large.jpg", "chunked?file=large.jpg", "until-closed?file=large.jpg", "gzipped?file=a.jpg"):
        name = path.rpartition("=")[2] if "=" in path else path
        size = len(FILES[name])
        assert get(f"http://{site}/{path}", max_bytes=size) == FILES[name]
        assert reason(f"http://{site}/{path}", max_bytes=size - 1, retries=2) == "too_large"
    assert reason(f"http://{site}/a.jpg", max_bytes=len(FILES["a.jpg"]) - 1) == "too_large"
    began = time.monotonic()
    assert reason(f"http://{site}/forever", max_bytes=10_000_000) == "too_large"
    # The announced length is too large, so the body is not awaited.
    assert reason(f"http://{site}/raw/open?HTTP/1.1 200 OK%0d%0aContent-Length: 99999999999%0d%0a%0d%0a") == "too_large"
    assert time.monotonic() - began < 2


def test_a_gzip_bomb_takes_no_memory(site):
    tracemalloc.start()
    try:
        assert reason(f"http://{site}/gzip-bomb?mb=400", max_bytes=20_000_000) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_spoiled_answers_give_bytes_or_a_reason(site):
    """No other result is possible for any answer of a server."""
    chance = random.Random(5)
    wholes = [web_server.answer(b"x" * 300, "X-Robots-Tag: max-snippet: 20, all", "Set-Cookie: a=b; Path=/"),
              b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n3;x=y\r\nabc\r\n0\r\nT: x\r\n\r\n",
              b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x00abc",
              b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/x?y#z\r\nContent-Length: 0\r\n\r\n",
              b"HTTP/1.1 502 Busy\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\nConnection: close\r\n\r\n",
              b"HTTP/1.1 100 Continue\r\n\r\n" + web_server.answer(b"y" * 50, "Content-Type: image/png")]
    urls = []
    for _ in range(1500):
        data = bytearray(chance.choice(wholes))
        for _ in range(chance.choice([1, 1, 2, 8])):
            place = chance.randrange(len(data))
            data[place:place + chance.choice([0, 1, 1, 5])] = chance.choice(
                [b"", b"\r\n", b":", b"\0", b"\xff", b"9", b"[", b"//", b"\xc3\xbc", bytes([chance.randrange(256)])])
        urls.append(f"http://{site}/raw?{quote_from_bytes(bytes(data))}")
    outcomes = Counter(result.partition(":")[0] if isinstance(result, str) else "bytes" for result in results(
        urls, connections=64, read_timeout=1.0))
    gc.collect()  # asyncio reports a task with an unread error when the task is freed
    assert outcomes["bytes"] > 100 and outcomes["protocol"] > 100 and outcomes["connect"] > 10
    known = {"bytes", "bad_url", "forbidden_address", "dns", "connect", "timeout", "cut", "too_large", "robots",
             "too_many_redirects", "protocol"}
    assert all(name in known or name.startswith("http_") for name in outcomes), outcomes


def test_spoiled_urls_give_bytes_or_a_reason(site, names):
    chance = random.Random(6)
    urls = []
    for _ in range(3000):
        url = list(f"http://user:pass@127.0.0.1:{site.rpartition(':')[2]}/a.jpg?x=%20y#z")
        for _ in range(chance.choice([1, 2, 5])):
            place = chance.randrange(len(url))
            url[place:place + chance.choice([0, 1, 4])] = chance.choice(
                ["", "[", "]", "/", "\\", "@", ":", "%", "%00", " ", ".", "ü", "ß", "。", "\ud800", "\udc80", "\x00",
                 "\u202e"])
        urls.append("".join(url))
    outcomes = Counter(result.partition(":")[0] if isinstance(result, str) else "bytes" for result in results(
        urls, connections=64, connect_timeout=10.0, allow_hosts=(site,)))
    assert set(outcomes) <= {"bytes", "bad_url", "forbidden_address", "dns", "http_404", "connect",
                             "timeout"}, outcomes  # some networks drop packets to an IP address that others refuse
    assert outcomes["bytes"] > 100 and outcomes["bad_url"] > 100
