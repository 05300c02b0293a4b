"""When a worker is retired, when a place gets no new worker, and when an item fails for good; without Ray.

A failure has one of two causes, the item or the worker, and other workers tell which:

* A worker whose device failed is retired at once: CUDA cannot be used again in that process.
* A worker is retired if others finish items that failed on it (`REFUTED`), and it finished none in between.
* A failure counts against an item only if its worker finished something. Failures on retired workers do not count.
* A place (a node, or the GPU that a worker reserved there) where this happens again gets no new worker.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import devices
from pipeline.stage import Item

TRIES = 3  # failures that count, after which an item fails for good
CONFIRMED = 2  # the same for a ValueError, which is rarely the worker's: a second worker confirms it
REFUTED = 3  # items in a row that failed on a worker and that others finished
BLAMES = 2  # failures of workers at a place, after which it gets no new worker


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str
    """Ray's id of the node."""
    host: str
    visible: str = ""
    """CUDA_VISIBLE_DEVICES of the GPUs that the worker reserved; empty if it reserved none."""
    cards: str = ""
    """Their names and UUIDs."""

    @property
    def key(self) -> tuple[str, str]:
        """What fails together."""
        return self.node, self.visible

    @property
    def card(self) -> str:
        """Name, UUID and CUDA_VISIBLE_DEVICES of the GPU; empty without one."""
        return f"{self.cards} (CUDA_VISIBLE_DEVICES={self.visible})".strip() if self.visible else ""

    def __str__(self) -> str:
        return f"{self.host} (node {self.node[:8]})" + (f", {self.card}" if self.card else "")


@dataclass(frozen=True)
class Failed:
    """Why an item failed, without the exception: only the process that raised it can be sure to have its type."""

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
    """Those of them that another worker finished."""
    retired: bool = False

    def begin(self) -> None:
        """Start a stage: what was finished in another one proves nothing."""
        self.finished = self.failed = 0
        self.recent.clear()
        self.refuted.clear()


@dataclass(eq=False)
class Task:
    """An item, or several that are taken together, until each of them is finished or has failed for good."""

    items: list[Item]
    failures: list[WorkerState] = field(default_factory=list)
    """The worker of each failure, but for failures of devices."""
    broke: set[tuple[str, str]] = field(default_factory=set)
    """Places where a device failed with it."""
    strikes: int = 0
    """How many of these devices had worked before."""
    losses: int = 0
    last: Failed | None = None
    given: float = 0.0

    def alone(self) -> list["Task"]:
        """The same for each item by itself."""
        if len(self.items) == 1:
            return [self]
        return [Task([item], list(self.failures), set(self.broke), self.strikes, self.losses, self.last)
                for item in self.items]


class Blame:
    """What failed where in a run of a pool, and what follows from it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        # The task of each failure of a device, for the task may turn out to be its cause; None for other failures.
        self._at: dict[tuple[str, str], list[Task | None]] = defaultdict(list)
        self._places: dict[tuple[str, str], tuple[Place, str]] = {}  # with the last reason

    def failed(self, worker: WorkerState, task: Task, failed: Failed) -> str:
        """Count a failure; the reason to retire its worker, empty if there is none."""
        worker.failed += len(task.items)
        task.last = failed
        if failed.device in ("none", "out of memory"):
            task.failures.append(worker)
            worker.recent.update({item.id: failed for item in task.items})
            return ""
        return self.broke(worker, task, failed)

    def broke(self, worker: WorkerState, task: Task, failed: Failed) -> str:
        """Count a failure of a device; the reason to retire its worker."""
        task.last = failed
        task.broke.add(worker.place.key)
        # A device that never worked says nothing about the item, until the item broke two that did.
        task.strikes += len(task.items) == 1 and (worker.finished > 0 or task.strikes >= BLAMES)
        return self._blame(worker, task, f"{devices.sentence(failed.device)}: {_first_line(failed.error)}")

    def finished(self, worker: WorkerState, task: Task, count: int) -> Iterator[tuple[WorkerState, str]]:
        """Count `count` finished items of a task; workers to retire, and why."""
        worker.finished += count
        worker.recent.clear()
        worker.refuted.clear()
        for other in set(task.failures):
            if not other.retired and other is not worker and task.items[0].id in other.recent:
                other.refuted.add(task.items[0].id)
                if reason := _refuted(other):
                    yield other, self._blame(other, None, reason)

    def _blame(self, worker: WorkerState, task: Task | None, reason: str) -> str:
        self._places[worker.place.key] = worker.place, reason
        self._at[worker.place.key].append(task)
        return reason

    def broken(self, place: Place) -> bool:
        """Whether a place gets no new worker.

        Failures with an item that broke several working devices do not count: the item is the cause.
        """
        return sum(task is None or task.strikes < BLAMES for task in self._at.get(place.key, [])) >= BLAMES

    def broken_places(self) -> list[Place]:
        """The places that get no new worker."""
        return [place for place, _ in self._places.values() if self.broken(place)]

    def why(self, places: Sequence[Place]) -> str:
        """These places with the reason of the last failure at each."""
        return "; ".join(f"{place}: {self._places[place.key][1]}" for place in places)

    def hopeless(self, task: Task) -> bool:
        """Whether an item failed often enough on workers that finished others, or broke devices that had worked."""
        counted = sum(worker.finished > 0 for worker in task.failures if not worker.retired)
        return counted >= self._tries(task) or task.strikes >= TRIES

    def exhausted(self, task: Task) -> bool:
        """Whether it failed often enough, though perhaps on workers that finish nothing."""
        return sum(not worker.retired for worker in task.failures) >= self._tries(task) or task.strikes >= TRIES

    def _tries(self, task: Task) -> int:
        if task.last is not None and task.last.invalid:
            return CONFIRMED if self.workers > 1 else 1
        return TRIES

    def fits(self, worker: WorkerState, task: Task) -> bool:
        """Whether a worker shall take a task: it did not fail it, and it finished others if the task is suspected."""
        if worker in task.failures or worker.place.key in task.broke:
            return False
        return worker.finished > 0 or not (task.broke or self.exhausted(task))


def _refuted(worker: WorkerState) -> str:
    """The reason to retire a worker whose failed items others finish, empty as long as there is none."""
    kinds = Counter(failed.device for failed in worker.recent.values())
    example = _first_line(worker.recent[next(iter(worker.refuted))].error)
    if kinds["out of memory"] == len(worker.recent) >= 2:
        return f"{devices.sentence('out of memory')}, for {len(worker.recent)} items in a row: {example}"
    if len(worker.refuted) >= REFUTED:
        return f"others finished {len(worker.refuted)} items that failed here in a row: {example}"
    return ""


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]
