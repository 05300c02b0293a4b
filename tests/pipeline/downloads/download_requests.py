"""Requests to the test server through the downloader, and a name server that invents IPs for host names."""

import asyncio
import os
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable

import pytest

from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.downloader import Downloader
from pipeline.media.types import BadImage

FILES = {"a.jpg": bytes(range(256)) * 1200, "large.jpg": os.urandom(5 << 20), "empty.jpg": b"",
         "zeros.jpg": bytes(20 << 20),
         "päth/ü b.jpg": b"unicode"}


def config(**options) -> DownloadConfig:
    return DownloadConfig(**{"retries": 0, "timeout": 5.0, "read_timeout": 2.0, "connect_timeout": 2.0,
                             "allow_hosts": ("127.0.0.1",)} | options)


def results(urls: list[str], **options) -> list[bytes | str]:
    """Fetch all URLs together. A result is the body, or `REASON: DETAIL` if the URL is refused."""
    async def body_or_reason(downloader: Downloader, url: str) -> bytes | str:
        try:
            return await downloader.get(url)
        except BadImage as bad:
            assert type(bad) is BadImage and str(bad) == f"{bad.reason}: {bad.detail}"
            return str(bad)

    async def fetch_all() -> list[bytes | str]:
        async with Downloader(config(**options)) as downloader:
            return await asyncio.gather(*(body_or_reason(downloader, url) for url in urls))
    return asyncio.run(fetch_all())


def get(url: str, **options) -> bytes:
    result = results([url], **options)[0]
    assert isinstance(result, bytes), result
    return result


def reason(url: str, **options) -> str:
    result = results([url], **options)[0]
    assert isinstance(result, str), result
    return result.partition(":")[0]


class Names:
    """A fake DNS: invented names with the answers of each lookup in turn. The last answer repeats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[list[str] | int | Callable[[], list[str]]]] = {}
        self.lookups: Counter[str] = Counter()
        self.real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, port: int | None, *more, **options) -> list[tuple]:
        host.encode("idna")  # as the real one does
        if host.replace(".", "").isdigit():
            return self.real(host, port, *more, **options)
        self.lookups[host] += 1
        answers = self.answers.get(host, [socket.EAI_NONAME])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = answer()
        if isinstance(answer, int):
            raise socket.gaierror(answer, "as the test wants it")
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0, 0, 0)) if ":" in address else
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answer]


def run(script: str, *arguments: str, **environment: str) -> str:
    """Standard output of a script in a new process, in which every warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
                          capture_output=True, text=True, env=os.environ | environment, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout
