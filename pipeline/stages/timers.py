"""How long a process takes for this and that."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")


@dataclass
class Times:
    """Seconds spent with this and that, all threads together; `cpu`: what this process used meanwhile."""

    seconds: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = field(default_factory=time.process_time)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count the time inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - started)

    def add(self, what: str, seconds: float) -> None:
        """Count these too."""
        with self.lock:
            self.seconds[what] += seconds

    def each(self, what: str, made: Iterable[_T]) -> Iterator[_T]:
        """What is made one by one, the making counted."""
        made = iter(made)
        while True:
            with self(what):
                one = next(made, None)
            if one is None:
                return
            yield one

    def taken(self) -> dict[str, float]:
        """What was spent since the last time this was asked."""
        with self.lock:
            now = time.process_time()
            found, self.seconds = dict(self.seconds) | {"cpu": now - self.used}, Counter()
            self.used = now
        return found
