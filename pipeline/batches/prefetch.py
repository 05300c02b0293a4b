"""Numbered things that are opened in the background, before they are asked for."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Ahead(Generic[_T]):
    """`open_` of those numbers that are wanted, in a few threads; what is not wanted any more is forgotten.

    To be asked by one thread. What could not be opened is tried again when it is asked for.
    """

    def __init__(self, open_: Callable[[int], _T], threads: int = 4) -> None:
        self._opened: dict[int, Future[_T]] = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(threads):
            # Not those of a pool: at the end of the program they would finish all downloads that are waiting.
            threading.Thread(target=_work, args=(self._jobs, open_), daemon=True).start()
        weakref.finalize(self, _end, self._jobs, threads)

    def want(self, numbers: Iterable[int]) -> None:
        """Open these, the first first, unless they are open, and forget all others."""
        before, self._opened = self._opened, {}
        for number in numbers:
            self._opened[number] = before.pop(number, None) or self._submitted(number)
        for future in before.values():
            future.cancel()

    def __getitem__(self, number: int) -> _T:
        """What was opened under a number, or is now; what opening it raises."""
        future = self._opened.get(number)
        if future is None or (future.done() and future.exception() is not None):
            future = self._opened[number] = self._submitted(number)
        return future.result()

    def _submitted(self, number: int) -> "Future[_T]":
        future: Future[_T] = Future()
        self._jobs.put((future, number))
        return future


def _work(jobs: queue.SimpleQueue, open_: Callable[[int], _T]) -> None:
    while (job := jobs.get()) is not None:
        future, number = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(open_(number))
            except Exception as error:
                future.set_exception(error)
        del job, future  # or what it opened stays open until the next job comes


def _end(jobs: queue.SimpleQueue, threads: int) -> None:
    """Let the threads end, without what is still waiting."""
    with contextlib.suppress(queue.Empty):  # a thread may be quicker
        while True:
            jobs.get_nowait()[0].cancel()
    for _ in range(threads):
        jobs.put(None)
