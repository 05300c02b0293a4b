"""Process and commit one item, or several together."""

import contextlib
import json
import logging
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages import progress
from pipeline.stages.manifest import stale_inputs
from pipeline.stages.plan import claim_of, refuse_replaced_plan
from pipeline.stages.scratch import scratch_folder
from pipeline.stages.seal import read_record
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output, StageFailed, current_item
from pipeline.storage.hashing import describe_file

_log = logging.getLogger(__name__)
_INPUTS_COMPARED: set[tuple[str, str]] = set()  # folder and fingerprint of the plans that this process works on


def process_and_commit(stage: Stage, item: Item) -> dict[str, Any]:
    """Process and commit one item, and return its record. Runs in any process.

    Idempotent: a late duplicate of a worker that was given up finds the record and steps back.
    """
    return process_item(stage, item)()


def process_item(stage: Stage, item: Item) -> Callable[[], dict[str, Any]]:
    """Process one item. Returns a function that commits it and returns its record: call it once, in any thread."""
    address = storage.join(stage.folder, "records", f"{item.id}.json")
    plan = _begin(stage)
    if earlier := read_record(stage, address):
        return lambda: earlier
    started = time.time()
    stage.report_progress = progress.ProgressReporter(stage.folder, item.id, stage.on_progress,
                                                      again="round" in item.inputs)
    with _current(stage, item), contextlib.ExitStack() as stack:
        stack.callback(stage.report_progress.done)
        scratch = stack.enter_context(scratch_folder(f"{stage.name}-{item.id}"))
        output = stage.process(item, scratch)
        held = stack.pop_all()

    def commit() -> dict[str, Any]:
        with _current(stage, item), held:
            record = _commit(stage, item, output, scratch, plan, started)
            _log_record(stage, item, record)
            return record

    return commit


def work_together(stage: Stage, items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any] | Exception | None]]:
    """Process several items together and commit them one by one.

    A failed item comes with its exception, or with None if another item's exception ended them all: try it alone.
    """
    plan = _begin(stage)
    there = {item.id: read_record(stage, storage.join(stage.folder, "records", f"{item.id}.json")) for item in items}
    yield from ((item, there[item.id]) for item in items if there[item.id])
    new = [item for item in items if not there[item.id]]
    with contextlib.ExitStack() as stack:
        work = [(item, stack.enter_context(scratch_folder(f"{stage.name}-{item.id}"))) for item in new]
        outputs = stack.enter_context(contextlib.closing(stage.process_together(work)))
        for item, scratch in work:
            started = time.time()
            stage.report_progress = progress.ProgressReporter(stage.folder, item.id, stage.on_progress)
            record: dict[str, Any] | Exception | None = None
            try:
                output = next(outputs, None)  # none is left if one error ended all of them
                if isinstance(output, Exception):
                    raise output
                if output:
                    with _current(stage, item):
                        record = committed = _commit(stage, item, output, scratch, plan, started)
                        _log_record(stage, item, committed)
            except StageFailed:  # the driver's own, from `on_progress`
                raise
            except Exception as error:
                record = error
                _log.warning("%s: %s failed among others and is tried alone: %s", stage.name, item.id,
                             error_sentence(error))
            finally:
                stage.report_progress.done()
            yield item, record


def _begin(stage: Stage) -> str:
    """The fingerprint of the plan that a stage works on; ValueError if an input changed before this worker began.

    Inputs are compared once in each process. The seal compares them again.
    """
    claim = claim_of(stage)
    if (stage.folder, claim.fingerprint) not in _INPUTS_COMPARED:
        if stale := stale_inputs(stage, claim):
            raise ValueError(stale)
        _INPUTS_COMPARED.add((stage.folder, claim.fingerprint))
    return claim.fingerprint


@contextlib.contextmanager
def _current(stage: Stage, item: Item) -> Iterator[None]:
    token = current_item.set((stage.path, stage.name, item.id))
    try:
        yield
    finally:
        current_item.reset(token)


def _log_record(stage: Stage, item: Item, record: dict[str, Any]) -> None:
    _log.debug("%s: item %s is recorded: %d samples", stage.name, item.id, record["samples"], extra={"fields": {
        "samples": record["samples"], "skipped": record["skipped"], "seconds": record["run"]["seconds"]}})


def _commit(stage: Stage, item: Item, output: Output, scratch: Path, plan: str, started: float) -> dict[str, Any]:
    address = storage.join(stage.folder, "records", f"{item.id}.json")
    if output.ledger:
        ledger = scratch / "ledger.jsonl"
        ledger.write_text("".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in output.ledger))
        output.files[f"ledger/{item.id}.jsonl"] = ledger
    described = sorted([*(describe_file(name, path) for name, path in output.files.items()), *output.external_files],
                       key=lambda file: file["name"])
    skipped, noted = output.counts or (_count_reasons(entry for entry in output.ledger if not entry.kept),
                                        _count_reasons(entry for entry in output.ledger if entry.kept))
    if output.earlier_skipped:
        net = Counter(skipped)
        net.subtract(output.earlier_skipped)
        skipped = {reason: count for reason, count in sorted(net.items()) if count}
    record: dict[str, Any] = {
        "id": item.id, "plan": plan, "samples": output.samples, "files": described,
        "skipped": skipped, "noted": noted,
        "info": output.info,
    }
    if earlier := read_record(stage, address):
        return earlier
    for name, path in sorted(output.files.items()):
        storage.put_checked(path, storage.join(stage.folder, name), partial(refuse_replaced_plan, stage),
                            give=path.is_relative_to(scratch))
    refuse_replaced_plan(stage)
    for name, data in sorted(output.run_files.items()):
        storage.put_bytes(data, storage.join(stage.folder, name))
    # The peak since the process started, other items included: a machine must have this much.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record["run"] = {"seconds": round(time.time() - started, 3), "host": platform.node(), "peak_mb": round(peak),
                     "device": stage.device or devices.describe_device(stage.precision)}
    if output.times:
        record["run"]["times"] = {name: round(value, 3) if isinstance(value, float) else value
                                  for name, value in sorted(output.times.items())}
    if not storage.create_bytes(storage.json_bytes(record), address):
        if earlier := read_record(stage, address):
            _refuse_other_files(stage, record, earlier)
            return earlier
        refuse_replaced_plan(stage)  # a record of another plan, one of the two is late; or a damaged one
        storage.put_json(record, address)
    return record


def _refuse_other_files(stage: Stage, record: dict[str, Any], earlier: dict[str, Any]) -> None:
    """StageFailed if another worker recorded the same item with other files, which this one has replaced just now."""
    if record["files"] != earlier["files"]:
        names = ", ".join(file["name"] for file in record["files"] if file not in earlier["files"])
        raise StageFailed(f"{stage.name}: two workers made item {record['id']} with different files "
                          f"({names})\nhint: {stage.replacement}, once no other command works on "
                          f"this folder")


def error_sentence(error: BaseException) -> str:
    """The message that a report gives for the error of an item."""
    if full := storage.disk_full_message(error):
        return full
    kind = type(error).__name__
    text = (str(error) or kind) if isinstance(error, ValueError) else f"{kind}: {error}"
    explained = devices.failure_hint(error)
    return text if "hint:" in text or not explained else f"{text.splitlines()[0]}\n{explained}"


def _count_reasons(entries: Iterable[Entry]) -> dict[str, int]:
    return dict(sorted(Counter(entry.reason for entry in entries).items()))
