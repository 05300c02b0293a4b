"""The knowledge of all workers about hosts: limits of requests, and pauses of hosts that refuse."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

_PAUSES_S = (2.0, 6.0, 18.0, 54.0, 60.0)  # one after the other, for hosts that name no time by Retry-After
_PROBE_S = 30.0  # an answer to the only request to a host is waited for so long
_LEASE_S = 1.0  # slots are given for so many seconds
_CLIENT_S = 3.0  # a client that requested slots before that does not count
_LEAST_RATE = 0.1
_GROWTH = 1.005  # of the rate of a host that has refused, each second
_ANSWERS = 2  # of a host that has refused, until requests to it are not sent one by one
_MAX_HOSTS = 100_000


@dataclass(frozen=True)
class HostState:
    """The state of a host that has refused requests. Times are those of `time.monotonic` in this process."""

    until: float = 0.0
    """Nothing may be sent before."""
    since: float = 0.0
    """When it refused first, since it last answered."""
    episode: int = 0
    """Number of pauses until now. A request belongs to the episode in which it was sent."""
    pauses: int = 0
    """Number of pauses since it last answered."""
    recovering: bool = False
    """Whether requests are sent one by one, because it has not yet answered twice after a pause."""
    answers: int = 0
    """Answers since the pause."""
    rate: float = 0.0
    """Requests a second that it bears; 0: unknown."""
    single: bool = False
    """Whether its 403 was about a single URL: it answered others at the same time."""
    status: int = 0
    """Status of the refusal."""


ReportKind = Literal["refused", "answered", "no answer", "single"]


class Report(NamedTuple):
    """The result of a request, as far as it concerns the host."""

    host: str
    kind: ReportKind
    episode: int
    again: bool = False  # the same URL had been refused before
    status: int = 0
    retry_after: float = 0.0
    recent: float = 0.0  # requests of this client in the second before


class Want(NamedTuple):
    """How many requests a client would send to a host, and its limit in requests a second (0: none)."""

    requests: int
    rate: float


class Slots(NamedTuple):
    """Times for requests: the first in `delay` seconds, then one every `interval` seconds."""

    delay: float
    interval: float
    requests: int


class Answer(NamedTuple):
    """States that changed since the last exchange, and slots for hosts that take requests."""

    states: Mapping[str, HostState]
    slots: Mapping[str, Slots]


class HostLimits(Protocol):
    """Limits that the downloads of a process keep; it lives as long as the process."""

    workers: int
    """How many processes share the limits."""
    tick_s: float
    """Least seconds between two exchanges."""
    poll_s: float
    """Most seconds between two exchanges: then the pauses of others are known."""
    served: set[str]
    """Hosts that have answered this process."""
    alone_s: float
    """Seconds in which the process kept to its own share, because the shared limits did not answer."""

    def known(self, host: str) -> HostState | None:
        """The state of a host by the last exchange."""

    async def exchange(self, reports: Sequence[Report], wants: Mapping[str, Want]) -> Answer:
        """Tell what happened and ask for slots. Never fails."""


class _Host:
    """A host with its line of slots."""

    def __init__(self) -> None:
        self.state = HostState()
        self.next_slot = self.probe_until = self.rate_since = 0.0
        self.clients: dict[str, float] = {}  # time of the last request of each

    def active_clients(self, now: float) -> int:
        return max(1, sum(now - then < _CLIENT_S for then in self.clients.values()))

    def rate(self, now: float) -> float:
        """The rate that a host bears: it grows slowly after a refusal."""
        return self.state.rate * _GROWTH ** min(now - self.rate_since, 3600.0)


class HostBoard:
    """The limits of all clients, in one process. Not thread-safe.

    * A refusal pauses a host for all clients, for Retry-After or for longer each time.
    * After a pause clients send one request at a time, until the host has answered two, or a refused URL.
    * After that its rate is half of what it was, and grows by 0.5 % a second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._version = 0
        self._hosts: dict[str, _Host] = {}
        self._changed: OrderedDict[str, int] = OrderedDict()  # version of the last change; the newest is at the end

    def exchange(self, client: str, version: int, reports: Sequence[Report],
                 wants: Mapping[str, Want]) -> tuple[int, dict[str, HostState], dict[str, Slots]]:
        """Take reports, and give slots. Returns the version, states that changed since `version`, and slots."""
        now = self.clock()
        for report in reports:
            self._take(report, now)
        slots = {name: lease for name, want in wants.items() if (lease := self._lease(client, name, want, now))}
        changed = {}
        for name in reversed(self._changed):
            if self._changed[name] <= version:
                break
            changed[name] = self._hosts[name].state
        return self._version, changed, slots

    def restore(self, states: Mapping[str, HostState]) -> None:
        """Take over what another board knew."""
        for name, state in states.items():
            self._host(name)
            self._change(name, state)

    def state(self, name: str) -> HostState | None:
        """The state of a host, None if it never refused."""
        return self._hosts[name].state if name in self._changed else None

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= _MAX_HOSTS:
                oldest = next(iter(self._hosts))
                del self._hosts[oldest]
                self._changed.pop(oldest, None)
            self._hosts[name] = host = _Host()
        return host

    def _change(self, name: str, state: HostState) -> None:
        self._version += 1
        self._hosts[name].state, self._changed[name] = state, self._version
        self._changed.move_to_end(name)

    def _take(self, report: Report, now: float) -> None:
        host = self._host(report.host)
        state = host.state
        if report.episode != state.episode:
            return  # the request was sent before the last pause, so it says nothing new
        host.probe_until = 0.0
        if report.kind == "refused":
            self._pause(host, report, now)
        elif report.kind == "single":
            self._change(report.host, replace(state, until=0.0, pauses=0, recovering=False, rate=0.0, single=True))
        elif report.kind == "answered" and state.recovering:
            answers = state.answers + (_ANSWERS if report.again else 1)
            if done := answers >= _ANSWERS:
                host.rate_since = now  # the rate does not grow while the host refuses
            self._change(report.host, replace(state, answers=answers, recovering=not done,
                                              pauses=0 if done else state.pauses))

    def _pause(self, host: _Host, report: Report, now: float) -> None:
        state = host.state
        wait = report.retry_after or _PAUSES_S[min(state.pauses, len(_PAUSES_S) - 1)]
        rate = state.rate
        if not state.recovering:  # a refusal of the only request does not tell a rate
            rates = [rate for rate in (host.rate(now), report.recent * host.active_clients(now)) if rate]
            rate, host.rate_since = max(_LEAST_RATE, min(rates, default=2.0) / 2), now
        host.next_slot = now + wait
        self._change(report.host, HostState(
            until=now + wait, since=state.since if state.recovering else now, episode=state.episode + 1,
            pauses=state.pauses + 1, recovering=True, rate=rate, status=report.status))

    def _lease(self, client: str, name: str, want: Want, now: float) -> Slots | None:
        host = self._host(name)
        if now < host.state.until:
            return None
        if host.state.recovering:
            if now < host.probe_until:
                return None
            host.probe_until = now + _PROBE_S
            return Slots(0.0, 0.0, 1)
        rate = min((rate for rate in (want.rate, host.rate(now)) if rate), default=math.inf)
        if rate == math.inf:
            return Slots(0.0, 0.0, want.requests)
        host.clients[client] = now
        active, start = host.active_clients(now), max(now, host.next_slot)
        if start > now + 2 * _LEASE_S + active / rate:
            return None
        count = max(1, min(want.requests, int(rate * _LEASE_S / active)))
        host.next_slot = start + count / rate
        return Slots(start - now, 1 / rate, count)


class ProcessLimits:
    """Limits of the only process, or those of one that has lost the others and keeps to its share of them."""

    tick_s, poll_s = 0.0, 3600.0

    def __init__(self, workers: int = 1, share: int = 1, states: Mapping[str, HostState] | None = None) -> None:
        """The process may send one request of `share`. It takes over what is known of hosts."""
        self.workers, self._share, self.alone_s = workers, share, 0.0
        self.served: set[str] = set()
        self._board, self._version = HostBoard(), 0
        self._board.restore(states or {})

    def known(self, host: str) -> HostState | None:
        """The state of a host."""
        return self._board.state(host)

    async def exchange(self, reports: Sequence[Report], wants: Mapping[str, Want]) -> Answer:
        """Tell what happened and ask for slots."""
        shares = {name: want._replace(rate=want.rate / self._share) for name, want in wants.items()}
        self._version, states, slots = self._board.exchange("", self._version, reports, shares)
        return Answer(states, slots)
