"""The runner on Ray: actors that take one item at a time, or some together, and items that outlive their actors.

`retirement` decides which workers are retired, and which items fail for good.
"""

import itertools
import logging
import os
import platform
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError, RayTaskError

from jobs.cluster import connect, decoder_actors, shared_limits
from jobs.cluster.config import ClusterConfig
from jobs.cluster.gpus import check_gpus
from jobs.cluster.retirement import Blame, Failed, Place, Task, WorkerState
from jobs.runs.labels import stage_labels
from jobs.telemetry import logs, ray_metrics
from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages.plan import claim_of
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Outcome, Retired, StageFailed
from pipeline.stages.worker import error_sentence, process_and_commit, work_together

LOSSES = 5
WORKER_TIMEOUT_S = 300.0
BROKEN_TIMEOUT_S = 60.0  # the same where every node that could start a worker is broken
PATIENCE_S = 60.0  # a worker that does not start in this time is not waited for while others are idle
_log = logging.getLogger(__name__)


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """A process that keeps what its stage loaded. Only images for decoders on other nodes are large messages."""

    def __init__(self, log: str, gpu: bool) -> None:
        logs.configure_logging(log)
        devices.reserve("cuda" if gpu else "cpu")
        if not gpu:
            devices.hide_gpus()
        self.ready = ""
        self.computed = "", ""  # precision and device of the stage that was set up
        self.decoders: decoder_actors.Decoders | None = None
        self.limits: shared_limits.SharedLimits | None = None

    def place(self) -> Place:
        """Answer once the process runs, with where it runs."""
        context = ray.get_runtime_context()
        # Without a reserved GPU the variable may still name every GPU of the node.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if context.get_accelerator_ids().get("GPU") else ""
        return Place(context.get_node_id(), platform.node(), visible, devices.list_cards(visible) if visible else "")

    def work(self, stage: Stage, stage_fingerprint: str, items: Sequence[Item], decoders: tuple[list[Any], int]
             ) -> list[dict[str, Any] | Failed | None] | Failed:
        """Process and commit an item, or several that are taken together, of which those without a record failed.

        The stage is set up at its first item here; `lent` are decoders, and how many workers share them.
        """
        try:
            if decoders[0] and self.decoders is None:
                self.decoders = decoder_actors.Decoders(*decoders)
            stage.decode = self.decoders if decoders[0] else None
            if stage.downloads:
                self.limits = self.limits or shared_limits.SharedLimits(decoders[1])
                stage.host_limits = self.limits
            if self.ready != stage_fingerprint:
                stage.setup()
                self.ready, self.computed = stage_fingerprint, (stage.precision, stage.device)
            stage.precision, stage.device = self.computed  # each call brings a new copy of the stage
            if len(items) == 1:
                return [process_and_commit(stage, items[0])]
            # An exception is not kept until the others are done: its traceback may keep tensors.
            records = {item.id: _describe_error(record) if isinstance(record, Exception) else record
                     for item, record in work_together(stage, items)}
        except Exception as error:
            return _describe_error(error)
        return [records[item.id] for item in items]


def _describe_error(error: BaseException) -> Failed:
    trace = "".join(traceback.format_exception(error))
    return Failed(error_sentence(error), trace, devices.failure_kind(error), isinstance(error, ValueError),
                  bool(storage.disk_full_message(error)))


class Pool:
    """Actors on a cluster, kept from stage to stage; call it as a runner.

    * A failed item is retried on another actor, `retirement.TRIES` times in all. An item whose actor died is retried
      `LOSSES` times.
    * A dead actor is replaced. The new one gets work once it answers, so a smaller cluster continues with fewer actors.
    * If an actor takes items together, those that fail are retried alone. If it died, all of them are.
    * An actor is retired if its device failed, or if others finish the items that fail on it.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.starting: dict[Any, tuple[Any, float]] = {}  # ping -> actor, time of the request
        self.idle: deque[WorkerState] = deque()
        self.holding: list[WorkerState] = []  # they keep broken GPUs reserved, so that Ray gives them to no other actor
        self.blame = Blame(config.workers)
        self.gpu = False
        self.decoders: list[Any] = []
        self.limits: Any = None  # keeps the actor alive

    def __call__(self, stage: Stage, items: Sequence[Item]) -> Iterator[Outcome | Retired | None]:
        connect.connect()
        connect.mention_unused_gpus(stage, self.config)
        self._shape(stage.workers_need_gpu and self.config.each_gpus > 0)
        stage_fingerprint = claim_of(stage).fingerprint
        together = self._together(stage, len(items))
        decoders = self._lent(stage)
        if stage.downloads and self.limits is None:
            self.limits = shared_limits.find_actor()
        self.meter = ray_metrics.Meter(stage_labels(stage.path, stage.name))
        fresh, unplanned = iter(items), len(items)
        waiting: deque[Task] = deque()  # of a million items only those that are next, and those that came back
        busy: dict[Any, tuple[WorkerState, Task]] = {}
        for worker in self.idle:
            worker.begin()
        alive = time.monotonic()
        try:
            while unplanned or waiting or busy:
                while unplanned and self._short(waiting):
                    waiting.append(Task(list(itertools.islice(fresh, together))))
                    unplanned -= len(waiting[-1].items)
                self._grow(len(busy), unplanned + len(waiting) + len(busy))
                yield from self._given_up(waiting, busy)
                while pair := self._pair(waiting, busy):
                    worker, task = pair
                    task.started = time.monotonic()
                    busy[worker.actor.work.remote(stage, stage_fingerprint, task.items, decoders)] = worker, task
                self.meter.workers(busy=len(busy), idle=len(self.idle), starting=len(self.starting))
                if not busy and not self.starting:
                    continue  # every item that was waiting has failed for good
                done, _ = ray.wait([*busy, *self.starting], num_returns=1, timeout=5.0)
                if done or busy:
                    alive = time.monotonic()
                else:
                    self._look_for_places(stage, time.monotonic() - alive)
                if not done:
                    yield None
                for reference in done:
                    if reference in self.starting:
                        self._started(reference)
                    else:
                        outcomes, again = self._ended(reference, *busy.pop(reference))
                        waiting.extendleft(again)
                        yield from outcomes
        finally:
            for worker, _ in busy.values():
                ray.kill(worker.actor)
            self.meter.workers(busy=0, idle=0, starting=0)  # those that are left are the next stage's

    def check(self, stage: Stage, idle: bool) -> None:
        """ValueError if a worker of this stage cannot use the GPUs that it would reserve. StageFailed without any.

        `idle`: the stage is finished, so no worker is needed.
        """
        check_gpus(stage, self.config)
        if stage.workers_need_gpu and self.config.each_gpus and not idle:
            connect.connect()
            connect.check_gpus_exist(stage, self.config)

    def close(self) -> None:
        """End the actors."""
        self._end_workers()
        for actor in self.decoders:
            ray.kill(actor)
        self.decoders.clear()

    def _end_workers(self) -> None:
        for actor in [*(worker.actor for worker in (*self.idle, *self.holding)),
                      *(actor for actor, _ in self.starting.values())]:
            ray.kill(actor)
        self.idle.clear()
        self.holding.clear()
        self.starting.clear()

    def _shape(self, gpu: bool) -> None:
        if gpu != self.gpu:
            self._end_workers()
            self.gpu = gpu

    def _together(self, stage: Stage, items: int) -> int:
        """Items that a worker gets together, so that each worker gets some."""
        return max(1, min(stage.together(self.gpu), -(-items // self.config.workers)))

    def _lent(self, stage: Stage) -> tuple[list[Any], int]:
        """Decoders for a stage that uses them, and the number of workers. The pool keeps both."""
        if stage.decodes and not self.decoders:
            self.decoders = decoder_actors.start_decoders(self.config.decoders)
        return (self.decoders if stage.decodes else []), self.config.workers

    def _grow(self, busy: int, useful: int) -> None:
        """Start actors up to the number wanted; no more than there are items."""
        for worker in [worker for worker in self.holding if not self.blame.broken(worker.place)]:
            self.holding.remove(worker)
            self.idle.append(worker)
        while len(self.idle) + len(self.starting) + busy < min(self.config.workers, useful):
            # A node with one broken GPU may have others. Its broken one is held instead (`_started`).
            avoid = sorted({place.node for place in self.blame.broken_places() if not place.visible})
            remote: Any = Worker  # `ray.remote` hides from type checkers that it adds `options`
            actor = remote.options(num_cpus=self.config.cpus, num_gpus=self.config.each_gpus if self.gpu else 0,
                                   label_selector={"ray.io/node-id": f"!in({','.join(avoid)})"} if avoid else {},
                                   scheduling_strategy="SPREAD").remote(logs.current_format(), self.gpu)
            self.starting[actor.place.remote()] = actor, time.monotonic()

    def _started(self, reference: Any) -> None:
        actor, requested_at = self.starting.pop(reference)
        try:
            worker = WorkerState(actor, ray.get(reference))
        except ActorUnschedulableError as error:
            raise StageFailed(f"the cluster can start no worker: {error}") from error
        except RayActorError:
            time.sleep(0.2)
            return
        self.meter.worker(time.monotonic() - requested_at)
        if not self.blame.broken(worker.place):
            self.idle.append(worker)
        elif worker.place.visible:
            self.holding.append(worker)
        else:
            ray.kill(actor)  # it was on its way when its node was found to be broken

    def _look_for_places(self, stage: Stage, seconds: float) -> None:
        """StageFailed if no worker started for too long; sooner if only broken places are left."""
        gpus = self.config.each_gpus if self.gpu else 0
        wants = f"{self.config.cpus} CPU and {gpus} GPU"
        broken = self.blame.broken_places()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= self.config.cpus
                 and node["Resources"].get("GPU", 0) >= gpus]
        if seconds > BROKEN_TIMEOUT_S and nodes and all(_is_broken(node, broken, gpus) for node in nodes):
            raise StageFailed(
                f"{stage.name}: only broken places are left to start a worker in\n"
                f"expected a node with {wants} that finishes items, got {self.blame.why(broken)}\n"
                f"hint: repair or replace these nodes, then run the same command again")
        if seconds > WORKER_TIMEOUT_S:
            raise StageFailed(f"{stage.name}: no worker could be started for {WORKER_TIMEOUT_S:.0f} s\n"
                                    f"hint: the cluster has {ray.cluster_resources()}; a worker wants {wants}")

    def _others(self, busy: dict[Any, tuple[WorkerState, Task]]) -> bool:
        """Whether other workers may still come."""
        now = time.monotonic()
        return bool(busy) or any(now - requested_at < PATIENCE_S for _, requested_at in self.starting.values())

    def _short(self, waiting: deque[Task]) -> bool:
        """Whether the queue needs more tasks: workers prove themselves with items that did not fail yet."""
        if len(waiting) < self.config.workers:
            return True
        return (len(waiting) < 4 * self.config.workers
                and sum(not self.blame.suspect(task) for task in waiting) < self.config.workers)

    def _given_up(self, waiting: deque[Task], busy: dict[Any, tuple[WorkerState, Task]]) -> Iterator[Outcome]:
        """Take the items from the queue that failed for good."""
        failed = [task for task in waiting if task.last]
        if not failed:
            return
        others, places = self._others(busy), self._places(busy)
        for task in [task for task in failed if self.blame.hopeless(task) or (
                not others and self.idle and self.blame.exhausted(task)
                and not any(self.blame.fits(worker, task, places) for worker in self.idle))]:
            waiting.remove(task)
            assert task.last
            yield from (Outcome(item, error=task.last.error, trace=task.last.trace, full=task.last.full)
                        for item in task.items)

    def _places(self, busy: dict[Any, tuple[WorkerState, Task]]) -> set[tuple[str, str]]:
        """The keys of the places of all workers."""
        return {worker.place.key for worker in (*self.idle, *(worker for worker, _ in busy.values()))}

    def _pair(self, waiting: deque[Task], busy: dict[Any, tuple[WorkerState, Task]]) -> tuple[WorkerState, Task] | None:
        """An idle worker and a task that fits it; any two only where no others will come."""
        if not waiting or not self.idle:
            return None
        places = self._places(busy) if any(task.broke for task in waiting) else set()

        def fitting(new: bool) -> Iterator[tuple[WorkerState, Task]]:
            return ((worker, task) for task in waiting for worker in self.idle
                    if (new or worker.finished or not self.blame.suspect(task))
                    and self.blame.fits(worker, task, places))

        pair = next(itertools.chain(fitting(False), fitting(True)), None)  # a new worker takes a suspect last
        if not pair and not self._others(busy):
            # If a device breaks now, it says more if it had worked.
            pair = max(self.idle, key=lambda worker: worker.finished), waiting[0]
        if pair:
            self.idle.remove(pair[0])
            waiting.remove(pair[1])
        return pair

    def _ended(self, reference: Any, worker: WorkerState, task: Task) -> tuple[list[Outcome | Retired], list[Task]]:
        """The results of a call, and the tasks to retry."""
        try:
            result = ray.get(reference)
        except RayTaskError as error:  # of the call itself: the worker cannot unpickle its arguments
            result = _describe_error(error.cause)
        except RayError as error:
            return self._lost(worker, task, error)
        if isinstance(result, Failed):
            result = replace(result, trace=f"on {worker.place}:\n{result.trace}")
            return ([], task.alone()) if worker.retired else self._failed(worker, task, result)
        outcomes: list[Outcome | Retired] = []
        again = [Task([item]) for item, record in zip(task.items, result, strict=True) if not isinstance(record, dict)]
        records = [(item, record) for item, record in zip(task.items, result, strict=True) if isinstance(record, dict)]
        seconds = [record["run"]["seconds"] for _, record in records]
        self.meter.items(max(time.monotonic() - task.started - sum(seconds), 0.0), seconds)
        outcomes += [Outcome(item, record=record) for item, record in records]
        broken = next((failed for failed in result
                       if isinstance(failed, Failed) and failed.device not in ("none", "out of memory")), None)
        if records:
            outcomes += [self._retire(*retired) for retired in self.blame.finished(worker, task, len(records))]
        if worker.retired:  # its last call ended before it was killed
            pass
        elif broken:
            worker.failed += len(again)
            outcomes.append(self._retire(worker, self.blame.broke(worker, Task(task.items), broken)))
        else:
            self.idle.append(worker)
        return outcomes, again

    def _failed(self, worker: WorkerState, task: Task, failed: Failed) -> tuple[list[Outcome | Retired], list[Task]]:
        """Handle a call in which every item failed: the worker if it is retired, and the tasks to retry."""
        reason = self.blame.failed(worker, task, failed)
        retired: list[Outcome | Retired] = [self._retire(worker, reason)] if reason else []
        if not reason:
            self.idle.append(worker)
        if not self.blame.hopeless(task):
            self.meter.again("device failed" if reason else "failed")
            _log.warning("item %s failed on %s, and another worker retries it: %s", _task_label(task), worker.place,
                         failed.error.splitlines()[0], extra={"fields": {"item": task.items[0].id}})
        return retired, task.alone()

    def _lost(self, worker: WorkerState, task: Task, error: RayError) -> tuple[list[Outcome | Retired], list[Task]]:
        """Handle a worker that died during a call: the item if it fails for good, or the tasks to retry."""
        if worker.retired:  # it was killed here
            return [], task.alone()
        task.losses += 1
        self.meter.again("worker lost")
        _log.warning("the worker of item %s was lost (%d of %d times), and another one takes the item",
                     _task_label(task), task.losses, LOSSES, extra={"fields": {"item": task.items[0].id}})
        ray.kill(worker.actor)
        if task.losses >= LOSSES:
            return [Outcome(task.items[0], error=f"its worker died {LOSSES} times: {_last_line(error)}",
                            trace=str(error))], []
        return [], task.alone()

    def _retire(self, worker: WorkerState, reason: str) -> Retired:
        """Kill a worker. Another one takes over its item."""
        worker.retired = True
        if worker in self.idle:
            self.idle.remove(worker)
        ray.kill(worker.actor)
        replaced = not self.blame.broken(worker.place)
        _log.warning("the worker on %s is retired: it failed %d item%s, which others retry; %s worker starts there: %s",
                     worker.place, worker.failed, "s" * (worker.failed != 1), "a new" if replaced else "no new", reason,
                     extra={"fields": {"node": worker.place.node, "card": worker.place.card}})
        return Retired(worker.place.host, worker.place.node, worker.place.card, reason, worker.failed, replaced,
                       round(time.time(), 1))


def _is_broken(node: dict[str, Any], broken: Sequence[Place], gpus: float) -> bool:
    """Whether a node cannot start a worker with so many GPUs beside the places that are broken there."""
    here = [place for place in broken if place.node == node["NodeID"]]
    usable = node["Resources"].get("GPU", 0) - sum(len(place.visible.split(",")) for place in here if place.visible)
    return any(not place.visible for place in here) or usable < gpus


def _task_label(task: Task) -> str:
    return task.items[0].id + (f" and {len(task.items) - 1} more" if len(task.items) > 1 else "")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
