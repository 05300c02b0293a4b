"""The runner on Ray: actors that take one item at a time, and items that outlive their actors."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError, RayTaskError

from jobs import cluster
from jobs.settings import ClusterConfig
from pipeline import stage, storage
from pipeline.stage import Item, Outcome, Stage

TRIES = 3
LOSSES = 5
WORKER_TIMEOUT_S = 300.0
_log = logging.getLogger(__name__)


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """A process that holds what its stage loaded; one item at a time, nothing large comes or goes."""

    def __init__(self) -> None:
        self.ready = ""

    def ping(self) -> bool:
        """Answer once the process runs."""
        return True

    def work(self, stage_: Stage, print_: str, item: Item) -> dict[str, Any]:
        """Process and commit an item; the stage is set up at its first item here."""
        if self.ready != print_:
            stage_.setup()
            self.ready = print_
        return stage.work(stage_, item)


@dataclass(eq=False)
class _Task:
    item: Item
    failures: int = 0
    losses: int = 0
    avoid: set[Any] = field(default_factory=set)


class Pool:
    """Actors on a cluster, kept from stage to stage; call it as a runner.

    An item that raises is tried again on another actor, `TRIES` times in all; an item whose actor
    died is given to another, `LOSSES` times. A dead actor is replaced; the replacement gets work
    once it answers, so a cluster that shrank goes on with those that are left.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.starting: dict[Any, Any] = {}  # ping -> actor
        self.idle: deque[Any] = deque()
        self.gpu = False

    def __call__(self, stage_: Stage, items: Sequence[Item]) -> Iterator[Outcome | None]:
        cluster.connect()
        self._shape(stage_.workers_need_gpu and self.config.gpus > 0)
        print_ = stage.fingerprint(stage_)
        fresh, left = iter(items), len(items)
        waiting: deque[_Task] = deque()  # of a million items only those that are next, and those that came back
        busy: dict[Any, tuple[Any, _Task]] = {}
        alive = time.monotonic()
        try:
            while left or waiting or busy:
                while left and len(waiting) < self.config.workers:
                    waiting.append(_Task(next(fresh)))
                    left -= 1
                self._grow(len(busy), left + len(waiting) + len(busy))
                while pair := self._pair(waiting, bool(busy or self.starting)):
                    actor, task = pair
                    busy[actor.work.remote(stage_, print_, task.item)] = actor, task
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
                        outcome = self._finished(reference, actor, task)
                        if outcome is None:
                            waiting.appendleft(task)
                        else:
                            yield outcome
        finally:
            for actor, _ in busy.values():
                ray.kill(actor)

    def close(self) -> None:
        """End the actors."""
        for actor in [*self.idle, *self.starting.values()]:
            ray.kill(actor)
        self.idle.clear()
        self.starting.clear()

    def _shape(self, gpu: bool) -> None:
        if gpu != self.gpu:
            self.close()
            self.gpu = gpu

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

    def _finished(self, reference: Any, actor: Any, task: _Task) -> Outcome | None:
        """What a call brought; None if the item is to be tried again."""
        try:
            record = ray.get(reference)
            self.idle.append(actor)
            return Outcome(task.item, record=record)
        except RayTaskError as error:
            self.idle.append(actor)
            cause = error.cause
            task.failures += 1
            task.avoid.add(actor)
            if isinstance(cause, ValueError) or task.failures >= TRIES:
                return Outcome(task.item, error=stage.sentence(cause), trace=str(error), full=bool(storage.full(cause)))
            _log.warning("item %s failed and is tried again elsewhere: %s", task.item.id, _last_line(error))
        except RayError as error:
            task.losses += 1
            _log.warning("the worker of item %s was lost (%d of %d times): it is given to another", task.item.id,
                         task.losses, LOSSES)
            ray.kill(actor)
            if task.losses >= LOSSES:
                return Outcome(task.item, error=f"its worker died {LOSSES} times: {_last_line(error)}",
                               trace=str(error))
        return None


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
