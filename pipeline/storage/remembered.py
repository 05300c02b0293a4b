"""Remember reads of an object store. A command that only reads requests nothing twice then.

Inside `remember_reads` each object, listing, size and time is requested once. A write of this process, or
`forget_reads`, drops all that is remembered. Nothing is remembered of a disk, or after the block.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.storage.addresses import is_local

_T = TypeVar("_T")
_MOST_ANSWERS = 10_000
_MOST_BYTES = 64 << 10  # of an object; larger ones are manifests, which their readers keep
_answers: dict[tuple[str, str], Any] | None = None


@contextlib.contextmanager
def remember_reads() -> Iterator[None]:
    """Remember what is read from object stores inside the block. Not for commands that wait for others."""
    global _answers
    _answers = {}
    try:
        yield
    finally:
        _answers = None


def forget_reads() -> None:
    """Drop what is remembered: the next reads are new requests. A request that is under way is not remembered."""
    global _answers
    if _answers is not None:
        _answers = {}


@contextlib.contextmanager
def forget_after() -> Iterator[None]:
    """Drop what is remembered after a write, whether it succeeded or not."""
    try:
        yield
    finally:
        forget_reads()


def recall(question: str, url: str, ask: Callable[[], _T]) -> _T:
    """The answer of `ask`, or the remembered answer to the same question about `url`; also a FileNotFoundError."""
    answers = _answers  # another thread may drop it meanwhile
    if answers is None or is_local(url):
        return ask()
    if (question, url) in answers:
        answer = answers[question, url]
        if isinstance(answer, FileNotFoundError):
            error = answer.with_traceback(None)  # otherwise it grows each time
            raise error
        return answer
    try:
        answer = ask()
    except FileNotFoundError as error:
        _keep(answers, (question, url), error.with_traceback(None))
        raise
    _keep(answers, (question, url), answer)
    return answer


def _keep(answers: dict[tuple[str, str], Any], question: tuple[str, str], answer: Any) -> None:
    if len(answers) < _MOST_ANSWERS and not (isinstance(answer, bytes) and len(answer) > _MOST_BYTES):
        answers[question] = answer
