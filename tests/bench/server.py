"""A web server of photographs that costs next to nothing, so that a measurement shows the cost of the downloader.

    python tests/bench/server.py [--port 8000] [--no-keep-alive] [--measure]

/NNNNNN.jpg is image NNNNNN modulo the number of images, with NNNNNN in a comment segment, so the bytes of every URL
differ. Any other path is 404. The images are in memory, and the kernel sends them from there without a copy. The server
reads only the path of a request. It ends when its standard input does.
"""

import argparse
import contextlib
import json
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import photographs

_COMMENT = b"\xff\xfe\x00\x12%016d"
_MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nnone"


class _Picture(NamedTuple):
    head: bytes  # of the answer and of the file, up to where the comment goes
    offset: int
    bytes: int  # what comes after the comment


class _Connection:
    """The bytes that remain to be sent on a socket, and the part of a request that has arrived."""

    __slots__ = ("closing", "offset", "received", "remaining", "socket", "writing")

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.received = b""
        self.offset = self.remaining = 0
        self.closing = self.writing = False


class Server:
    """One thread, one epoll."""

    def __init__(self, paths: list[Path], port: int, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.requests = self.sent = 0
        self.memory = os.memfd_create("photographs")
        self.pictures = [self._load(path) for path in paths]
        self.listening = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.listening.setblocking(False)
        self.epoll = select.epoll()
        self.epoll.register(self.listening, select.EPOLLIN)
        self.connections: dict[int, _Connection] = {}

    def _load(self, path: Path) -> _Picture:
        data = path.read_bytes()
        # After the first segment (JFIF's, which has to be the first), so that the file stays a good one.
        cut = 4 + struct.unpack(">H", data[4:6])[0]
        offset = os.lseek(self.memory, 0, os.SEEK_END)
        with open(self.memory, "ab", closefd=False) as out:
            out.write(data[cut:])
        length = len(data) + len(_COMMENT % 0)
        close = b"" if self.keep_alive else b"Connection: close\r\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n%sContent-Length: %d\r\n\r\n" % (close, length)
        return _Picture(head + data[:cut], offset, len(data) - cut)

    def serve(self) -> None:
        """Answer until standard input ends."""
        stdin = sys.stdin.fileno()
        with contextlib.suppress(PermissionError):  # a file or /dev/null, which has no end to wait for
            self.epoll.register(stdin, select.EPOLLIN)
        while True:
            for number, events in self.epoll.poll():
                connection = self.connections.get(number)
                if connection is None:
                    if number == stdin:
                        if not os.read(stdin, 1 << 12):
                            return
                    else:
                        self._accept()
                    continue
                try:
                    if events & select.EPOLLOUT:
                        self._send(connection)
                    if events & ~select.EPOLLOUT:
                        self._receive(connection)
                except OSError:
                    self._close(connection)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted, _ = self.listening.accept()
                accepted.setblocking(False)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = self.connections[accepted.fileno()] = _Connection(accepted)
                self.epoll.register(accepted, select.EPOLLIN)
                # The request is mostly there already.
                with contextlib.suppress(BlockingIOError):
                    try:
                        self._receive(connection)
                    except ConnectionError:
                        self._close(connection)

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(1 << 14)
        if not data:
            self._close(connection)
            return
        connection.received += data
        self._answer(connection)

    def _answer(self, connection: _Connection) -> None:
        """Answer the requests that came, one after the other; one waits while an answer is on its way."""
        while not connection.remaining:
            request, end, rest = connection.received.partition(b"\r\n\r\n")
            if not end:
                return
            connection.received = rest
            connection.closing = not self.keep_alive or b"onnection: close" in request
            self.requests += 1
            name = request[5:request.find(b" ", 5)]
            if name.endswith(b".jpg") and name[:-4].isdigit():
                number = int(name[:-4])
                picture = self.pictures[number % len(self.pictures)]
                head = picture.head + _COMMENT % number
                connection.offset, connection.remaining = picture.offset, picture.bytes
                # A client has read the previous answer before it sends a request, so the buffer has room for the head.
                connection.socket.send(head, socket.MSG_MORE)
                self.sent += picture.bytes + len(head)
                self._send(connection)
            else:
                connection.socket.send(_MISSING)
                if connection.closing:
                    self._close(connection)
            if connection.closing:
                return

    def _send(self, connection: _Connection) -> None:
        try:
            while connection.remaining:
                sent = os.sendfile(connection.socket.fileno(), self.memory, connection.offset, connection.remaining)
                connection.offset += sent
                connection.remaining -= sent
        except BlockingIOError:
            if not connection.writing:
                self.epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)
                connection.writing = True
            return
        if connection.closing:
            self._close(connection)
        elif connection.writing:
            self.epoll.modify(connection.socket, select.EPOLLIN)
            connection.writing = False
            self._answer(connection)

    def _close(self, connection: _Connection) -> None:
        if self.connections.pop(connection.socket.fileno(), None):
            connection.socket.close()


class Running(NamedTuple):
    """A server in another process."""

    address: str  # host:port
    pid: int

    def url(self, number: int) -> str:
        """The address of an image."""
        return f"http://{self.address}/{number:06d}.jpg"

    def cpu_seconds(self) -> float:
        """CPU seconds it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(work: Path, *, keep_alive: bool = True, port: int = 0) -> Iterator[Running]:
    """A server of the photographs of a work folder, which are made where they are missing."""
    photographs.make(work)
    command = [sys.executable, __file__, "--work", str(work), "--port", str(port)]
    process = subprocess.Popen(command + ([] if keep_alive else ["--no-keep-alive"]), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        yield Running(process.stdout.readline().strip(), process.pid)
    finally:
        process.stdin.close()
        process.wait(10)


def _measure(work: Path, requests: int) -> None:
    """Cost of a request for the server, by one client that discards the answers."""
    for keep_alive in (True, False):
        with running(work, keep_alive=keep_alive) as server:
            host, port = server.address.split(":")
            buffer, connection = bytearray(1 << 20), None
            before = time.perf_counter(), time.process_time(), server.cpu_seconds()
            for number in range(requests):
                if connection is None:
                    connection = socket.create_connection((host, int(port)))
                connection.sendall(b"GET /%06d.jpg HTTP/1.1\r\nHost: bench\r\n\r\n" % number)
                got, wanted = 0, 1
                while got < wanted:
                    got += connection.recv_into(memoryview(buffer)[got:])
                    if wanted == 1:
                        body = buffer.index(b"\r\n\r\n") + 4
                        start = buffer.index(b"Content-Length: ") + 16
                        wanted = body + int(buffer[start:buffer.index(b"\r", start)])
                if not keep_alive:
                    connection.close()
                    connection = None
            now = time.perf_counter(), time.process_time(), server.cpu_seconds()
            seconds, client, served = (after - first for after, first in zip(now, before, strict=True))
            print(json.dumps({"keep_alive": keep_alive, "requests": requests,
                              "requests_per_s": round(requests / seconds),
                              "server_cpu_us_per_request": round(served / requests * 1e6),
                              "client_cpu_us_per_request": round(client / requests * 1e6)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="", help="folder of the images; default: rdm-bench in the temporary folder")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--no-keep-alive", action="store_true", help="close every connection after one answer")
    parser.add_argument("--measure", action="store_true", help="say what a request costs, and end")
    args = parser.parse_args()
    work = photographs.work_folder(args.work)
    if args.measure:
        _measure(work, 5000)
        return 0
    # Thousands of connections may wait at the same time.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server = Server(photographs.make(work), args.port, not args.no_keep_alive)
    host, port = server.listening.getsockname()
    print(f"{host}:{port}", flush=True)
    server.serve()
    print(f"server: {server.requests} requests, {server.sent / 1e9:.2f} GB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
