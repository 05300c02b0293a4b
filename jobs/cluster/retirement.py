"""Decides when a worker is retired, when a place gets no new worker, and when an item fails for good. It has no Ray.

A failure has one of two causes: the item or the worker. Other workers show which one.

* A failed device retires its worker immediately, because the process cannot use CUDA again.
* A worker is retired if others finish `REFUTED` items that failed on it, and it finished none in between.
* A failure counts against an item only if its worker finished another item. Failures on retired workers do not count.
* A place is a node, or the GPU that a worker reserved there. If its workers fail again, it gets no new one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.hardware import devices
from pipeline.stages.types import Item

TRIES = 3  # failures that count, after which an item fails for good
CONFIRMED = 2  # the same for a ValueError: the worker is rarely its cause, so one other worker is enough
REFUTED = 3  # items in a row that failed on a worker and that others finished
BROKEN = 3  # a place with this score gets no new worker: 2 for a worker that failed, 1 if its device had worked before
GUILTY = 2  # working devices that an item broke, after which their places are not blamed for it


@dataclass(frozen=True)
class Place:
    """The node and the GPUs of a worker."""

    node: str
    """Ray's id of the node."""
    host: str
    visible: str = ""
    """CUDA_VISIBLE_DEVICES of the GPUs that the worker reserved; empty if it reserved none."""
    cards: str = ""
    """Their names and UUIDs."""

    @property
    def key(self) -> tuple[str, str]:
        """Workers with the same key share a fault: the same GPU, or the same node if they reserved no GPU."""
        return self.node, self.visible

    @property
    def card(self) -> str:
        """Name, UUID and CUDA_VISIBLE_DEVICES of the GPU; empty without one."""
        variable = f"CUDA_VISIBLE_DEVICES={self.visible}"
        return "" if not self.visible else f"{self.cards} ({variable})" if self.cards else variable

    def __str__(self) -> str:
        return f"{self.host} (node {self.node[:8]})" + (f", {self.card}" if self.card else "")


@dataclass(frozen=True)
class Failed:
    """Why an item failed. The worker classifies the exception, because pickling loses its causes."""

    error: str
    trace: str
    device: devices.Failure = "none"
    invalid: bool = False
    """It was a ValueError."""
    full: bool = False
    """A disk was full."""


@dataclass(eq=False)
class WorkerState:
    """A worker, and how it did in this stage."""

    actor: Any
    place: Place
    finished: int = 0
    failed: int = 0
    recent: dict[str, Failed] = field(default_factory=dict)
    """Items that failed here since the last one that was finished."""
    refuted: set[str] = field(default_factory=set)
    """Items in `recent` that another worker finished."""
    retired: bool = False

    def begin(self) -> None:
        """Start a stage. Items of another stage prove nothing about this one."""
        self.finished = self.failed = 0
        self.recent.clear()
        self.refuted.clear()


@dataclass(eq=False)
class Task:
    """An item, or several that a worker takes together, until each is finished or fails for good."""

    items: list[Item]
    failures: list[WorkerState] = field(default_factory=list)
    """The worker of each failure, except failures of devices."""
    broke: set[tuple[str, str]] = field(default_factory=set)
    """Keys of the places where a device failed with this task."""
    strikes: int = 0
    """How often a device failed with this task that had worked before."""
    losses: int = 0
    last: Failed | None = None
    started: float = 0.0

    def alone(self) -> list["Task"]:
        """One task for each item, with the failures of this one."""
        if len(self.items) == 1:
            return [self]
        return [Task([item], list(self.failures), set(self.broke), self.strikes, self.losses, self.last)
                for item in self.items]


class Blame:
    """Counts failures by worker, item and place for one pool, and decides what follows."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        # (task, score) of each failure of a device, because the task may turn out to be the cause; or (None, score).
        self._at: dict[tuple[str, str], list[tuple[Task | None, int]]] = defaultdict(list)
        self._working: set[tuple[str, str]] = set()  # places that finished something since a device failed there
        self._places: dict[tuple[str, str], tuple[Place, str]] = {}  # with the last reason

    def failed(self, worker: WorkerState, task: Task, failed: Failed) -> str:
        """Count a failure. Returns the reason to retire the worker, empty if there is none."""
        worker.failed += len(task.items)
        task.last = failed
        if failed.device in ("none", "out of memory"):
            task.failures.append(worker)
            worker.recent.update({item.id: failed for item in task.items})
            return ""
        return self.broke(worker, task, failed)

    def broke(self, worker: WorkerState, task: Task, failed: Failed) -> str:
        """Count a failure of a device. Returns the reason to retire the worker."""
        task.last = failed
        task.broke.add(worker.place.key)
        worked = worker.finished > 0 or worker.place.key in self._working
        self._working.discard(worker.place.key)
        # A device that never worked says nothing about the item, unless the item broke two that did.
        task.strikes += len(task.items) == 1 and (worked or task.strikes >= GUILTY)
        return self._blame(worker, task, 1 if worked else 2,
                           f"{devices.describe_failure(failed.device)}: {_first_line(failed.error)}")

    def finished(self, worker: WorkerState, task: Task, count: int) -> Iterator[tuple[WorkerState, str]]:
        """Count `count` finished items of a task. Yields each worker to retire, with the reason."""
        worker.finished += count
        self._working.add(worker.place.key)
        worker.recent.clear()
        worker.refuted.clear()
        for other in set(task.failures):
            if not other.retired and other is not worker and task.items[0].id in other.recent:
                other.refuted.add(task.items[0].id)
                if reason := _refuted(other):
                    yield other, self._blame(other, None, 2, reason)

    def _blame(self, worker: WorkerState, task: Task | None, score: int, reason: str) -> str:
        self._places[worker.place.key] = worker.place, reason
        self._at[worker.place.key].append((task, score))
        return reason

    def broken(self, place: Place) -> bool:
        """Whether a place gets no new worker.

        Failures with an item that broke several working devices do not count: the item is the cause.
        """
        return sum(score for task, score in self._at.get(place.key, [])
                   if task is None or task.strikes < GUILTY) >= BROKEN

    def broken_places(self) -> list[Place]:
        """The places that get no new worker."""
        return [place for place, _ in self._places.values() if self.broken(place)]

    def why(self, places: Sequence[Place]) -> str:
        """These places with the reason of the last failure at each."""
        return "; ".join(f"{place}: {self._places[place.key][1]}" for place in places)

    def hopeless(self, task: Task) -> bool:
        """Whether an item failed often enough on workers that finished others, or broke working devices."""
        counted = sum(worker.finished > 0 for worker in task.failures if not worker.retired)
        return counted >= self._tries(task) or task.strikes >= TRIES

    def exhausted(self, task: Task) -> bool:
        """Whether an item failed often enough on any workers, also on those that finish nothing."""
        return sum(not worker.retired for worker in task.failures) >= self._tries(task) or task.strikes >= TRIES

    def _tries(self, task: Task) -> int:
        if task.last is not None and task.last.invalid:
            return CONFIRMED if self.workers > 1 else 1
        return TRIES

    def suspect(self, task: Task) -> bool:
        """Whether an item may be the cause of its failures."""
        return task.last is not None and (bool(task.broke) or self.exhausted(task))

    def fits(self, worker: WorkerState, task: Task, places: set[tuple[str, str]]) -> bool:
        """Whether a worker may take a task. `places`: keys of the places of all workers.

        A place where the task broke a device may have it again if there is no other one, and it works.
        """
        if worker in task.failures or (worker.place.key in task.broke and (
                places - task.broke or not worker.finished)):
            return False
        # A suspect is for workers that finish items, or for new ones.
        return worker.finished > 0 or not worker.recent or not self.suspect(task)


def _refuted(worker: WorkerState) -> str:
    """The reason to retire a worker, of which others finished an item that failed on it; empty if there is none."""
    kinds = Counter(failed.device for failed in worker.recent.values())
    example = _first_line(worker.recent[next(iter(worker.refuted))].error)
    if kinds["out of memory"] == len(worker.recent) >= 2:
        return f"{devices.describe_failure('out of memory')}, for {len(worker.recent)} items in a row: {example}"
    if len(worker.refuted) >= REFUTED:
        return f"others finished {len(worker.refuted)} items that failed here in a row: {example}"
    return ""


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]
