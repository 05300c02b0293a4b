"""`status --serve` as a process: clients that are idle, slow, many or hostile cost it no thread and no answer."""

import contextlib
import gzip
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.inspection import prometheus

REPOSITORY = Path(__file__).parents[3]
REQUEST_S = 2.0
CODE = """
import sys
from jobs.cli.main import main
from jobs.inspection import prometheus
prometheus._REQUEST_S, prometheus._ANSWER_S, prometheus._CONNECTIONS = float(sys.argv[1]), 3.0, 50
for number in range(int(sys.argv[3])):
    prometheus._DATABASE[f"padding_{number}"] = "Nothing. " * 200
sys.exit(main(["status", "--root", sys.argv[2], "--serve", "0"]))
"""


class Server:
    """A server at a free port."""

    def __init__(self, root: Path, padding: int = 0) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", CODE, str(REQUEST_S), str(root), str(padding)],
                                        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        line = next(line for line in self.process.stderr if "/metrics" in line)
        self.port = int(re.search(r":(\d+)/metrics", line)[1])  # type: ignore[index]

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        client.sendall(data)
        return client

    def scrape(self, path: str = "/metrics", **headers: str) -> http.client.HTTPResponse:
        return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers),
                                      timeout=10)

    def answers(self) -> bool:
        return b"rdm_root_readable 1.0" in self.scrape().read()

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def sockets(self) -> int:
        """Open connections, seen from the server."""
        folder, count = Path(f"/proc/{self.process.pid}/fd"), 0
        for descriptor in folder.iterdir():
            with contextlib.suppress(OSError):
                count += os.readlink(descriptor).startswith("socket:")
        return count

    def wait_for_sockets(self, most: int, seconds: float = 20.0) -> bool:
        """Whether no more than so many sockets are open soon."""
        deadline = time.monotonic() + seconds
        while self.sockets() > most:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "datasets/some/v1/shards").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    server = Server(root)
    try:
        yield server
        assert server.process.poll() is not None or (server.answers() and server.stop() == 0)
    finally:
        server.process.kill()
        server.process.wait()


def ends_within(client: socket.socket, seconds: float) -> bool:
    """Whether the server ends a connection, read to its end."""
    client.settimeout(seconds)
    try:
        while client.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_the_server_checks_formats_names_and_methods(server: Server) -> None:
    assert server.scrape().headers["Content-Type"].startswith("text/plain; version=")
    answer = server.scrape(Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.read().endswith(b"# EOF\n")
    compressed = server.scrape(**{"Accept-Encoding": "gzip"})
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert b"rdm_root_readable 1.0" in gzip.decompress(compressed.read())
    client = server.connect(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize("host", ["", "0.0.0.0:"])
def test_a_port_that_is_taken_is_named_with_another_one(
        tmp_path: Path, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    with socket.socket() as taken:
        taken.bind((host.rstrip(":") or "127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["status", "--root", str(tmp_path), "--serve", f"{host}{port}"]) == 2
    other = port + 1 if port < 65535 else 9108
    assert capsys.readouterr().err == (
        f"error: --serve {host or '127.0.0.1:'}{port}: cannot listen there: Address already in use\n"
        f"hint: python -m jobs status --serve {host}{other} --root {tmp_path}\n")


def test_idle_connections_end_and_cost_no_thread(server: Server) -> None:
    assert server.answers()
    before = server.threads()
    silent = [server.connect() for _ in range(40)]
    kept = server.connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert server.answers() and server.threads() <= before + 1
    start = time.monotonic()
    assert all(ends_within(client, 4 * REQUEST_S) for client in [*silent, kept])
    assert time.monotonic() - start < 4 * REQUEST_S


@pytest.mark.parametrize("first", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"GET /"])
def test_a_slow_request_is_ended(server: Server, first: bytes) -> None:
    clients, start = [server.connect(first) for _ in range(20)], time.monotonic()
    ended = set()
    while len(ended) < len(clients) and time.monotonic() - start < 5 * REQUEST_S:
        for client in set(clients) - ended:
            try:
                client.sendall(b"x" if not first.endswith(b"\n") else b"x: y\r\n")
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if not client.recv(1000):
                        ended.add(client)
                client.setblocking(True)
            except ConnectionError:
                ended.add(client)
        assert server.answers()
        time.sleep(0.1)
    assert len(ended) == len(clients)


def test_a_slow_body_is_ended(server: Server) -> None:
    client = server.connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    start = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - start < 5 * REQUEST_S:
            client.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() - start < 5 * REQUEST_S


def test_connections_have_a_limit_and_come_back(server: Server) -> None:
    base = server.sockets()
    clients = [server.connect() for _ in range(300)]
    # asyncio accepts a full backlog in one turn of its loop. A refused connection is closed two turns later.
    assert server.sockets() - base <= 50 + 3 * prometheus._BACKLOG
    deadline = time.monotonic() + 10
    while len(select.select(clients, [], [], 0)[0]) < 250:  # the refused ones are closed
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.wait_for_sockets(base + 50, 5)
    for _ in range(10):
        assert server.sockets() - base <= 50
        time.sleep(0.05)
    assert all(ends_within(client, 4 * REQUEST_S) for client in clients)
    assert server.answers() and server.wait_for_sockets(base)


@pytest.mark.parametrize("request_line", [
    b"GET /" + b"a" * 10_000_000 + b" HTTP/1.1\r\n\r\n", b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 10_000_000,
    b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1_000_000, b"\x16\x03\x01\x02\x00" * 1000, b"\r\n" * 100_000, b"\x00" * 100])
def test_huge_and_broken_requests_are_refused(server: Server, request_line: bytes) -> None:
    client = server.connect()
    with contextlib.suppress(ConnectionError):
        client.sendall(request_line)
    assert ends_within(client, 4 * REQUEST_S)
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(re.search(r"VmRSS:\s+(\d+)", status)[1]) < 600_000  # type: ignore[index]
    assert server.answers() and server.stop() == 0
    assert server.process.stderr
    log = server.process.stderr.read()
    assert "Traceback" not in log and "aaaa" not in log


def test_a_client_that_does_not_read_is_disconnected(root: Path) -> None:
    (root / "datasets/some").joinpath("current.json").write_text(
        '{"version": "v1", "content": "", "published": 1, "number": 1, "recall@10": 0.9}')
    server = Server(root, padding=5000)  # the answer is larger than what the kernel keeps for a client
    try:
        base = server.sockets()
        assert len(server.scrape().read()) > 5_000_000 and server.wait_for_sockets(base)
        clients = []
        for _ in range(3):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            clients.append(client)
        time.sleep(1)
        assert server.sockets() == base + len(clients)
        assert server.wait_for_sockets(base) and server.answers() and server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
