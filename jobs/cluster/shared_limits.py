"""Limits of requests to each host that all workers of the cluster share, in an actor.

A worker requests slots of several hosts together, for about a second. So the actor gets some calls a second from each
worker, however many URLs there are. If the actor is lost, workers keep to their share of each limit until it is back.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.downloads.host_limits import Answer, HostBoard, HostState, ProcessLimits, Report, Slots, Want

ACTOR, NAMESPACE = "host-limits", "rdm"
_ANSWER_S = 5.0  # after which a worker continues without the actor
_RETRY_S = 5.0  # between two looks whether it is back
_log = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class LimitsActor:
    """The board of all workers of a cluster."""

    def __init__(self) -> None:
        self._board, self._life = HostBoard(), secrets.token_hex(8)

    async def exchange(self, client: str, version: int, reports: Sequence[Report], wants: Mapping[str, Want]
                       ) -> tuple[str, float, int, dict[str, HostState], dict[str, Slots]]:
        """`HostBoard.exchange`, after a name of this life of the actor and the time of its process."""
        return self._life, time.monotonic(), *self._board.exchange(client, version, reports, wants)

    async def pid(self) -> int:
        """The process."""
        return os.getpid()


class _Clock:
    """The difference between the clocks of two processes.

    An answer that took long would shift the slots of a worker onto those of others. So the fastest answer counts.
    """

    _DRIFT = 1e-4  # of two clocks, at most

    def __init__(self) -> None:
        self._life, self._shift, self._at = "", 0.0, 0.0

    def shift(self, life: str, there: float, now: float) -> float:
        """Seconds to add to times of the other process. It sent an answer at `there`, which came `now`."""
        known = self._shift + (now - self._at) * self._DRIFT
        self._shift = min(known, now - there) if life == self._life else now - there
        self._life, self._at = life, now
        return self._shift


def find_actor() -> Any:
    """The actor of this cluster, whichever command started it. It is started if there is none."""
    remote: Any = LimitsActor  # `ray.remote` hides from type checkers that it adds `options`
    return remote.options(name=ACTOR, namespace=NAMESPACE, get_if_exists=True).remote()


class SharedLimits:
    """The limits as a worker sees them; it lives as long as the worker's process."""

    def __init__(self, workers: int) -> None:
        self.workers, self.served, self.alone_s = workers, set[str](), 0.0
        # A thousand workers must not call an actor more often than it can answer.
        self.tick_s, self.poll_s = max(0.05, workers / 500), max(0.5, workers / 500)
        self._client = ray.get_runtime_context().get_worker_id()
        self._version, self._life = 0, ""
        self._actor: Any = None
        self._clock = _Clock()
        self._states: dict[str, HostState] = {}
        self._own: ProcessLimits | None = None  # while the actor is lost
        self._lost_at = 0.0

    def known(self, host: str) -> HostState | None:
        """The state of a host by the last exchange."""
        return self._own.known(host) if self._own else self._states.get(host)

    async def exchange(self, reports: Sequence[Report], wants: Mapping[str, Want]) -> Answer:
        """Tell what happened and ask for slots; of the actor, or by this worker's own share of the limits."""
        if self._own is None or time.monotonic() >= self._lost_at + _RETRY_S:
            try:
                return await self._exchange(reports, wants)
            except (RayError, TimeoutError, ValueError) as error:
                self._lose(error)
        assert self._own
        answer = await self._own.exchange(reports, wants)
        self._states.update(answer.states)
        return answer

    async def _exchange(self, reports: Sequence[Report], wants: Mapping[str, Want]) -> Answer:
        async with asyncio.timeout(_ANSWER_S):
            if self._actor is None:
                self._actor = await asyncio.to_thread(find_actor)
            life, there, version, states, slots = await self._actor.exchange.remote(
                self._client, self._version, reports, wants)
        now = time.monotonic()
        shift = self._clock.shift(life, there, now)
        known = {name: replace(state, until=state.until + shift, since=state.since + shift)
                 for name, state in states.items()}
        # From this moment, not from that of the actor's answer: slots of a late answer are in the past.
        slots = {name: each._replace(delay=there + each.delay + shift - now) for name, each in slots.items()}
        if life != self._life and self._life:
            # The actor started again and lost its state. Its workers forget theirs too.
            known = dict.fromkeys(self._states, HostState()) | known
        if self._own is not None:
            _log.info("the actor that shares the limits of hosts answers again")
            self.alone_s += time.monotonic() - self._lost_at
            self._own = None
        self._version, self._life = version if life == self._life or not self._life else 0, life
        self._states.update(known)
        return Answer(known, slots)

    def _lose(self, error: Exception) -> None:
        now = time.monotonic()
        if self._own is None:
            _log.warning("the actor that shares the limits of hosts does not answer (%s): this worker keeps to "
                         "its share, 1/%d of each limit, until it does", type(error).__name__, self.workers)
            self._own = ProcessLimits(self.workers, share=self.workers, states=self._states)
            self._version, self._life = 0, "lost"
        else:
            self.alone_s += now - self._lost_at
        self._lost_at, self._actor = now, None
