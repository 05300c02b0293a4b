import asyncio
import base64
import datetime
import email.utils
import gc
import ipaddress
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest

from pipeline.media.types import BadImage
from pipeline.sources import downloader, resolver
from pipeline.sources.config import DownloadConfig
from pipeline.sources.downloader import Downloader
from tests.pipeline import web_server

FILES = {"a.jpg": bytes(range(256)) * 1200, "large.jpg": os.urandom(5 << 20), "empty.jpg": b"",
         "zeros.jpg": bytes(20 << 20),
         "päth/ü b.jpg": b"unicode"}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with web_server.serving(FILES) as address:
        yield address


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Short pauses; and whatever a server does, asyncio and aiohttp have nothing to complain about."""
    monkeypatch.setattr(downloader, "_FIRST_WAIT", 0.01)
    caplog.set_level(logging.WARNING)
    yield
    assert not caplog.records


def config(**options) -> DownloadConfig:
    return DownloadConfig(**{"retries": 0, "timeout": 5.0, "read_timeout": 2.0, "connect_timeout": 2.0,
                             "allow_hosts": ("127.0.0.1",)} | options)


def results(urls: list[str], **options) -> list[bytes | str]:
    """The bodies of all at once; of those that are refused, the reason and detail."""
    async def one(downloader: Downloader, url: str) -> bytes | str:
        try:
            return await downloader.get(url)
        except BadImage as bad:
            assert type(bad) is BadImage and str(bad) == f"{bad.reason}: {bad.detail}"
            return str(bad)

    async def all_() -> list[bytes | str]:
        async with Downloader(config(**options)) as downloader:
            return await asyncio.gather(*(one(downloader, url) for url in urls))
    return asyncio.run(all_())


def get(url: str, **options) -> bytes:
    result = results([url], **options)[0]
    assert isinstance(result, bytes), result
    return result


def reason(url: str, **options) -> str:
    result = results([url], **options)[0]
    assert isinstance(result, str), result
    return result.partition(":")[0]


class Names:
    """A DNS of one's own: invented names with the answers of each lookup in turn, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[list[str] | int | Callable[[], list[str]]]] = {}
        self.asked: Counter[str] = Counter()
        self.real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, port: int | None, *more, **options) -> list[tuple]:
        host.encode("idna")  # as the real one does
        if host.replace(".", "").isdigit():
            return self.real(host, port, *more, **options)
        self.asked[host] += 1
        answers = self.answers.get(host, [socket.EAI_NONAME])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(found):
            found = found()
        if isinstance(found, int):
            raise socket.gaierror(found, "as the test wants it")
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0, 0, 0)) if ":" in address else
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that are connected to; those outside this machine refuse."""
    seen: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: tuple) -> None:
        seen.append(address[0])
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise ConnectionRefusedError(111, "Connection refused")
        real(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return seen


# What is there.

def test_bodies_come_as_they_are(site):
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
    # What comes in one piece with its headers, aiohttp rejects as a whole.
    assert results([f"http://{site}/long"])[0] in {web_server.BODY, "protocol: malformed answer (BadStatusLine)"}


def test_what_a_server_is_told(site, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
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


@pytest.mark.parametrize(("written", "sent"), [
    ("/a%20b%2Fc%c3%bc", "/a%20b%2Fc%c3%bc"), ("/%zz%", "/%zz%"), ("/ü b<\">", "/%C3%BC%20b%3C%22%3E"),
    ("?a=b&c=ä+d%26e", "?a=b&c=%C3%A4+d%26e"), ("/x?y#z", "/x?y"), ("/a/../b/./c?d=/../", "/b/c?d=/../"),
    ("\\a\\b", "/a/b"), ("/a//b", "/a//b"), ("/a\n\tb ", "/ab"), ("/\x00\x7f\udcff", "/%00%7F%FF"),
    ("/!$&'()*+,;=:@~|[]", "/!$&'()*+,;=:@~|[]"),
])
def test_urls_are_sent_as_browsers_send_them(site, written, sent):
    assert get(f" http://{site}/echo{written}").split(b" ")[1].decode() == f"/echo{sent}"


def test_unicode_paths_and_credentials(site):
    assert get(f"http://{site}/päth/ü b.jpg") == get(f"HTTP://{site}/p%C3%A4th/%c3%bc%20b.jpg") == b"unicode"
    assert get(f"http://user:p%40ss:w@{site}/private?user:p%40ss:w") == web_server.BODY
    assert get(f"http://üser@{site}/private?%C3%BCser:") == web_server.BODY
    assert reason(f"http://{site}/private?user:password") == "http_401"


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


def test_a_busy_host_keeps_nobody_else_waiting(site, names):
    names.answers["other.test"] = [["127.0.0.1"]]
    port = site.rpartition(":")[2]

    async def times() -> list[float]:
        began = time.monotonic()

        async def one(url: str) -> float:
            await downloader.get(url)
            return time.monotonic() - began
        async with Downloader(config(connections=2, connections_per_host=1,
                                     allow_hosts=("127.0.0.1", "other.test"))) as downloader:
            return await asyncio.gather(*(one(f"http://{site}/slow-body?pause=0.05") for _ in range(3)),
                                        one(f"http://other.test:{port}/a.jpg"))
    *slow, quick = asyncio.run(times())
    assert quick < min(slow)


def test_idle_connections_to_many_hosts_do_not_pile_up(site, names):
    hosts = [f"h{number}.test" for number in range(60)]
    names.answers.update({host: [["127.0.0.1"]] for host in hosts})
    port = site.rpartition(":")[2]
    web_server.seen(site)
    assert results([f"http://{host}:{port}/a.jpg" for host in hosts], connections=4,
                   allow_hosts=tuple(hosts)) == [FILES["a.jpg"]] * 60
    assert 4 < web_server.seen(site)["most_at_once"] <= 2 * 4 + 4  # four may be open on the server's side only


# What is broken.

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
def test_what_goes_wrong_has_a_name(site, path, expected):
    assert reason(f"http://{site}{path}") == expected


def test_chunks_that_go_wrong_halfway_are_a_protocol_error_and_no_wait(site):
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


def test_timeouts(site):
    paths = {"/hang": "nothing came for 0.3 s", "/slow-body?pause=5": "nothing came for 0.3 s",
             "/slow-body?pause=0.2": "not done within 1 s", "/forever": "not done within 1 s",
             "/raw/open?HTTP/1.1 200 OK%0d%0aContent-Length: 5%0d%0a%0d%0aabc": "nothing came for 0.3 s",
             "/raw/open?HTTP/1.1 100 Continue%0d%0a%0d%0a": "not done within 1 s"}
    began = time.monotonic()
    assert results([f"http://{site}{path}" for path in paths], read_timeout=0.3, timeout=1, max_bytes=1 << 50) == [
        f"timeout: {detail}" for detail in paths.values()]
    assert time.monotonic() - began < 3


def test_a_host_that_takes_no_connection_is_a_timeout_and_a_closed_port_is_not():
    with socket.socket() as full, socket.socket() as closed:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        closed.bind(("127.0.0.1", 0))
        queue = [socket.socket() for _ in range(3)]
        for one in queue:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        assert results([f"http://127.0.0.1:{full.getsockname()[1]}/", f"http://127.0.0.1:{closed.getsockname()[1]}/"],
                       connect_timeout=0.3) == [
            "timeout: no connection within 0.3 s", "connect: Connection refused"]
        for one in queue:
            one.close()


def test_redirects(site):
    assert get(f"http://{site}/hops/5?file=a.jpg") == FILES["a.jpg"]
    assert reason(f"http://{site}/hops/6") == reason(f"http://{site}/loop", retries=2) == "too_many_redirects"
    for status in (301, 302, 303, 307, 308):
        assert get(f"http://{site}/redirect?status={status}&to=/a.jpg") == FILES["a.jpg"]
    for to in ("a.jpg", "./x/../a.jpg", f"//{site}/a.jpg", f"http://{site}/a.jpg#part", "%20/a.jpg", "\\a.jpg",
               f"HTTP:\\\\{site}\\a.jpg"):
        assert get(f"http://{site}/redirect?to={to}") == FILES["a.jpg"], to
    for to in ("/p%C3%A4th/%C3%BC b.jpg", "/p%25C3%25A4th/%25c3%25bc%2520b.jpg"):
        assert get(f"http://{site}/redirect?to={to}") == b"unicode", to
    assert get(f"http://{site}/redirect?to=/echo/%E9").split(b" ")[1] == b"/echo/%E9"


@pytest.mark.parametrize(("to", "expected"), [
    ("http://[", "bad_url"), ("//", "too_many_redirects"), ("http://a b/", "bad_url"), ("http://:80/", "bad_url"),
    ("http://", "too_many_redirects"), ("http:///x", "http_404"), ("http://a:99999/", "bad_url"),
    ("http://a:b/", "bad_url"), ("ftp://127.0.0.1/", "bad_url"), ("file:///etc/passwd", "bad_url"),
    ("javascript:alert(1)", "bad_url"), ("data:image/png;base64,AAAA", "bad_url"), ("http://%FF%FE/", "bad_url"),
    ("//%00/", "protocol"), ("http://x%EF%BC%8Fy.test/", "bad_url"), ("http://a..b/", "bad_url"),
    (f"http://{'a' * 64}.test/", "bad_url"), ("http://[::1/", "bad_url"), ("http://[v1.a]/", "bad_url"),
    ("http://[fe80::1%25lo]/", "bad_url"), ("", "http_302"), ("http://256.1.1.1/", "bad_url"),
    ("http://none.invalid/", "dns"),
    ("http://localhost:9/", "forbidden_address"), ("http://127.0.0.2:9/", "forbidden_address"),
    ("http://169.254.169.254/latest/meta-data/", "forbidden_address"), ("//0x7f.1:9/", "forbidden_address"),
    ("https://10.0.0.1/", "forbidden_address"),
])
def test_where_redirects_may_not_lead(site, names, to, expected):
    names.answers["localhost"] = [["127.0.0.1"]]
    escaped = quote_from_bytes(to.encode()) if "%" not in to else to
    web_server.seen(site)
    assert reason(f"http://{site}/redirect?to={escaped}", retries=2) == expected
    assert web_server.seen(site)["requests"] == {"too_many_redirects": 6, "http_404": 2}.get(expected, 1)


@pytest.mark.parametrize("url", [
    "", " ", "a.jpg", "/a.jpg", "//", "http://", "http:", "http:a", "http:///a", "http://[", "http://a b/", "http://a:b/",
    "http://a:99999/", "http://a:0/", "http://:80/", "http://@/", "ftp://a/", "file:///etc/passwd", "http://\x00/",
    "http://\ud800/", "http://a/\ud800", "http://a\u200bb.test/", "http://" + "a" * 64 + ".test/", "http://a..b/",
    "http://.../", "javascript:alert(1)", "http://a^b/", "http://a%2fb/", "http://a%40b/",
    "http://[::1]a/", "http://[v1.a]/", "http://256.0.0.1/", "http://1.2.3.4.5/", "http://0xg.1.09/",
    "http://user:s3cret@[/", "http://" + "ü" * 300 + ".test/",
])
def test_what_is_no_url(url):
    result = results([url])[0]
    assert result.startswith("bad_url: ") and "s3cret" not in result


def test_a_name_in_any_script(site, names):
    names.answers["xn--mnchen-3ya.test"] = [["127.0.0.1"]]
    port = site.rpartition(":")[2]
    assert get(f"http://MÜNCHEN.test:{port}/a.jpg", allow_hosts=("münchen.test",)) == FILES["a.jpg"]


def test_attempts(site):
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
    assert 3 <= web_server.seen(site)["requests"] <= 6  # aiohttp repeats by itself what may have met a stale connection


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


def test_retry_after(site):
    began = time.monotonic()
    assert get(f"http://{site}/busy?after=1&name=seconds", retries=1) == web_server.BODY
    assert time.monotonic() - began >= 1
    assert get(f"http://{site}/busy?after=soon&name=words", retries=1) == web_server.BODY
    assert get(f"http://{site}/busy?after=-5&name=negative", retries=1) == web_server.BODY
    past = "Wed,%2021%20Oct%202015%2007:28:00%20GMT"
    assert get(f"http://{site}/busy?after={past}&name=past", retries=1) == web_server.BODY
    tomorrow = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(1), usegmt=True)
    web_server.seen(site)
    for after in ("61", "9" * 5000, tomorrow.replace(" ", "%20")):
        result = results([f"http://{site}/busy?after={after}&name={after[:20]}"], retries=2)[0]
        assert result.startswith("http_429: Too Many Requests; to be asked again in")
    assert web_server.seen(site)["requests"] == 3


@pytest.mark.parametrize("text", ["", "x", "Wed, 99 Oct 2015", "1e9", "٣", "Wed, 21 Oct 99999 07:28:00 GMT", "\udcff"])
def test_a_retry_after_that_says_nothing(text):
    assert downloader._retry_after(text) == 0


def test_sizes(site):
    for path in ("large.jpg", "chunked?file=large.jpg", "until-closed?file=large.jpg", "gzipped?file=a.jpg"):
        name = path.rpartition("=")[2] if "=" in path else path
        size = len(FILES[name])
        assert get(f"http://{site}/{path}", max_bytes=size) == FILES[name]
        assert reason(f"http://{site}/{path}", max_bytes=size - 1, retries=2) == "too_large"
    assert reason(f"http://{site}/a.jpg", max_bytes=len(FILES["a.jpg"]) - 1) == "too_large"
    began = time.monotonic()
    assert reason(f"http://{site}/forever", max_bytes=10_000_000) == "too_large"
    # Announced: nothing of it is waited for.
    assert reason(f"http://{site}/raw/open?HTTP/1.1 200 OK%0d%0aContent-Length: 99999999999%0d%0a%0d%0a") == "too_large"
    assert time.monotonic() - began < 2


def test_a_gzip_bomb_takes_no_memory(site):
    tracemalloc.start()
    try:
        assert reason(f"http://{site}/gzip-bomb?mb=400", max_bytes=20_000_000) == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def run(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints, in a process of its own that complains about everything."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
                          capture_output=True, text=True, env=os.environ | environment, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


# Addresses.

PRIVATE = ["127.0.0.1", "127.255.255.255", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
           "169.254.169.254", "100.64.0.1", "100.127.255.255", "100.100.100.200", "192.0.0.192", "192.0.2.1",
           "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1",
           "255.255.255.255", "168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
           "::ffff:0:10.0.0.1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::10.0.0.1",
           "64:ff9b::169.254.169.254", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:db8::1",
           "2001:0:a00:1::1", "2001::1", "100::1", "4000::1"]
PUBLIC = ["8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.1", "172.32.0.1", "223.255.255.255", "1.1.1.1",
          "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_in_urls_and_behind_names(names, connected, address):
    names.answers["name.test"] = [[address]]
    literal = f"[{address}]" if ":" in address else address
    for url in (f"http://{literal}/", f"https://{literal}:8443/", "http://name.test/"):
        assert reason(url, allow_hosts=(), retries=2) == "forbidden_address"
    assert not connected


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_connected_to(names, connected, address):
    names.answers["name.test"] = [[address]]
    literal = f"[{address}]" if ":" in address else address
    for url in (f"http://{literal}/", "http://name.test/"):
        connected.clear()
        assert reason(url, allow_hosts=()) == "connect"
        assert {ipaddress.ip_address(one) for one in connected} == {ipaddress.ip_address(address)}


@pytest.mark.parametrize("host", [
    "%31%32%37.0.0.1", "１２７.0.0.1", "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1", "user:password@127.0.0.1",
    "8.8.8.8@127.0.0.1", "127.0.0.1:80",
])
def test_spellings_that_a_browser_reads_as_this_machine(connected, host):
    assert reason(f"http://{host}/", allow_hosts=()) == "forbidden_address" and not connected
    assert reason(f"http://{host.removesuffix(':80')}:9/") == "connect" and set(connected) == {"127.0.0.1"}


@pytest.mark.parametrize("host", [
    "2130706433", "0x7f000001", "017700000001", "127.1", "127.0.1", "0x7f.1", "0177.0.0.1", "0x7f.0x0.0x0.0x1",
    "127.0.0.1.", "0", "0x0", "0xA9FEA9FE", "[::ffff:7f00:1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "localhost",
    "LOCALHOST",
])
def test_other_names_of_this_machine(connected, host):
    """No name server of the test's own: it is the system's resolver that might take these for addresses."""
    assert reason(f"http://{host}/", allow_hosts=()) == "forbidden_address"
    assert reason(f"http://{host}/", allow_hosts=("127.0.0.1",)) == "forbidden_address"
    assert not connected


def test_spellings_of_other_machines_are_theirs(connected):
    assert reason("http://0x08080808/", allow_hosts=()) == "connect" and connected == ["8.8.8.8"]


def test_numbers_that_only_the_system_takes_for_addresses(names, connected):
    names.answers["0x7f.1e"] = [["127.0.0.1"]]
    assert reason("http://0x7f.1e/", allow_hosts=()) == "forbidden_address" and not connected


def test_one_private_address_among_public_ones_is_enough(names, connected):
    for addresses in (["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "8.8.8.8", "::1"]):
        names.answers["mixed.test"] = [addresses]
        assert reason("http://mixed.test/", allow_hosts=()) == "forbidden_address"
    assert not connected


def test_the_address_that_was_checked_is_connected_to(site, names, connected):
    """A name that changes its address after the check leads nowhere else."""
    port = site.rpartition(":")[2]
    names.answers["rebound.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    web_server.seen(site)
    connected.clear()
    assert reason(f"http://rebound.test:{port}/a.jpg", allow_hosts=(), retries=2) == "connect"
    assert set(connected) == {"8.8.8.8"} and names.asked["rebound.test"] == 1
    names.answers["mine.test"] = [["127.0.0.1"], ["127.0.0.9"]]
    assert get(f"http://mine.test:{port}/a.jpg", allow_hosts=("mine.test",)) == FILES["a.jpg"]
    assert connected[-1] == "127.0.0.1" and web_server.seen(site)["requests"] == 1


def test_a_name_that_turns_private_is_refused_when_it_is_looked_up_again(site, names, connected, monkeypatch):
    monkeypatch.setattr(resolver, "_DNS_SECONDS", -1.0)
    names.answers["rebound.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    assert reason("http://rebound.test/", allow_hosts=(), retries=2) == "forbidden_address"
    assert connected == ["8.8.8.8"]


def test_allowed_hosts(site, names):
    host, _, port = site.rpartition(":")
    names.answers.update({"mine.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    url, to = f"http://{site}/a.jpg", f"http://{site}/redirect?to="
    for allowed in ((host,), (site,), ("other.test", site)):
        assert get(url, allow_hosts=allowed) == FILES["a.jpg"]
    for allowed in ((), (f"{host}:1",), ("mine.test",), ("127.0.0.2",), (f"mine.test:{port}",)):
        assert reason(url, allow_hosts=allowed) == "forbidden_address"
    assert get(f"http://mine.test:{port}/a.jpg", allow_hosts=(f"MINE.test:{port}",)) == FILES["a.jpg"]
    assert reason(f"http://other.test:{port}/a.jpg", allow_hosts=("mine.test",)) == "forbidden_address"
    assert reason(f"http://mine.test.:{port}/a.jpg", allow_hosts=("mine.test",)) in {"forbidden_address", "dns"}
    assert get(f"{to}http://mine.test:{port}/a.jpg", allow_hosts=(site, "mine.test")) == FILES["a.jpg"]
    assert reason(f"{to}http://mine.test:{port}/a.jpg", allow_hosts=(site,)) == "forbidden_address"
    assert reason(f"{to}http://127.1:{port}/a.jpg", allow_hosts=(site,)) == "forbidden_address"
    # A connection that one name was given is not another's.
    assert [str(result)[:9] for result in results(
        [f"http://mine.test:{port}/", f"http://other.test:{port}/"], allow_hosts=("mine.test",))] == [
            "http_404:", "forbidden"]


def test_allowed_hosts_of_ipv6(connected):
    for allowed in ("::1", "[::1]", "[::1]:9", "0:0::1"):
        assert reason("http://[::1]:9/", allow_hosts=(allowed,)) == "connect"
    assert reason("http://[::1]:8/", allow_hosts=("[::1]:9",)) == "forbidden_address"
    assert reason("http://127.0.0.1/", allow_hosts=("127.0.0.1:8000",)) == "forbidden_address"


def test_credentials_go_nowhere_else_and_into_no_text(site, names):
    names.answers["mine.test"] = [["127.0.0.1"]]
    port = site.rpartition(":")[2]
    allowed = {"allow_hosts": ("127.0.0.1", "mine.test")}
    basic = b"Authorization: Basic " + base64.b64encode(b"user:s3cret")
    for to, goes in (("/echo", True), (f"http://{site}/echo", True), (f"http://mine.test:{port}/echo", False)):
        assert (basic in get(f"http://user:s3cret@{site}/redirect?to={to}", **allowed)) is goes
    for path in ("/garbage", "/cut", "/reset", "/loop", "/hang", "/status/500", "/headers", "/forever",
                 "/gzipped?as=br", "/redirect?to=http://[", "/redirect?to=http://user:s3cret@none.test/", "/redirect?to=ftp://s3cret/"):
        result = results([f"http://user:s3cret@{site}{path}{'&' if '?' in path else '?'}token=s3cret"],
                         read_timeout=0.2, max_bytes=1000)[0]
        assert isinstance(result, str) and "s3cret" not in result and "user" not in result, result
    for url in ("http://user:s3cret@none.test/?s3cret", "http://user:s3cret@127.0.0.1:9/?s3cret",
                "https://user:s3cret@127.0.0.1:9/?s3cret", "http://user:s3cret@10.0.0.1/"):
        assert "s3cret" not in results([url])[0]


# Names.

def test_names_that_do_not_exist_are_asked_once(names):
    for error in (socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL):
        names.answers[f"e{-error}.test"] = [error]
        assert results([f"http://e{-error}.test/"] * 20, retries=2) == ["dns: no such name"] * 20
        assert names.asked[f"e{-error}.test"] == 1


def test_name_servers_that_do_not_answer_are_asked_again_and_then_given_up(site, names):
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
    assert names.asked["dead.test"] == 3


def test_a_name_is_asked_once_by_all_who_want_it(site, names):
    port = site.rpartition(":")[2]

    def slowly() -> list[str]:
        time.sleep(0.2)
        return ["127.0.0.1"]
    names.answers["mine.test"] = [slowly]
    assert results([f"http://mine.test:{port}/a.jpg"] * 20, allow_hosts=("mine.test",)) == [FILES["a.jpg"]] * 20
    assert names.asked["mine.test"] == 1


def test_who_gives_up_on_a_name_takes_it_from_nobody_else(names):
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
            assert first.cancelled() and names.asked["slow.test"] == 1
    asyncio.run(two())


def test_slow_names_keep_neither_each_other_waiting_nor_the_end(names):
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


# Robots.

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
    (["*: noai"], "", False), (["otherbot: noai, *: noindex"], "", False),
])
def test_robots(site, tags, agent, kept):
    url = f"http://{site}/robots?" + "&".join(f"value={tag.replace(' ', '%20')}" for tag in tags)
    if kept:
        assert get(url, robots_agent=agent) == web_server.BODY
    else:
        assert reason(url, robots_agent=agent) == "robots"
    assert get(url, robots_agent=agent, robots=()) == web_server.BODY


def test_other_directives_may_be_chosen(site):
    assert reason(f"http://{site}/robots?value=NoArchive", robots=("noarchive",)) == "robots"
    assert get(f"http://{site}/robots?value=noai", robots=("noarchive",)) == web_server.BODY


# TLS.

@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that nobody has signed but its owner."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256()))
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path


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
    """Every loop of its own, over TLS and not, whatever was left unread; warnings are errors here."""
    script = """
        import asyncio, gc, sys
        from pipeline.sources.config import DownloadConfig
        from pipeline.sources.downloader import Downloader
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


def test_a_server_that_says_no_farewell_is_left_without_one(certificate):
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
            from pipeline.sources.config import DownloadConfig
            from pipeline.sources.downloader import Downloader
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


def test_whoever_stops_waiting_stops(site):
    async def stopped() -> None:
        async with Downloader(config(connections=1, retries=2, max_bytes=1 << 50)) as downloader:
            for path in ("/hang", "/forever", "/slow-body?pause=1", "/busy?after=9&n=9"):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(downloader.get(f"http://{site}{path}"), 0.1)
            assert await downloader.get(f"http://{site}/a.jpg") == FILES["a.jpg"]
    asyncio.run(stopped())


# Anything.

def test_spoiled_answers_give_bytes_or_a_reason(site):
    """Nothing else may come out, whatever a server says."""
    chance = random.Random(5)
    wholes = [web_server.answer(b"x" * 300, "X-Robots-Tag: max-snippet: 20, all", "Set-Cookie: a=b; Path=/"),
              b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n3;x=y\r\nabc\r\n0\r\nT: x\r\n\r\n",
              b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x00abc",
              b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/x?y#z\r\nContent-Length: 0\r\n\r\n",
              b"HTTP/1.1 503 Busy\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\nConnection: close\r\n\r\n",
              b"HTTP/1.1 100 Continue\r\n\r\n" + web_server.answer(b"y" * 50, "Content-Type: image/png")]
    urls = []
    for _ in range(1500):
        data = bytearray(chance.choice(wholes))
        for _ in range(chance.choice([1, 1, 2, 8])):
            place = chance.randrange(len(data))
            data[place:place + chance.choice([0, 1, 1, 5])] = chance.choice(
                [b"", b"\r\n", b":", b"\0", b"\xff", b"9", b"[", b"//", b"\xc3\xbc", bytes([chance.randrange(256)])])
        urls.append(f"http://{site}/raw?{quote_from_bytes(bytes(data))}")
    found = Counter(result.partition(":")[0] if isinstance(result, str) else "bytes" for result in results(
        urls, connections=64, read_timeout=1.0))
    gc.collect()  # a task whose error nobody has looked at complains when it goes
    assert found["bytes"] > 100 and found["protocol"] > 100 and found["connect"] > 10
    known = {"bytes", "bad_url", "forbidden_address", "dns", "connect", "timeout", "cut", "too_large", "robots",
             "too_many_redirects", "protocol"}
    assert all(name in known or name.startswith("http_") for name in found), found


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
    found = Counter(result.partition(":")[0] if isinstance(result, str) else "bytes" for result in results(
        urls, connections=64, connect_timeout=0.5, allow_hosts=(site,)))
    assert set(found) <= {"bytes", "bad_url", "forbidden_address", "dns", "http_404", "connect"}, found
    assert found["bytes"] > 100 and found["bad_url"] > 100


# Settings.

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
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DownloadConfig(**options)
