"""A check, and how several are run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.hardware.devices import DeviceUnavailable
from pipeline.stages.types import StageFailed

_FAILURES = (ValueError, OSError, MemoryError, StageFailed, DeviceUnavailable)


@dataclass(frozen=True)
class Check:
    """A condition of a command. `look` raises an error with a hint if the condition does not hold."""

    name: str
    look: Callable[[], Any]

    def failure(self) -> Exception | None:
        """The error that the check found, None if it found none."""
        try:
            self.look()
        except _FAILURES as error:
            return error
        return None


def run_checks(checks: Iterable[Check]) -> None:
    """Run all checks. Raises the error of the only one that fails, or a ValueError that lists those of several."""
    failures: dict[str, Exception] = {}
    texts = []
    for check in checks:
        error = check.failure()
        if error and str(error) not in failures:
            failures[str(error)] = error
            texts.append(f"{check.name}: {error}")
    if len(failures) == 1:
        raise next(iter(failures.values()))
    if failures:
        listed = "\n".join(f"{number}. {text}".replace("\n", "\n   ") for number, text in enumerate(texts, 1))
        raise ValueError(f"{len(failures)} checks failed, and nothing was started:\n{listed}")
