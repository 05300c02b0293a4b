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
from pipeline.stages.documents import check_more_items
from pipeline.stages.manifest import is_sealed, read_manifest
from pipeline.stages.plan import (
    claim_folder,
    claim_of,
    count_rows,
    hold_folder,
    item_ids,
    load_items,
    prepare,
    refuse_replaced_plan,
    replace_plan,
    write_more_items,
)
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
                if isinstance(record, Exception) and devices.is_unusable(record):
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
            except StageFailed:  # the driver's own, from `on_progress`
                raise
            except Exception as error:
                if devices.is_unusable(error):
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


class _Subset(Sequence[Item]):
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
    StageFailed if items failed, after all others were done, or if too many rows failed. StageFailed too if `overwrite`
    meets another command that works on the folder.
    """
    if check := getattr(runner, "check", None):
        check(stage, idle=not overwrite and is_sealed(stage))  # before anything is removed or planned
    if not overwrite and is_sealed(stage):
        claim_folder(stage)
        if manifest := _sealed_manifest(stage):
            return manifest
    with hold_folder(stage, exclusive=overwrite) as lease:
        if not overwrite:
            storage.remove_unfinished(stage.folder, lease.now(), below=True)  # of commands that were killed
        planned = overwrite and replace_plan(stage)
        lease.share()
        run = _Run(stage, planned=planned, retry=retry, max_failed=max_failed, watch=watch)
        if manifest := _sealed_manifest(stage):
            return manifest
        while items := run.next_items():
            for outcome in runner(stage, items):
                run.add(outcome)
            run.end_round()
        return run.seal()


def _sealed_manifest(stage: Stage) -> dict[str, Any] | None:
    """The manifest of a claimed folder. None if it is not sealed, or if a late driver sealed it under another plan."""
    manifest = read_manifest(stage.folder, stage.command) if is_sealed(stage) else None
    return manifest if manifest and manifest["fingerprint"] == claim_of(stage).fingerprint else None


def _retry_is_unfinished(stage: Stage, rounds: Sequence[str]) -> bool:
    """Whether the last retry of failed rows was interrupted. It is finished first, and no other begins."""
    if not rounds:
        return False
    url = storage.join(stage.folder, "more", rounds[-1])
    listed = check_more_items(storage.read_json(url), url)["items"]
    recorded = set(storage.list_files(storage.join(stage.folder, "records")))
    return any(f"{item_id}.json" not in recorded for item_id in item_ids(load_items(stage.folder, listed)))


class _Run:
    """One run of a driver: the items without a record, what became of them, and the seal."""

    def __init__(self, stage: Stage, *, planned: bool, retry: bool, max_failed: float,
                 watch: Callable[[Tally], None] | None) -> None:
        """Claim the folder. `planned`: this driver has written its plan just now."""
        self.stage, self.max_failed, self.watch = stage, max_failed, watch
        self.folder = storage.join(stage.folder, "failures")
        # Before the items: a driver that adds a round meanwhile has added ours.
        rounds = storage.list_files(storage.join(stage.folder, "more"))
        self.items, joined = claim_folder(stage)
        self.joined = joined and not planned
        self.retry, self.rounds = retry and not _retry_is_unfinished(stage, rounds), len(rounds)
        self.started = False
        self.failed: list[Outcome] = []
        self.reports: set[str] = set()  # of earlier runs

    def next_items(self) -> Sequence[Item]:
        """The items to run now: those without a record, and after them those of a retry of failed rows."""
        items: Sequence[Item] = () if self.started else self._missing_items()
        if not items and self.retry:
            self.retry = False
            added, self.joined = write_more_items(self.stage, self.stage.items_to_retry(self.items, self._records()),
                                                  self.rounds + 1)
            if added:
                self.items = prepare(self.stage)
                items = self._missing_items()
        if items:
            self.reports = set(storage.list_files(self.folder))
            self.stage.on_progress = self.look
        return items

    def _missing_items(self) -> Sequence[Item]:
        self.started, self.ids = True, item_ids(self.items)
        self.done = read_records(self.stage, self.ids)
        numbers = [number for number, item_id in enumerate(self.ids) if item_id not in self.done.ids]
        if self.joined:
            # Drivers on one folder share its work: each takes its own order, and steps back where it finds a record.
            random.shuffle(numbers)
        self.tally = Tally(self.stage.folder, len(self.ids), count_rows(self.stage, self.items),
                           self.stage.by_choice, self.done.ids)
        self.tally.start(self._records())
        self.ran = len(numbers)
        return _Subset(self.items, numbers)

    def _records(self) -> Sequence[dict[str, Any]]:
        return self.done.in_order(self.ids)

    def add(self, outcome: Outcome | Retired | None) -> None:
        """Count what a runner yields. StageFailed if the stage cannot continue."""
        if isinstance(outcome, Retired):
            self.tally.retire(asdict(outcome))
            self.tally.look()  # now, so that other terminals can show it
        elif outcome is not None:
            if outcome.full:
                raise StageFailed(f"{self.stage.name}: {outcome.error}\nhint: make room there (TMPDIR names the disk "
                                  f"of scratch, RDM_CACHE that of the cache); the same command continues from here")
            if outcome.record is None:
                self._fail(outcome)
            else:
                self._record(outcome.item, outcome.record)
        if self.tally.due():
            self.look()
        elif self.watch and self.tally.due(quick=True):
            self._show(self.watch)

    def look(self) -> None:
        """Count everything anew. StageFailed if too many rows failed."""
        self.tally.look()
        if over := self.tally.over(self.max_failed):
            raise StageFailed(f"{self.stage.name}: {over}\nhint: the same command continues when the cause is gone, "
                              f"and with --retry-failed tries the rows that failed again; a higher --max-failed "
                              f"continues all the same")
        if self.watch:
            self.watch(self.tally)

    def end_round(self) -> None:
        """Show the last count. StageFailed if an item failed."""
        self.stage.on_progress = None
        if self.watch and self.tally.now.get("items", len(self.ids) - self.ran) != self.tally.done_items:
            self._show(self.watch)
        if self.failed:
            self.tally.look()  # `status` shows how the driver has left the stage, also if it ran for a second only
            first = self.failed[0]
            error, _, hint = storage.redact_credentials(first.error).partition("\nhint: ")
            way = f"{hint}; then run the same command again" if hint else "run the same command again to retry them"
            raise StageFailed(f"{self.stage.name}: {len(self.failed)} of {len(self.ids)} items failed, the first is "
                              f"{first.item.id}: {error}; the tracebacks are in {self.folder}\nhint: {way}")

    def seal(self) -> dict[str, Any]:
        """Seal the folder, and return its manifest. StageFailed if too many rows failed."""
        if over := self.tally.over(self.max_failed, final=True):
            ledger = storage.join(self.stage.folder, "ledger")
            raise StageFailed(f"{self.stage.name}: {over}\nhint: {ledger} names each; --retry-failed tries these rows "
                              f"once more; a higher --max-failed seals what is there")
        for name in storage.list_files(self.folder):
            storage.remove(storage.join(self.folder, name))
        self.tally.clear()
        manifest = seal_stage(self.stage, self.items, self._records(), self.tally.retired)
        self.stage.after_seal()
        return manifest

    def _show(self, watch: Callable[[Tally], None]) -> None:
        self.tally.look(quick=True)
        watch(self.tally)

    def _record(self, item: Item, record: dict[str, Any]) -> None:
        if (report := f"{item.id}.json") in self.reports:
            storage.remove(storage.join(self.folder, report))
        self.done.add(record)
        self.tally.record(record, sum(file["bytes"] for file in record["files"]))

    def _fail(self, outcome: Outcome) -> None:
        refuse_replaced_plan(self.stage)  # the report would lie in the folder of another plan
        self.failed.append(outcome)
        self.tally.give_up(outcome.item.id)
        error, trace = map(storage.redact_credentials, (outcome.error, outcome.trace))
        _log.debug("%s: item %s failed: %s", self.stage.name, outcome.item.id, error,
                   extra={"fields": {"item": outcome.item.id}})
        storage.put_json({"id": outcome.item.id, "error": error, "traceback": trace},
                         storage.join(self.folder, f"{outcome.item.id}.json"))


def _tried(stage: Stage, item: Item, first: Callable[[], dict[str, Any]]) -> Outcome:
    """One item with retries in this process after the `first` try; a ValueError will not get better by another."""
    attempt = first
    for tries_left in reversed(range(_TRIES)):
        try:
            return Outcome(item, record=attempt())
        except StageFailed:  # the driver's own, from `on_progress`
            raise
        except Exception as error:
            full = storage.disk_full_message(error)
            if tries_left == 0 or full or isinstance(error, ValueError):
                return Outcome(item, error=error_sentence(error), trace=traceback.format_exc(), full=bool(full))
            attempt = partial(process_and_commit, stage, item)
    raise AssertionError
