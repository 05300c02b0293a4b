"""Seconds that a process spends on each kind of work."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")


@dataclass
class Times:
    """Seconds by kind of work, all threads together."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = field(default_factory=time.process_time)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count the time of a `with` block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - started)

    def add(self, what: str, seconds: float) -> None:
        """Count these seconds too."""
        with self.lock:
            self.seconds[what] += seconds

    def each(self, what: str, values: Iterable[_T]) -> Iterator[_T]:
        """The values one by one; counts the time until each is there."""
        iterator = iter(values)
        while True:
            with self(what):
                value = next(iterator, None)
            if value is None:
                return
            yield value

    def pop_seconds(self) -> dict[str, float]:
        """The seconds since the last call, with those of the CPU that this process used as `cpu`."""
        with self.lock:
            now = time.process_time()
            seconds = dict(self.seconds) | {"cpu": now - self.used}
            self.seconds, self.used = defaultdict(float), now
        return seconds
