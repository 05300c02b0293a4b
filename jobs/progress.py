"""Progress for people: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from pipeline.stage import Outcome

EVERY_S = 10.0
_log = logging.getLogger(__name__)


def watcher(name: str) -> Callable[[Iterable[Outcome], int, int], Iterator[Outcome]]:
    """Wrap a stream of outcomes with progress in items and samples."""

    def watch(outcomes: Iterable[Outcome], done: int, total: int) -> Iterator[Outcome]:
        started = spoken = time.monotonic()
        begun, samples, failed = done, 0, 0
        with tqdm(total=total, initial=done, desc=name, unit="item", disable=not sys.stderr.isatty()) as bar:
            for outcome in outcomes:
                done += 1
                samples += outcome.record["samples"] if outcome.record else 0
                failed += outcome.record is None
                now = time.monotonic()
                rate = samples / max(now - started, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} samples/s" + (f", {failed} failed" if failed else ""))
                bar.update(1)
                if bar.disable and (now - spoken > EVERY_S or done == total):
                    left = (total - done) * (now - started) / (done - begun)
                    _log.info("%s: %d of %d items, %.0f samples/s%s%s", name, done, total, rate,
                              f", {failed} failed" if failed else "", f", {left:.0f} s left" if done < total else "")
                    spoken = now
                yield outcome

    return watch
