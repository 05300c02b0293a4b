"""Run all items of a stage that have no record, then seal it."""

import logging
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages import records
from pipeline.stages.manifest import is_sealed, read_manifest
from pipeline.stages.plan import check_and_clear, claim_folder, item_ids, load_items, prepare, write_item_list
from pipeline.stages.progress import Tally
from pipeline.stages.seal import read_records, seal_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Outcome, Retired, StageFailed
from pipeline.stages.worker import error_sentence, process_and_commit, process_item, work_together

_log = logging.getLogger(__name__)
_TRIES = 3


Runner = Callable[[Stage, Sequence[Item]], Iterator[Outcome | Retired | None]]
"""Yields the outcome of every item, in any order, each worker that it retires, and None now and then when nothing
happens."""


def run_in_process(stage: Stage, items: Sequence[Item]) -> Iterator[Outcome | None]:
    """The runner without a cluster: one item after another in this process, each committed while the next is made."""
    stage.setup()
    if (size := stage.together()) > 1:
        for start in range(0, len(items), size):
            for item, record in work_together(stage, items[start:start + size]):
                if isinstance(record, Exception) and devices.unusable(record):
                    raise record  # this process cannot compute any other item either
                yield (Outcome(item, record) if isinstance(record, dict) else
                       _tried(stage, item, partial(process_and_commit, stage, item)))
        return
    with ThreadPoolExecutor(1, "commit") as committer:
        before: tuple[Item, Future[dict[str, Any]]] | None = None
        for item in items:
            going, failed = None, None
            try:
                going = item, committer.submit(process_item(stage, item))
            except StageFailed:  # the driver's own, heard in the middle of an item
                raise
            except Exception as error:
                if devices.unusable(error):
                    raise  # this process cannot compute any other item either
                failed = partial(_raise, error)
            if before:
                yield _tried(stage, before[0], before[1].result)
            if failed:
                yield _tried(stage, item, failed)
            before = going
        if before:
            yield _tried(stage, before[0], before[1].result)


def _raise(error: Exception) -> Any:
    raise error


class _Left(Sequence[Item]):
    """Some of a sequence's items, by their numbers."""

    def __init__(self, items: Sequence[Item], numbers: Sequence[int]) -> None:
        self._items, self._numbers = items, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._items[number] for number in self._numbers[index]]
        return self._items[self._numbers[index]]


def run_stage(stage: Stage, runner: Runner = run_in_process, *, overwrite: bool = False, retry: bool = False,
        max_failed: float = 1.0, watch: Callable[[Tally], None] | None = None) -> dict[str, Any]:
    """Bring `stage` to its sealed state with `runner`, and return its manifest.

    Runs whatever has no record yet; nothing if the folder is sealed. `overwrite` empties the folder
    first. `retry` tries the rows that failed once more before sealing. `max_failed` is the share of
    rows that may fail. `watch` is shown the tally whenever it changes.
    StageFailed if items failed, after all others were done, or if too many rows failed.
    """
    if check := getattr(runner, "check", None):
        check(stage, idle=not overwrite and is_sealed(stage))  # before anything is removed or planned
    if overwrite:
        check_and_clear(stage)
    more = storage.join(stage.folder, "more")
    rounds = storage.list_files(more)  # before the items: whoever adds a round meanwhile has added ours
    items, joined = claim_folder(stage)
    if is_sealed(stage):
        return read_manifest(stage.folder, stage.command)
    retry = retry and not _under_way(stage, rounds)
    done, tally = _work_off(stage, runner, items, joined, max_failed, watch)
    if retry:
        number = len(rounds) + 1
        listed = write_item_list(stage, stage.again(items, done), f"more-{number:04d}")
        if records.count(listed):
            joined = not storage.create_bytes(storage.json_bytes({"items": listed}),
                                              storage.join(more, f"{number:04d}.json"))
            items = prepare(stage)
            done, tally = _work_off(stage, runner, items, joined, max_failed, watch)
    if over := tally.over(max_failed, final=True):
        raise StageFailed(f"{stage.name}: {over}\nhint: --retry-failed tries these rows once more; a higher "
                          f"--max-failed seals what is there")
    for name in storage.list_files(storage.join(stage.folder, "failures")):
        storage.remove(storage.join(stage.folder, "failures", name))
    tally.clear()
    return seal_stage(stage, items, done, tally.retired)


def _under_way(stage: Stage, rounds: Sequence[str]) -> bool:
    """Whether the last try at rows that failed was cut off, so that it is to be ended and no other begun."""
    if not rounds:
        return False
    listed = storage.read_json(storage.join(stage.folder, "more", rounds[-1]))["items"]
    there = set(storage.list_files(storage.join(stage.folder, "records")))
    return any(f"{one}.json" not in there for one in item_ids(load_items(stage.folder, listed)))


def _work_off(stage: Stage, runner: Runner, items: Sequence[Item], joined: bool, max_failed: float,
              watch: Callable[[Tally], None] | None) -> tuple[Sequence[dict[str, Any]], Tally]:
    """Run every item that has no record; the records of all, in order, and what they add up to."""
    ids = item_ids(items)
    done = read_records(stage, ids)
    numbers = [number for number, one in enumerate(ids) if one not in done.ids]
    if joined:
        # Drivers on one folder share its work: each goes its own way, and steps back where it finds a record.
        random.shuffle(numbers)
    tally = Tally(stage.folder, len(ids), sum(map(stage.rows, items)), stage.by_choice, done.ids)
    before = done.in_order(ids)
    tally.start(before)
    if not numbers:
        return before, tally
    del before

    def look() -> None:
        tally.look()
        if (over := tally.over(max_failed)):
            raise StageFailed(f"{stage.name}: {over}\nhint: the same command goes on when the cause is gone, and with "
                              f"--retry-failed tries the rows that failed again; a higher --max-failed goes on all the "
                              f"same")
        if watch:
            watch(tally)

    stage.heard = look
    failures = set(storage.list_files(storage.join(stage.folder, "failures")))
    failed = []
    for outcome in runner(stage, _Left(items, numbers)):
        if isinstance(outcome, Retired):
            tally.retire(asdict(outcome))
            tally.look()  # now, so that other terminals can show it
        elif outcome is not None:
            address = storage.join(stage.folder, "failures", f"{outcome.item.id}.json")
            if outcome.full:
                raise StageFailed(f"{stage.name}: {outcome.error}\nhint: make room there (scratch is where TMPDIR "
                                  f"says); the same command goes on from here")
            if outcome.record is None:
                failed.append(outcome)
                tally.give_up(outcome.item.id)
                _log.debug("%s: item %s failed: %s", stage.name, outcome.item.id,
                           storage.redact_credentials(outcome.error), extra={"fields": {"item": outcome.item.id}})
                storage.put_json({"id": outcome.item.id, "error": storage.redact_credentials(outcome.error),
                                  "traceback": storage.redact_credentials(outcome.trace)}, address)
            else:
                if f"{outcome.item.id}.json" in failures:
                    storage.remove(address)
                done.add(outcome.record)
                tally.record(outcome.record, sum(file["bytes"] for file in outcome.record["files"]))
        if tally.due():
            look()
        elif watch and tally.due(quick=True):
            tally.look(quick=True)
            watch(tally)
    stage.heard = None
    if watch and tally.now.get("items", len(ids) - len(numbers)) != tally.done_items:
        tally.look(quick=True)
        watch(tally)
    if failed:
        first = failed[0]
        raise StageFailed(f"{stage.name}: {len(failed)} of {len(ids)} items failed, the first is {first.item.id}: "
                          f"{storage.redact_credentials(first.error)}\nhint: the tracebacks are in "
                          f"{storage.join(stage.folder, 'failures')}; run the same command again to retry them")
    return done.in_order(ids), tally


def _tried(stage: Stage, item: Item, first: Callable[[], dict[str, Any]]) -> Outcome:
    """One item with retries in this process after the `first` try; a ValueError will not get better by another."""
    attempt = first
    for left in reversed(range(_TRIES)):
        try:
            return Outcome(item, record=attempt())
        except StageFailed:  # the driver's own, heard in the middle of an item
            raise
        except Exception as error:
            full = storage.disk_full_message(error)
            if left == 0 or full or isinstance(error, ValueError):
                return Outcome(item, error=error_sentence(error), trace=traceback.format_exc(), full=bool(full))
            attempt = partial(process_and_commit, stage, item)
    raise AssertionError
