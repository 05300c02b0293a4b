"""Open numbered files in the background before they are needed."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Prefetcher(Generic[_T]):
    """Calls `open_number` for the wanted numbers in a few threads, and forgets those that are not wanted any more.

    For one calling thread. After an error, the next access tries again.
    """

    def __init__(self, open_number: Callable[[int], _T], threads: int = 4) -> None:
        self._opened: dict[int, Future[_T]] = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(threads):
            # Not a thread pool: at the end of the program it would finish all waiting downloads.
            threading.Thread(target=_run_jobs, args=(self._jobs, open_number), daemon=True).start()
        weakref.finalize(self, _stop_threads, self._jobs, threads)

    def want(self, numbers: Iterable[int]) -> None:
        """Open these in this order unless they are open, and forget all others."""
        before, self._opened = self._opened, {}
        for number in numbers:
            self._opened[number] = before.pop(number) if number in before else self._submit(number)
        for future in before.values():
            future.cancel()

    def __getitem__(self, number: int) -> _T:
        """The open file of a number. Opens it if needed, and raises its error."""
        future = self._opened.get(number)
        if future is None or (future.done() and future.exception() is not None):
            future = self._opened[number] = self._submit(number)
        return future.result()

    def _submit(self, number: int) -> "Future[_T]":
        future: Future[_T] = Future()
        self._jobs.put((future, number))
        return future


def _run_jobs(jobs: queue.SimpleQueue, open_number: Callable[[int], _T]) -> None:
    while (job := jobs.get()) is not None:
        future, number = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(open_number(number))
            except Exception as error:
                future.set_exception(error)
        del job, future  # otherwise the opened file stays open until the next job


def _stop_threads(jobs: queue.SimpleQueue, threads: int) -> None:
    """End the threads and drop all waiting jobs."""
    with contextlib.suppress(queue.Empty):  # a thread may have taken the last job
        while True:
            jobs.get_nowait()[0].cancel()
    for _ in range(threads):
        jobs.put(None)
