"""When a request may be sent to a host, and what a refusal (403, 429, 503 with Retry-After) means."""

import asyncio
import contextlib
import fnmatch
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator

from pipeline.downloads.config import DownloadConfig
from pipeline.downloads.host_limits import Answer, HostLimits, HostState, Report, ReportKind, Want
from pipeline.downloads.hosts import Host, Refusals, Refused, Visit, Waiter
from pipeline.downloads.urls import parse_host_rates
from pipeline.media.types import BadImage

_REFUSALS = 4  # of one URL that is retried, pauses between them
_DOUBTS = 8  # 403 in a row of a host that forbids single URLs, which are then no matter of these
_DOUBT_S = 5.0  # such a host is given this time to answer another request
_PAUSES_UNSERVED = 2  # of a host that never answered, until its 403 is taken for an answer about the URL
_ASK_AGAIN_S = 0.1  # until slots that were refused are requested again
_AHEAD_S = 0.3  # request more slots when the rest lasts no longer
_WANTED = 256  # slots in one request, at most
_log = logging.getLogger(__name__)


class HostGate:
    """Lets the requests of one process pass, host by host; an asynchronous context manager."""

    def __init__(self, config: DownloadConfig, limits: HostLimits) -> None:
        self.config, self.limits = config, limits
        shares = [config.connections_per_host or math.inf]
        if config.host_connections:
            shares.append(max(1, config.host_connections // limits.workers))
        self._most_in_flight = min(shares)
        self._rates = parse_host_rates(config.host_rate)
        self._hosts: dict[str, Host] = {}
        self._reports: list[Report] = []
        self._wanting: dict[str, Host] = {}
        self.waiting = 0
        self.on_wait: Callable[[], None] = lambda: None

    async def __aenter__(self) -> "HostGate":
        self._wake, self._hosts, self.waiting = asyncio.Event(), {}, 0
        self._exchanging = asyncio.create_task(self._exchange_forever())
        self._exchanging.add_done_callback(self._fail_waiting)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._exchanging.cancel()
        await asyncio.wait([self._exchanging])
        if self._reports:
            await self.limits.exchange(self._reports, {})
        for host in self._hosts.values():
            if host.timer:
                host.timer.cancel()

    async def enter(self, name: str, again: bool) -> Visit:
        """Wait until a request may be sent to a host; `again`: the host refused its URL before.

        BadImage with the reason host_banned if the host refuses for longer than `host_patience`.
        """
        host, now = self._host(name), time.monotonic()
        if host.waiting or self._ready_at(host, now) > now:
            if fault := self._fault(host, now):
                raise fault
            limited = await self._wait(host, again)
        else:
            limited = self._start(host)
        return Visit(host, limited)

    def depart(self, visit: Visit) -> bool:
        """Whether the request is sent now. If the host refused meanwhile, it is not: enter again."""
        host = visit.host
        if visit.limited:
            self._clear_departure(visit)
        if host.blocked or (host.state is not None and host.state.episode != visit.episode):
            self._end(visit)
            return False
        visit.sent = time.monotonic()
        host.count_request(visit.sent)
        return True

    def turn_back(self, visit: Visit) -> None:
        """A request that was let in is not sent."""
        self._clear_departure(visit)
        self.leave(visit)

    @contextlib.contextmanager
    def parked(self) -> Iterator[None]:
        """Count a download that waits without a connection, so that another one may take its place."""
        self.waiting += 1
        self.on_wait()
        try:
            yield
        finally:
            self.waiting -= 1

    def limit_rate(self, name: str, rate: float) -> None:
        """Keep to a rate that the host itself asks for."""
        host = self._host(name)
        host.rate = min(host.rate or math.inf, rate)

    def leave(self, visit: Visit) -> None:
        """A request ended without an answer."""
        self._end(visit, "no answer")

    def answered(self, visit: Visit, refusals: Refusals) -> None:
        """The host answered a request, whatever the status."""
        host = visit.host
        host.last_served = max(host.last_served, visit.sent)
        if len(self.limits.served) < 100_000:
            self.limits.served.add(host.name)
        if host.doubts:
            for sent, verdict in host.doubts:
                if sent < visit.sent and not verdict.done():
                    verdict.set_result(True)
        self._end(visit, "answered", again=refusals.count > 0)

    async def refused(self, visit: Visit, refusals: Refusals, error: Refused) -> None:
        """The host refused a request. Returns if it shall be sent again; BadImage if not."""
        host, state = visit.host, visit.host.state or HostState()
        refusals.first_sent = min(refusals.first_sent, visit.sent)
        if visit.episode != state.episode:  # sent before the pause: it says nothing about the URL
            refusals.count = max(refusals.count, 1)
            self._end(visit)
            return
        refusals.count += 1
        again = refusals.count > 1
        final = BadImage(error.reason, error.detail)
        served = host.name in self.limits.served
        if error.status == 403 and state.single and not state.recovering:
            self._end(visit)
            if not served or not self.config.retries or await self._is_about_url(host, visit, refusals, error):
                raise final
            return
        # Refused before and after a pause, while the host answered another request that was sent later.
        others_served = host.last_served > refusals.first_sent
        about_url = error.status == 403 and again and state.recovering and (
            state.answers > 0 or others_served or (not served and state.pauses >= _PAUSES_UNSERVED))
        if about_url:
            self._end(visit, "single")
            raise final
        self._report_refusal(host, visit.episode, error)
        self._end(visit)
        if error.wait > self.config.host_patience:
            raise BadImage(error.reason, f"{error.detail}; the host asks to wait {error.wait:.0f} s")
        if refusals.count > (_REFUSALS if self.config.retries else 0):
            raise final

    async def _is_about_url(self, host: Host, visit: Visit, refusals: Refusals, error: Refused) -> bool:
        """Whether a 403 is about its URL, for the host has answered a later request; False: it is retried."""
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        doubt = visit.sent, verdict
        host.doubts.append(doubt)
        if len(host.doubts) >= _DOUBTS:
            self._report_refusal(host, visit.episode, error)
            for _, other in host.doubts:
                if not other.done():
                    other.set_result(False)
        try:
            with self.parked():
                async with asyncio.timeout(_DOUBT_S):
                    return await verdict
        except TimeoutError:
            retried, refusals.doubted = refusals.doubted, True
            return retried
        finally:
            host.doubts.remove(doubt)

    def _report_refusal(self, host: Host, episode: int, error: Refused) -> None:
        if host.blocked:
            return
        # Many hosts refuse everything from the first request on: that would be a line for each.
        if host.name in self.limits.served and not (host.state and host.state.recovering):
            _log.info("%s refuses requests (%d %s): it is paused for all workers\nhint: --host-rate %s=2 "
                      "--contact me@example.org", host.name, error.status,
                      error.phrase, host.name)
        host.blocked = True
        self._reports.append(Report(host.name, "refused", episode, status=error.status, retry_after=error.wait,
                                    recent=max(host.sent, host.sent_before)))
        self._wake.set()

    def _end(self, visit: Visit, kind: ReportKind | None = None, again: bool = False) -> None:
        host = visit.host
        host.in_flight -= 1
        # Only after a refusal is it news that a host answers.
        if kind and host.state and (host.state.recovering or kind == "single"):
            self._reports.append(Report(host.name, kind, visit.episode, again))
            self._wake.set()
        if host.waiting:
            self._pump(host)

    def _host(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is None:
            self._hosts[name] = host = Host(name, self.limits.known(name), next(
                (rate for pattern, rate in self._rates if fnmatch.fnmatchcase(name, pattern)), 0.0))
        return host

    def _clear_departure(self, visit: Visit) -> None:
        if visit.limited:
            visit.host.departing -= 1
            self._pump(visit.host)

    def _is_limited(self, host: Host) -> bool:
        return bool(host.rate) or (host.state is not None and (host.state.recovering or host.state.rate > 0))

    def _ready_at(self, host: Host, now: float) -> float:
        """When a request may be sent; infinity if something must happen before."""
        if host.blocked or host.in_flight >= self._most_in_flight:
            return math.inf
        if host.state is not None and host.state.until > now:
            return host.state.until
        if not self._is_limited(host):
            return 0.0
        at = host.slot_at(now)
        if at is None:
            self._want_slots(host)
        # Slots of requests that wait for a connection would be used in a burst later.
        return math.inf if at is None or host.departing else at

    def _want_slots(self, host: Host) -> None:
        if not host.wanted:
            self._wanting[host.name] = host
            host.wanted = True
            self._wake.set()

    def _start(self, host: Host) -> bool:
        """Let a request pass. Returns whether it took a slot."""
        host.in_flight += 1
        if limited := self._is_limited(host):
            host.departing += 1
            host.slots.popleft()
            if len(host.slots) < len(host.waiting) and len(host.slots) * host.interval < _AHEAD_S:
                self._want_slots(host)
        return limited

    async def _wait(self, host: Host, again: bool) -> bool:
        if self._exchanging.done():
            self._exchanging.result()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        host.waiting.append(Waiter(future, again))
        self._pump(host)
        try:
            with self.parked():
                return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:  # let in just now
                self.turn_back(Visit(host, future.result()))
            raise

    def _pump(self, host: Host) -> None:
        """Let requests pass that may, and come back when the next one may."""
        if host.timer:
            host.timer.cancel()
            host.timer = None
        while host.waiting:
            now = time.monotonic()
            at = self._ready_at(host, now)
            if at > now:
                if at < math.inf:
                    host.timer = asyncio.get_running_loop().call_later(at - now, self._pump, host)
                return
            waiter = self._next_waiter(host)
            if not waiter.future.done():
                waiter.future.set_result(self._start(host))

    def _next_waiter(self, host: Host) -> Waiter:
        """The next request; while the host recovers, that which tells most.

        First a URL that it has not refused, then one that it has.
        """
        if host.state is not None and host.state.recovering:
            wanted = host.state.answers > 0
            for number, waiter in enumerate(itertools.islice(host.waiting, 1000)):
                if waiter.again == wanted and not waiter.future.done():
                    del host.waiting[number]
                    return waiter
        return host.waiting.popleft()

    async def _exchange_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.poll_s):
                    await self._wake.wait()
            self._wake.clear()
            reports, self._reports = self._reports, []
            asking, self._wanting = self._wanting, {}
            wants = {name: Want(min(max(1, len(host.waiting)), _WANTED), host.rate) for name, host in asking.items()}
            self._apply(await self.limits.exchange(reports, wants), reports, asking)
            await asyncio.sleep(self.limits.tick_s)

    def _apply(self, answer: Answer, reports: list[Report], asking: dict[str, Host]) -> None:
        now = time.monotonic()
        touched = dict(asking)
        for name, state in answer.states.items():
            if host := self._hosts.get(name):
                if host.state is None or host.state.episode != state.episode:
                    host.slots.clear()
                host.state, touched[name] = state, host
        for report in reports:
            if report.kind == "refused":
                touched[report.host] = self._hosts[report.host]
                touched[report.host].blocked = False
        for name, slots in answer.slots.items():
            host = self._hosts[name]
            host.interval = slots.interval
            host.slots.extend(now + slots.delay + number * slots.interval for number in range(slots.requests))
        for name, host in touched.items():
            if name in asking and name not in answer.slots:
                asyncio.get_running_loop().call_later(_ASK_AGAIN_S, self._ask_again, host)
            else:
                host.wanted = False
            if fault := self._fault(host, now):
                while host.waiting:
                    if not (future := host.waiting.popleft().future).done():
                        future.set_exception(fault)
            self._pump(host)

    def _fail_waiting(self, ended: asyncio.Task[None]) -> None:
        """An error of the exchange ends all that wait for it."""
        if ended.cancelled() or (error := ended.exception()) is None:
            return
        for waiter in itertools.chain.from_iterable(host.waiting for host in self._hosts.values()):
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _ask_again(self, host: Host) -> None:
        host.wanted = False
        self._pump(host)

    def _fault(self, host: Host, now: float) -> BadImage | None:
        """Why requests to a host are given up now."""
        state = host.state
        if state is None or state.until <= now or state.until - state.since <= self.config.host_patience:
            return None
        wait = state.until - now
        return BadImage("host_banned", f"the host answers {state.status}, and gets the next request in {wait:.0f} s")
