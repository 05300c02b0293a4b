"""The hosts that a process downloads from, its requests to them, and their refusals."""

import asyncio
import math
from collections import deque
from typing import Any, NamedTuple

from pipeline.downloads.host_limits import HostState
from pipeline.media.types import BadImage

LATE_S = 0.05  # a slot that is later by this, or by its interval, is not used: late requests would come in a burst


class Refused(BadImage):
    """A refusal by the host, not by the URL."""

    def __init__(self, status: int, phrase: str, retry_after: float) -> None:
        super().__init__(f"http_{status}", phrase)
        self.status, self.phrase, self.wait = status, phrase, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.phrase, self.wait)


class Waiter(NamedTuple):
    """A request that waits for its slot."""

    future: asyncio.Future[bool]
    again: bool  # its URL was refused before


class Host:
    """A host, its requests in flight and those that wait."""

    def __init__(self, name: str, state: HostState | None, rate: float) -> None:
        self.name, self.state, self.rate = name, state, rate
        self.in_flight = 0
        self.waiting: deque[Waiter] = deque()
        self.slots: deque[float] = deque()
        self.interval = 0.0
        self.wanted = self.blocked = False  # a request of slots, or the report of a refusal, is under way
        self.departing = 0  # requests with a slot that wait for a connection
        self.timer: asyncio.TimerHandle | None = None
        self.second, self.sent, self.sent_before = 0, 0, 0
        self.doubts: list[tuple[float, asyncio.Future[bool]]] = []  # 403 and the time when the request was sent
        self.last_served = 0.0  # time when the latest request was sent that the host answered

    def count_request(self, now: float) -> None:
        """Count a request that is sent now, by the second."""
        second = int(now)
        if second != self.second:
            self.sent_before = self.sent if second == self.second + 1 else 0
            self.second, self.sent = second, 0
        self.sent += 1

    def slot_at(self, now: float) -> float | None:
        """The time of the next slot that is not too late."""
        while self.slots and self.slots[0] < now - max(self.interval, LATE_S):
            self.slots.popleft()
        return self.slots[0] if self.slots else None


class Visit:
    """A request that may be sent, or was."""

    __slots__ = ("episode", "host", "limited", "sent")

    def __init__(self, host: Host, limited: bool) -> None:
        self.host, self.limited, self.sent = host, limited, 0.0
        self.episode = host.state.episode if host.state else 0


class Refusals:
    """The refusals of one URL."""

    count = 0
    doubted = False
    first_sent = math.inf
    """When the first request was sent that the host refused."""
