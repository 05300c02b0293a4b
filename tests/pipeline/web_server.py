"""A web server that serves files fast and misbehaves on request.

In tests and benchmarks: `with web_server.serving({"a.jpg": data}) as address`, then `http://{address}/a.jpg`. By hand:
`python tests/pipeline/web_server.py FOLDER [CERTIFICATE]` prints its address and serves until its input ends.

The server is a separate process, so that it shares neither CPU time nor locks with the client. `FAULTS` has the paths
that are not files. For a fault with a complete body, `?file=NAME` chooses the body.
"""

import asyncio
import base64
import contextlib
import functools
import json
import mimetypes
import random
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, unquote_to_bytes

BODY = b"a picture, for all that a server knows"


@contextlib.contextmanager
def serving(files: Mapping[str, bytes] | Path = {}, certificate: Path | None = None) -> Iterator[str]:  # noqa: B006
    """Serve bodies by name, or a folder; the address as host:port. With a certificate (PEM with its key): by TLS."""
    with contextlib.ExitStack() as stack:
        folder = files
        if not isinstance(folder, Path):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="web-")))
            for name, data in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        server = subprocess.Popen([sys.executable, __file__, str(folder), *([str(certificate)] if certificate else [])],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            address = server.stdout.readline().strip()
            assert address, "the web server ended"
            yield address
        finally:
            server.kill()
            server.communicate()


def seen(address: str) -> dict[str, int]:
    """Counts since the last call: connections, most_at_once, requests, and requests of every path."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/seen", timeout=10) as answer:
        return json.load(answer)


@dataclass
class Request:
    """A request on a connection."""

    line: str
    path: str
    query: dict[str, list[str]]
    raw_query: str
    head: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def option(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]


@dataclass
class Site:
    """The files that the server serves, and its counts."""

    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)
    open: int = 0

    def body(self, name: str) -> bytes:
        return _read(str(self.folder / name)) if name else BODY

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other; a path that answers False ends the connection."""
        self.open += 1
        first = True
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line = head[:head.index(b"\r\n")].decode("latin-1")
                target = line.split(" ")[1]
                path, _, query = target.partition("?")
                if path == "/seen":
                    writer.write(answer(json.dumps(self.counts).encode(), "Connection: close"))
                    self.counts.clear()
                    break
                if first:
                    self.counts["connections"] += 1
                    self.counts["most_at_once"] = max(self.counts["most_at_once"], self.open)
                    first = False
                self.counts["requests"] += 1
                self.counts[path] += 1
                fault = FAULTS.get(path.split("/")[1])
                if fault is None:
                    writer.write(_whole(str(self.folder / unquote(path[1:])), path))
                    await writer.drain()
                elif await fault(self, Request(line, path, parse_qs(query), query, head, reader, writer)) is False:
                    break
                if b"\r\nConnection: close\r\n" in head:
                    break
        self.open -= 1
        with contextlib.suppress(OSError):
            writer.close()


def answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """An answer with its Content-Length (or another one)."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + body


@functools.lru_cache(128)
def _read(path: str) -> bytes:
    return Path(path).read_bytes()


@functools.lru_cache(128)
def _whole(path: str, name: str) -> bytes:
    try:
        body = _read(path)
    except (OSError, ValueError):
        return answer(b"nothing there", status="404 Not Found")
    return answer(body, f"Content-Type: {mimetypes.guess_type(name)[0] or 'application/octet-stream'}")


# The docstring of each fault begins with its path.
Fault = Callable[[Site, Request], Awaitable[bool | None]]


async def hang(site: Site, request: Request) -> bool:
    """/hang: never answers."""
    await request.reader.read()
    return False


async def slow_body(site: Site, request: Request) -> bool:
    """/slow-body?pause=0.1: ten pieces, with a pause before each."""
    request.writer.write(answer(b"", length=100))
    for _ in range(10):
        await request.writer.drain()
        await asyncio.sleep(float(request.option("pause", "0.1")))
        request.writer.write(b"0123456789")
    return True


async def cut(site: Site, request: Request) -> bool:
    """/cut: announces more than it sends, and closes."""
    body = site.body(request.option("file"))
    request.writer.write(answer(body, length=len(body) + 1000))
    return False


async def long(site: Site, request: Request) -> bool:
    """/long: sends more than it announces."""
    request.writer.write(answer(site.body(request.option("file"))) + b"and more that nobody was told of" * 10)
    return True


async def type_lie(site: Site, request: Request) -> bool:
    """/type-lie: always says text/html."""
    request.writer.write(answer(site.body(request.option("file")), "Content-Type: text/html; charset=utf-8"))
    return True


async def forever(site: Site, request: Request) -> bool:
    """/forever: chunks without end."""
    request.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not request.writer.is_closing():
        request.writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await request.writer.drain()
        await asyncio.sleep(0)  # otherwise the loss of a connection is noticed late
    return False


async def flaky(site: Site, request: Request) -> bool:
    """/flaky?n=2&name=x&status=500: fails n times for every name, then ends well."""
    key = request.option("name")
    site.tries[key] += 1
    if site.tries[key] <= int(request.option("n", "1")):
        request.writer.write(answer(b"", status=f"{request.option('status', '500')} Failed"))
    else:
        request.writer.write(answer(site.body(request.option("file"))))
    return True


async def random_500(site: Site, request: Request) -> bool:
    """/random-500?p=0.5: fails with that probability."""
    failed = random.random() < float(request.option("p", "0.5"))
    request.writer.write(answer(b"", status="500 By Chance") if failed else answer(site.body(request.option("file"))))
    return True


async def busy(site: Site, request: Request) -> bool:
    """/busy?after=1&n=1&name=x: 429 with that Retry-After, n times for every name, then ends well."""
    key = "busy " + request.option("name")
    site.tries[key] += 1
    if site.tries[key] <= int(request.option("n", "1")):
        request.writer.write(answer(b"", f"Retry-After: {request.option('after', '1')}", status="429 Too Many"))
    else:
        request.writer.write(answer(site.body(request.option("file"))))
    return True


async def loop(site: Site, request: Request) -> bool:
    """/loop: redirects to itself."""
    request.writer.write(answer(b"", "Location: /loop", status="302 Found"))
    return True


async def redirect(site: Site, request: Request) -> bool:
    """/redirect?status=302&to=URL: redirects to the bytes that the rest of the query escapes."""
    target = unquote_to_bytes(request.raw_query.partition("to=")[2]).decode("latin-1")
    request.writer.write(answer(b"", f"Location: {target}", status=f"{request.option('status', '302')} Elsewhere"))
    return True


async def hops(site: Site, request: Request) -> bool:
    """/hops/5: ends well after five redirects."""
    remaining_hops = int(request.path.rpartition("/")[2])
    target = f"Location: {remaining_hops - 1}?{request.raw_query}"
    request.writer.write(answer(b"", target, status="301 Moved") if remaining_hops
                         else answer(site.body(request.option("file"))))
    return True


async def garbage(site: Site, request: Request) -> bool:
    """/garbage: no HTTP, with the request in it."""
    request.writer.write(b"\x00\xff what is " + request.line.encode("latin-1") + b"?\r\n\r\n")
    return False


async def headers(site: Site, request: Request) -> bool:
    """/headers: headers of a megabyte, many or (?one) one."""
    request.writer.write(answer(BODY, *(["X: " + "x" * (1 << 20)] if "one" in request.raw_query
                                        else [f"X-{number}: {'x' * 1000}" for number in range(1000)])))
    return False


async def gzip_bomb(site: Site, request: Request) -> bool:
    """/gzip-bomb?mb=256: zeros, packed a thousand to one."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    first, second = (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    # From the second on all are the same. The end is wrong, but no client should read so far.
    request.writer.write(answer(first + second * (int(request.option("mb", "256")) - 1), "Content-Encoding: gzip"))
    return True


async def gzipped(site: Site, request: Request) -> bool:
    """/gzipped: gzip that was not requested; ?as=br names a wrong coding; ?close, ?chunked, ?until-closed: the end."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    body = packer.compress(site.body(request.option("file"))) + packer.flush()
    encoding = f"Content-Encoding: {request.option('as', 'gzip')}"
    if "chunked" in request.raw_query:
        request.writer.write(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{encoding}\r\n\r\n{len(body):x}\r\n"
                             .encode() + body + b"\r\n0\r\n\r\n")
    elif "until-closed" in request.raw_query:
        request.writer.write(f"HTTP/1.0 200 OK\r\n{encoding}\r\n\r\n".encode() + body)
    else:
        request.writer.write(answer(body, encoding))
    return not {"close", "chunked", "until-closed"} & set(request.raw_query.split("&"))


async def robots(site: Site, request: Request) -> bool:
    """/robots?value=noai&value=...: an X-Robots-Tag of each value."""
    request.writer.write(answer(site.body(request.option("file")),
                                *(f"x-robots-tag: {value}" for value in request.query.get("value", []))))
    return True


async def reset(site: Site, request: Request) -> bool:
    """/reset?after=0: that many bytes of the answer (of 1000), then RST."""
    if after := int(request.option("after", "0")):
        request.writer.write(answer(bytes(after), length=1000))
        await request.writer.drain()
        await asyncio.sleep(0.05)
    sock = request.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.writer.transport.abort()
    return False


async def status(site: Site, request: Request) -> bool:
    """/status/404: that status."""
    code = request.path.rpartition("/")[2]
    request.writer.write(f"HTTP/1.1 {code} As Requested\r\n\r\n".encode() if code in {"204", "304"}
                         else answer(BODY, status=f"{code} As Requested"))
    return True


async def chunked(site: Site, request: Request) -> bool:
    """/chunked: in chunks of 1000 bytes; /chunked?cut: without the last one."""
    body = site.body(request.option("file"))
    request.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 1000):
        piece = body[start:start + 1000]
        request.writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if "cut" in request.raw_query:
        return False
    request.writer.write(b"0\r\n\r\n")
    return True


async def until_closed(site: Site, request: Request) -> bool:
    """/until-closed: the body ends where the connection does, as in HTTP 1.0."""
    request.writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + site.body(request.option("file")))
    return False


async def private(site: Site, request: Request) -> bool:
    """/private?user:password: 401 without these credentials."""
    wanted = base64.b64encode(unquote_to_bytes(request.raw_query))
    known = b"Authorization: Basic " + wanted + b"\r\n" in request.head
    request.writer.write(answer(BODY) if known else answer(b"", status="401 Unauthorized"))
    return True


async def echo(site: Site, request: Request) -> bool:
    """/echo: the head of the request, and a cookie to see whether it comes back."""
    request.writer.write(answer(request.head, "Set-Cookie: known=yes; Path=/"))
    return True


async def raw(site: Site, request: Request) -> bool:
    """/raw?bytes: answers with the bytes that the query escapes, and closes; with /raw/open: waits."""
    request.writer.write(unquote_to_bytes(request.raw_query))
    if request.path.endswith("/open"):
        await request.writer.drain()
        await request.reader.read()
    return False


FAULTS: dict[str, Fault] = {fault.__name__.replace("_", "-"): fault for fault in (
    hang, slow_body, cut, long, type_lie, forever, flaky, random_500, busy, loop, redirect, hops, garbage, headers,
    gzip_bomb, gzipped, robots, reset, status, chunked, until_closed, private, echo, raw)}


async def _serve(folder: str, certificate: str = "") -> None:
    site = Site(Path(folder))
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    server = await asyncio.start_server(site.connection, "127.0.0.1", 0, ssl=context, backlog=4096, limit=1 << 20)
    host, port = server.sockets[0].getsockname()
    print(f"{host}:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
