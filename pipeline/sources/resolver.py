"""Resolve host names in threads, with a cache."""

import asyncio
import functools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.media.types import BadImage
from pipeline.sources.urls import refuse_private

_DNS_THREADS, _DNS_SECONDS, _DNS_NAMES = 64, 300.0, 100_000


class Retryable(BadImage):
    """A failure that another attempt may mend; `wait` is what the server asks for in seconds."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.wait = wait


class _Known(NamedTuple):
    until: float
    addresses: list[str]
    failure: tuple[str, str, bool]  # reason, detail, whether another attempt may help; empty if there are addresses
    failures: int = 0


class Resolver(AbstractResolver):
    """Names to addresses: in threads of its own, remembered with failures, and no private ones."""

    def __init__(self, allowed: set[tuple[str, int | None]], attempts: int) -> None:
        self._allowed, self._attempts = allowed, attempts
        self._known: dict[str, _Known] = {}
        self._asked: dict[str, asyncio.Future[_Known]] = {}
        self._threads = ThreadPoolExecutor(_DNS_THREADS, "dns")

    def permits(self, host: str, port: int) -> bool:
        """Whether the host may lie anywhere."""
        return (host, None) in self._allowed or (host, port) in self._allowed

    async def resolve(self, host: str, port: int = 0,
                      family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        known = self._known.get(host)
        if known is None or known.until < time.monotonic():
            asked = self._asked.get(host)
            if asked is None:
                failures = known.failures if known else 0
                self._asked[host] = asked = asyncio.get_running_loop().run_in_executor(
                    self._threads, _look_up, host, failures, self._attempts)
                asked.add_done_callback(functools.partial(self._remember, host))
            # Shielded: others wait for the same answer.
            known = await asyncio.shield(asked)
        if not known.addresses:
            reason, detail, again = known.failure
            raise (Retryable if again else BadImage)(reason, detail)
        if not self.permits(host, port):
            refuse_private(known.addresses)
        return [ResolveResult(hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                              family=socket.AF_INET6 if ":" in address else socket.AF_INET)
                for address in known.addresses]

    def _remember(self, host: str, asked: asyncio.Future[_Known]) -> None:
        del self._asked[host]
        if not asked.cancelled() and asked.exception() is None:
            self._known.pop(host, None)
            self._known[host] = asked.result()
            if len(self._known) > _DNS_NAMES:
                del self._known[next(iter(self._known))]

    async def close(self) -> None:
        for asked in list(self._asked.values()):
            asked.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, failures: int, attempts: int) -> _Known:
    later = time.monotonic() + _DNS_SECONDS
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        if error.errno in {socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL}:
            return _Known(later, [], ("dns", "no such name", False))
        # A name whose servers are dead takes a thread for long: after as many attempts as one URL has, it is given up.
        failures += 1
        return _Known(later if failures >= attempts else 0.0, [],
                      ("dns", "no answer from the name's servers", failures < attempts), failures)
    except OSError:
        return _Known(0.0, [], ("dns", "the lookup failed", True))
    except ValueError:  # labels that are empty or too long
        return _Known(later, [], ("bad_url", "no name that a host can have", False))
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    return _Known(later, addresses, ("dns", "a name without addresses", False))
