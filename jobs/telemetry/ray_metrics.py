"""Progress as metrics of Ray, which exports them as `ray_rdm_...` with the labels of jobs.runs.labels.

The driver receives all records of its workers, so it reports a stage as one series, for any number of workers.
In a training run, rank 0 reports.
"""

import threading
from collections import Counter as Counts
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from jobs.runs.labels import NAMES
from pipeline import storage
from pipeline.stages.progress import Tally

_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
ITEM = "item failed"  # a reason besides those for which samples are left out


class Meter:
    """Counts a stage: its tally, and the times and retries of its items."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        self.tally: Tally | None = None
        self.counted: dict[str, Any] = {}

    def watch(self, tally: Tally) -> None:
        """Add the progress since the last call. The work of earlier runs does not count."""
        if tally is not self.tally:
            self.tally, self.counted = tally, tally.earlier | {"failed_items": 0}
        now = tally.now
        for name, what in _DONE.items():
            self._count(_counter(f"rdm_{name}_total", what), now[name] - self.counted[name])
        # A retried row is removed from its reason in the tally, but a counter must not decrease.
        for reason, count in (Counts(now["skipped"]) - Counts(self.counted["skipped"])).items():
            if reason not in tally.by_choice:
                self._fail(reason, count)
        self._fail(ITEM, now["failed_items"] - self.counted["failed_items"])
        # A worker may withdraw a report and repeat it. The maximum does not count it twice.
        self.counted = {name: max(now[name], self.counted[name]) for name in (*_DONE, "failed_items")} | {
            "skipped": Counts(now["skipped"]) | Counts(self.counted["skipped"])}
        _gauge("rdm_items_left", "Items that have no record yet.").set(
            now["of_items"] - now["items"], self.known)

    def items(self, queued: float, worked: list[float]) -> None:
        """Observe recorded items: seconds between assignment and start, and seconds of work on each."""
        _histogram("rdm_queue_seconds", "From the assignment to a worker until its work began: "
                                        "Ray's queue, and the setup of the stage.").observe(queued, self.known)
        for seconds in worked:
            _histogram("rdm_item_seconds", "Work on an item.").observe(seconds, self.known)

    def worker(self, seconds: float) -> None:
        """Observe the start of a worker: seconds from its request to its first answer."""
        _histogram("rdm_worker_wait_seconds", "From the request for a worker until it answered: the cluster's queue, "
                                              "and the start of a process.").observe(seconds, self.known)

    def workers(self, **counts: int) -> None:
        """Set the number of workers in each state."""
        for state, count in counts.items():
            _gauge("rdm_workers", "Workers by state.", "state").set(count, self.known | {"state": state})

    def again(self, reason: str) -> None:
        """Count the retry of an item."""
        _counter("rdm_retries_total", "Retries of items, by reason.", "reason").inc(
            1, self.known | {"reason": reason})

    def _fail(self, reason: str, count: int) -> None:
        self._count(_counter("rdm_failures_total", "Samples left out, by reason, and items that failed.", "reason"),
                    count, reason=storage.escape_controls(reason))

    def _count(self, counter: Counter, count: int, **more: str) -> None:
        if count > 0:
            counter.inc(count, self.known | more)


_DONE = {"samples": "Samples made.", "rows": "Rows of the source that were read.", "bytes": "Bytes written."}
_CURVE = {"loss": "Mean loss of the interval.", "grad_norm": "Norm of the gradient.", "lr": "Learning rate.",
          "data_wait": "Share of the time that training waited for data.", "mfu": "Share of the GPUs' operations used.",
          "tflops_per_s": "Operations a second, 10^12.", "memory_gb": "Most memory of a process, GB.",
          "world_size": "Processes."}


class Curve:
    """The log of a training run as metrics."""

    def __init__(self, known: dict[str, str], step: int, steps: int, batch: int) -> None:
        self.known, self.step, self.steps, self.batch = known, step, steps, batch
        self._last: dict[str, Any] = {}
        self._over = threading.Event()
        threading.Thread(target=self._repeat, daemon=True).start()

    def add(self, record: dict[str, Any]) -> None:
        """Add a record of the curve."""
        self._last = record
        self._say(record)
        if record["step"] > self.step:
            _counter("rdm_samples_total", _DONE["samples"]).inc((record["step"] - self.step) * self.batch, self.known)
        self.step = record["step"]

    def close(self) -> None:
        """Stop: the run ends here, or continues in another process."""
        self._over.set()

    def _repeat(self) -> None:
        # Ray drops a gauge that is not set for about twenty seconds, and a logging interval may be longer.
        while not self._over.wait(5.0):
            if last := self._last:
                self._say(last)

    def _say(self, record: dict[str, Any]) -> None:
        for name in _CURVE.keys() & record.keys():
            _gauge(f"rdm_train_{name}", _CURVE[name]).set(record[name], self.known)
        _gauge("rdm_train_step", "Updates done.").set(record["step"], self.known)
        _gauge("rdm_items_left", "Items that have no record yet.").set(self.steps - record["step"], self.known)


@cache
def _counter(name: str, what: str, *more: str) -> Counter:
    return Counter(name, what, (*NAMES, *more))


@cache
def _gauge(name: str, what: str, *more: str) -> Gauge:
    return Gauge(name, what, (*NAMES, *more))


@cache
def _histogram(name: str, what: str) -> Histogram:
    return Histogram(name, what, _SECONDS, NAMES)
