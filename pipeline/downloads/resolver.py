"""Look up the addresses of host names in threads, with a cache."""

import asyncio
import functools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline.downloads.urls import refuse_private
from pipeline.media.types import BadImage

_DNS_THREADS, _DNS_SECONDS, _DNS_NAMES = 64, 300.0, 100_000


class Retryable(BadImage):
    """A failure that a retry may avoid."""


class _Answer(NamedTuple):
    until: float
    addresses: list[str]
    failure: tuple[str, str, bool]  # reason, detail, whether another attempt may help; empty if there are addresses
    failures: int = 0


class HostLookup:
    """IP addresses of host names, looked up in threads and cached, failures too. It refuses private ones.

    `allowed` has the hosts and ports that may have private addresses. `attempts` lookups without an answer are a
    failure. The `Downloader` has the part that aiohttp needs.
    """

    # aiohttp's own resolvers are not used: none of them refuses private addresses or remembers failures.
    def __init__(self, allowed: set[tuple[str, int | None]], attempts: int) -> None:
        self._allowed, self._attempts = allowed, attempts
        self._known: dict[str, _Answer] = {}
        self._pending: dict[str, asyncio.Future[_Answer]] = {}
        self._threads = ThreadPoolExecutor(_DNS_THREADS, "dns")

    def permits(self, host: str, port: int) -> bool:
        """Whether the host may have a private address."""
        return (host, None) in self._allowed or (host, port) in self._allowed

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host. BadImage with the reason dns, bad_url or forbidden_address."""
        known = self._known.get(host)
        if known is None or known.until < time.monotonic():
            pending = self._pending.get(host)
            if pending is None:
                failures = known.failures if known else 0
                self._pending[host] = pending = asyncio.get_running_loop().run_in_executor(
                    self._threads, _look_up, host, failures, self._attempts)
                pending.add_done_callback(functools.partial(self._remember, host))
            # Shielded: others wait for the same answer.
            known = await asyncio.shield(pending)
        if not known.addresses:
            reason, detail, again = known.failure
            raise (Retryable if again else BadImage)(reason, detail)
        if not self.permits(host, port):
            refuse_private(known.addresses)
        return known.addresses

    def _remember(self, host: str, lookup: asyncio.Future[_Answer]) -> None:
        del self._pending[host]
        if not lookup.cancelled() and lookup.exception() is None:
            self._known.pop(host, None)
            self._known[host] = lookup.result()
            if len(self._known) > _DNS_NAMES:
                del self._known[next(iter(self._known))]

    def close(self) -> None:
        """Cancel the lookups that have not started."""
        for lookup in list(self._pending.values()):
            lookup.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, failures: int, attempts: int) -> _Answer:
    later = time.monotonic() + _DNS_SECONDS
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        if error.errno in {socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL}:
            return _Answer(later, [], ("dns", "no such name", False))
        # A name whose servers are dead takes a thread for long: after as many attempts as one URL has, it is given up.
        failures += 1
        return _Answer(later if failures >= attempts else 0.0, [],
                      ("dns", "no answer from the name's servers", failures < attempts), failures)
    except OSError:
        return _Answer(0.0, [], ("dns", "the lookup failed", True))
    except ValueError:  # labels that are empty or too long
        return _Answer(later, [], ("bad_url", "no name that a host can have", False))
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    return _Answer(later, addresses, ("dns", "a name without addresses", False))
