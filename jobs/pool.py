"""The runner on Ray: actors that take one item at a time, or some together, and items that outlive their actors."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError, RayTaskError

from jobs import cluster, decoders
from jobs.settings import ClusterConfig
from pipeline import stage, storage
from pipeline.stage import Item, Outcome, Stage

TRIES = 3
LOSSES = 5
WORKER_TIMEOUT_S = 300.0
_log = logging.getLogger(__name__)


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """A process that holds what its stage loaded; nothing large comes or goes, but for pictures that others decode."""

    def __init__(self) -> None:
        self.ready = ""
        self.decoders: decoders.Decoders | None = None

    def ping(self) -> bool:
        """Answer once the process runs."""
        return True

    def work(self, stage_: Stage, print_: str, items: Sequence[Item], lent: tuple[list[Any], int]
             ) -> list[dict[str, Any] | None]:
        """Process and commit an item, or several that are taken together, of which None marks those that failed.

        The stage is set up at its first item here; `lent` are decoders, and how many workers share them.
        """
        if lent[0] and self.decoders is None:
            self.decoders = decoders.Decoders(*lent)
        stage_.decode = self.decoders if lent[0] else None
        if self.ready != print_:
            stage_.setup()
            self.ready = print_
        if len(items) == 1:
            return [stage.work(stage_, items[0])]
        found = {item.id: record for item, record in stage.work_together(stage_, items)}
        return [found[item.id] for item in items]


@dataclass(eq=False)
class _Task:
    items: list[Item]
    failures: int = 0
    losses: int = 0
    avoid: set[Any] = field(default_factory=set)


class Pool:
    """Actors on a cluster, kept from stage to stage; call it as a runner.

    An item that raises is tried again on another actor, `TRIES` times in all; an item whose actor
    died is given to another, `LOSSES` times. A dead actor is replaced; the replacement gets work
    once it answers, so a cluster that shrank goes on with those that are left. Of items that an actor
    takes together those that fail, and all that it had if it died, are tried alone.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.starting: dict[Any, Any] = {}  # ping -> actor
        self.idle: deque[Any] = deque()
        self.gpu = False
        self.decoders: list[Any] = []

    def __call__(self, stage_: Stage, items: Sequence[Item]) -> Iterator[Outcome | None]:
        cluster.connect()
        self._shape(stage_.workers_need_gpu and self.config.gpus > 0)
        print_ = stage.fingerprint(stage_)
        together = self._together(stage_, len(items))
        lent = self._lent(stage_)
        fresh, left = iter(items), len(items)
        waiting: deque[_Task] = deque()  # of a million items only those that are next, and those that came back
        busy: dict[Any, tuple[Any, _Task]] = {}
        alive = time.monotonic()
        try:
            while left or waiting or busy:
                while left and len(waiting) < self.config.workers:
                    waiting.append(_Task(list(itertools.islice(fresh, together))))
                    left -= len(waiting[-1].items)
                self._grow(len(busy), left + len(waiting) + len(busy))
                while pair := self._pair(waiting, bool(busy or self.starting)):
                    actor, task = pair
                    busy[actor.work.remote(stage_, print_, task.items, lent)] = actor, task
                done, _ = ray.wait([*busy, *self.starting], num_returns=1, timeout=5.0)
                if done or busy:
                    alive = time.monotonic()
                elif time.monotonic() - alive > WORKER_TIMEOUT_S:
                    raise stage.StageFailed(f"{stage_.name}: no worker could be started for {WORKER_TIMEOUT_S:.0f} s\n"
                                            f"hint: the cluster has {ray.cluster_resources()}; a worker wants "
                                            f"{self.config.cpus} CPU and {self.config.gpus if self.gpu else 0} GPU")
                if not done:
                    yield None
                for reference in done:
                    if reference in self.starting:
                        self._started(reference)
                    else:
                        actor, task = busy.pop(reference)
                        outcomes, again = self._finished(reference, actor, task)
                        waiting.extendleft(again)
                        yield from outcomes
        finally:
            for actor, _ in busy.values():
                ray.kill(actor)

    def close(self) -> None:
        """End the actors."""
        self._end_workers()
        for actor in self.decoders:
            ray.kill(actor)
        self.decoders.clear()

    def _end_workers(self) -> None:
        for actor in [*self.idle, *self.starting.values()]:
            ray.kill(actor)
        self.idle.clear()
        self.starting.clear()

    def _shape(self, gpu: bool) -> None:
        if gpu != self.gpu:
            self._end_workers()
            self.gpu = gpu

    def _together(self, stage_: Stage, items: int) -> int:
        """How many items a worker gets at once: no more than leave something for each."""
        return max(1, min(stage_.together(self.gpu), -(-items // self.config.workers)))

    def _lent(self, stage_: Stage) -> tuple[list[Any], int]:
        """Decoders for a stage that can do with them, and the number of workers; they are kept like workers."""
        if stage_.decodes and not self.decoders:
            self.decoders = decoders.start(self.config.decoders)
        return (self.decoders if stage_.decodes else []), self.config.workers

    def _grow(self, busy: int, useful: int) -> None:
        """Start actors up to the number wanted; no more than there are items."""
        while len(self.idle) + len(self.starting) + busy < min(self.config.workers, useful):
            actor = Worker.options(num_cpus=self.config.cpus, num_gpus=self.config.gpus if self.gpu else 0,
                                   scheduling_strategy="SPREAD").remote()
            self.starting[actor.ping.remote()] = actor

    def _started(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            ray.get(reference)
            self.idle.append(actor)
        except ActorUnschedulableError as error:
            raise stage.StageFailed(f"the cluster can start no worker: {error}") from error
        except RayActorError:
            time.sleep(0.2)

    def _pair(self, waiting: deque[_Task], others: bool) -> tuple[Any, _Task] | None:
        """An idle actor and a task it has not failed; any two only where there are no `others` to wait for."""
        for task in waiting:
            for actor in self.idle:
                if actor not in task.avoid or not others:
                    waiting.remove(task)
                    self.idle.remove(actor)
                    return actor, task
        return None

    def _finished(self, reference: Any, actor: Any, task: _Task) -> tuple[list[Outcome], list[_Task]]:
        """What a call brought, and what is to be tried again."""
        first = task.items[0]
        try:
            found = list(zip(task.items, ray.get(reference), strict=True))
            self.idle.append(actor)
            return ([Outcome(item, record=record) for item, record in found if record],
                    [_Task([item]) for item, record in found if not record])
        except RayTaskError as error:
            self.idle.append(actor)
            cause = error.cause
            task.failures += 1
            task.avoid.add(actor)
            if len(task.items) == 1 and (isinstance(cause, ValueError) or task.failures >= TRIES):
                return [Outcome(first, error=stage.sentence(cause), trace=str(error),
                                full=bool(storage.full(cause)))], []
            _log.warning("item %s failed and is tried again elsewhere: %s", _some(task), _last_line(error))
        except RayError as error:
            task.losses += 1
            _log.warning("the worker of item %s was lost (%d of %d times): it is given to another", _some(task),
                         task.losses, LOSSES)
            ray.kill(actor)
            if task.losses >= LOSSES:
                return [Outcome(first, error=f"its worker died {LOSSES} times: {_last_line(error)}",
                                trace=str(error))], []
        return [], [_Task([item], task.failures, task.losses, set(task.avoid)) for item in task.items]


def _some(task: _Task) -> str:
    return task.items[0].id + (f" and {len(task.items) - 1} more" if len(task.items) > 1 else "")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
