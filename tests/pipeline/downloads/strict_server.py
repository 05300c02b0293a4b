"""A web server that refuses clients that are too fast, as museums and archives do."""

import asyncio
import io
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from tests.pipeline import web_server

_BEAT_S = 0.02


def jpeg(number: int) -> bytes:
    """A small image in one of many colors."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (number % 251, number // 251 % 251, 77)).save(stream, "JPEG")
    return stream.getvalue()


@dataclass
class StrictServer:
    """Serves a JPEG at any path, on several IP hosts of this machine.

    `limits` are requests a second of a host. One more bans all clients from it for `ban_s` seconds.
    They get `status`, with `retry_after` if it is not empty. /forbidden/ is always 403, /missing/ 404, /busy/ 429.
    """

    limits: Mapping[str, int]
    ban_s: float = 3.0
    status: str = "403 Forbidden"
    retry_after: str = ""
    robots: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    times: dict[str, list[float]] = field(default_factory=dict)
    """When each address served an image."""
    refused: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    most_at_once: Counter[str] = field(default_factory=Counter)
    agents: set[str] = field(default_factory=set)
    answer_s: float = 0.0

    def __post_init__(self) -> None:
        self._recent: dict[str, deque[float]] = {address: deque() for address in self.limits}
        self._banned_until = dict.fromkeys(self.limits, 0.0)
        self.times = {address: [] for address in self.limits}
        self._open: Counter[str] = Counter()
        self._beat, self._stalls = time.monotonic(), deque[tuple[float, float]](maxlen=50)

    def answer(self, address: str, path: str) -> bytes:
        now = time.monotonic()
        self.requests[address] += 1
        if path == "/robots.txt":
            body = self.robots.get(address)
            return web_server.answer(b"none", status="404 Not Found") if body is None else web_server.answer(
                body.encode())
        recent = self._recent[address]
        recent.append(now)
        while recent[0] < now - 1:
            recent.popleft()
        # Requests that arrived during a stall of this process are read together, but were not sent together.
        stalled_s = sum(seconds for moment, seconds in self._stalls if moment > now - 1)
        stalled_s += max(0.0, now - self._beat - 2 * _BEAT_S)
        limit = self.limits[address] * (1 + stalled_s)
        if limit and len(recent) > limit and now >= self._banned_until[address]:
            self._banned_until[address] = now + self.ban_s
        if now < self._banned_until[address]:
            self.refused[address] += 1
            return web_server.answer(b"", *([f"Retry-After: {self.retry_after}"] if self.retry_after else []),
                                     status=self.status)
        kind = path.split("/")[1]
        if kind in {"forbidden", "missing", "busy"}:
            return web_server.answer(b"", status={"forbidden": "403 No", "missing": "404 No", "busy": "429 No"}[kind])
        self.times[address].append(now)
        return web_server.answer(jpeg(int(path.rpartition("/")[2])))

    async def watch_stalls(self) -> None:
        """Note when this process could not run."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT_S)
            if (stalled_s := time.monotonic() - self._beat - _BEAT_S) > _BEAT_S:
                self._stalls.append((time.monotonic(), stalled_s))

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("sockname")[0]
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.agents.update(line for line in head.split("\r\n") if line.lower().startswith("user-agent:"))
                self._open[address] += 1
                self.most_at_once[address] = max(self.most_at_once[address], self._open[address])
                answer = self.answer(address, head.split(" ")[1])
                if self.answer_s:
                    await asyncio.sleep(self.answer_s)
                self._open[address] -= 1
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def urls(self, address: str, count: int, kind: str = "image") -> list[str]:
        return [f"http://{address}:{self.port}/{kind}/{number}" for number in range(count)]


@contextmanager
def running(server: StrictServer) -> Iterator[StrictServer]:
    """The server in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    watching: list[asyncio.Task[None]] = []

    async def start() -> list[asyncio.Server]:
        servers = []
        watching.append(asyncio.create_task(server.watch_stalls()))
        for address in server.limits:
            servers.append(await asyncio.start_server(server.connection, address, server.port, backlog=4096))
            server.port = servers[0].sockets[0].getsockname()[1]
        return servers

    async def stop(servers: list[asyncio.Server]) -> None:
        for each in servers:
            each.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    servers = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(servers), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
