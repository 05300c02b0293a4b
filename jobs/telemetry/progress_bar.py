"""Progress for people: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from jobs.telemetry import logs
from pipeline.stages.progress import Tally

EVERY_S = 10.0
_log = logging.getLogger(__name__)


def watcher(name: str) -> Callable[[Tally], None]:
    """Show a tally whenever it changes: in rows where their number is known, in items otherwise."""
    bar: tqdm | None = None
    spoken = time.monotonic()

    def watch(tally: Tally) -> None:
        nonlocal bar, spoken
        now = tally.now
        done, total = (now["rows"], tally.rows) if tally.rows else (tally.done_items, tally.items)
        if sys.stderr.isatty() and logs.form() == "text":
            bar = bar or tqdm(total=total, initial=done, desc=name, unit="row" if tally.rows else "item")
            bar.set_postfix_str(_rest(now), refresh=False)
            bar.update(done - bar.n)
            if tally.done_items == tally.items:
                bar.close()
                bar = None  # more items may follow: rows that are tried again
        elif time.monotonic() - spoken > EVERY_S or tally.done_items == tally.items:
            spoken = time.monotonic()
            _log.info("%s: %s", name, sentence(now), extra={"fields": now})

    return watch


def sentence(now: dict[str, Any]) -> str:
    """What a tally says, in a line."""
    of = f" of {now['of_rows']}" if now["of_rows"] else ""
    again = f" ({now['retried']} tried again)" if now["retried"] else ""
    left = f", {span(now['seconds_left'])} left" if now["seconds_left"] and now["items"] < now["of_items"] else ""
    return (f"{now['items']} of {now['of_items']} items, {now['rows']}{of} rows{again}, "
            f"{now['rows_per_s']:.0f} rows/s, {_rest(now)}{left}")


def retired(workers: list[dict[str, Any]]) -> str:
    """A sentence on workers that were retired; empty if there are none."""
    if not workers:
        return ""
    last = workers[-1]
    where = f"{last['host']}" + (f", {last['card']}" if last["card"] else f", node {last['node'][:8]}")
    items = sum(one["items"] for one in workers)
    return (f"{len(workers)} worker{'s' * (len(workers) > 1)} retired after {items} failed item{'s' * (items != 1)}, "
            f"the last on {where}: {last['reason']}")


def computed_on(devices: dict[str, int]) -> str:
    """The devices and precisions of a stage, the most frequent first. Empty for stages without tensors."""
    names = [name for name in devices if name.rpartition(", ")[2] in {"fp32", "bf16", "fp16"}]
    return f"on {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") if names else ""


def _rest(now: dict[str, Any]) -> str:
    # Not samples: of a row there may be several.
    of = now["rows"] - now["retried"]
    good = of - sum(now["skipped"].values())
    share = f"{good / of:.1%} good, " if of else ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in list(now["skipped"].items())[:4])
    failed = f", {now['failed_items']} items failed" if now["failed_items"] else ""
    return f"{share}{now['bytes'] / 1e6:.0f} MB{failed}" + (f", left out: {reasons}" if reasons else "")


def span(seconds: float) -> str:
    """So many seconds, in the two units that matter."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
