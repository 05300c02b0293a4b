"""A tracker whose calls run in a separate thread, so that no training step waits for a disk or a server."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from jobs.telemetry.trackers.subject import Images, State, Subject
from pipeline import storage

_log = logging.getLogger(__name__)
_AT_ONCE = 100
"""Records that are reported together when many wait."""
_CLOSE_SECONDS = 60.0
"""The longest that a command waits at its end for a tracker."""

Record = tuple[dict[str, Any], Images]


class BackgroundTracker(ABC):
    """Reports records in order. Records that fail stay in the queue, and the next checkpoint retries them.

    A failure is logged once. Records that are still waiting at the end are counted in one more line.
    """

    name: str

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.is_open = False
        self._waiting: deque[Record] = deque()
        self._failure = ""
        self._is_named = False
        self._thread = ThreadPoolExecutor(1, self.name)

    @abstractmethod
    def open(self) -> None:
        """Start the session, or continue the one that the subject had."""

    @abstractmethod
    def report(self, records: list[Record]) -> None:
        """Report the numbers and images of records, which are in the order of their steps."""

    @abstractmethod
    def flush(self) -> None:
        """Bring everything reported so far to the disk or the server."""

    @abstractmethod
    def finish(self, summary: dict[str, Any], state: State, *, complete: bool) -> None:
        """End the session. `complete`: no record was lost."""

    def add(self, record: dict[str, Any], images: Images | None = None, *, hold: bool = False) -> None:
        """Report a record. `hold` has no effect: a resumed session knows which steps were reported."""
        self._waiting.append((record, images or {}))
        if not self._failure:
            self._thread.submit(self._try_waiting)

    def saved(self) -> None:
        """Bring all records so far to the disk or the server, also after an earlier failure."""
        self._thread.submit(self._try_waiting, flush=True)

    def replay(self, records: Iterable[Record]) -> None:
        """Put the records of earlier sessions first."""
        self._waiting.extend(records)
        self._thread.submit(self._try_waiting)

    def close(self, summary: dict[str, Any] | None = None, state: State = "finished") -> None:
        """End the session, and say what did not reach the tracker."""
        _, unfinished = wait([self._thread.submit(self._end, summary or {}, state)], _CLOSE_SECONDS)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._waiting or unfinished:
            _log.warning("%s: %d records of %s were not tracked: %s. A resumed training run reports them again.",
                         self.name, len(self._waiting), self.subject.title,
                         self._failure or f"no answer within {_CLOSE_SECONDS:.0f} s")

    def _end(self, summary: dict[str, Any], state: State) -> None:
        self._try_waiting(flush=True)
        try:
            if self.is_open:
                self.finish(summary, state, complete=not self._waiting)
        except Exception as error:
            self._fail(error)

    def _try_waiting(self, *, flush: bool = False) -> None:
        try:
            if not self.is_open and self._waiting:
                self.open()
                self.is_open = True
            while self._waiting:
                records = [self._waiting[number] for number in range(min(_AT_ONCE, len(self._waiting)))]
                self.report(records)
                for _ in records:
                    self._waiting.popleft()
            if flush and self.is_open:
                self.flush()
            self._failure = ""
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        text = storage.redact_credentials(storage.first_line(error))
        if not self._is_named:
            _log.warning("%s does not take records of %s: %s. Training and stages continue, and the records wait.",
                         self.name, self.subject.title, text)
        self._failure, self._is_named = text, True


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record without its step."""
    return {key: float(value) for key, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"}
