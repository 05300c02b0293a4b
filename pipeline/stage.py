"""One stage, one shape: plan, process, commit, seal; resumed by running it again.

On disk a stage is a folder:

    plan.json            fingerprint, settings, inputs and items, written before work starts
    records/<item>.json  one per finished item: its files with bytes and sha256, counts, seconds
    ledger/<item>.jsonl  samples left out or remarked on, with key and reason (only where there are any)
    failures/<item>.json the last traceback of an item that failed, gone once it succeeds
    more/<n>.json        items added after the plan: another try for rows that failed
    progress.json        how far it is, while it is under way
    manifest.json        every record together, written last: a folder without it is not finished

Lists of more than a thousand items or records stand in a parquet file beside plan.json and manifest.json.
"""

import bisect
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import platform
import random
import resource
import shutil
import subprocess
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline import progress, records, storage
from pipeline.hardware import devices
from pipeline.progress import Tally
from pipeline.records import content, totals

if TYPE_CHECKING:
    from pipeline.decoding import Elsewhere

_log = logging.getLogger(__name__)
FORMAT = 2
_MANIFEST_KEYS = {"stage", "content", "items", "files"}  # those of a checkpoint's manifest too
_PLAN_KEYS = {"format", "stage", "fingerprint", "section", "inputs", "items"}
_ALIVE = ".alive"  # locked in a scratch folder as long as its process lives
_TRIES = 3
_AT_ONCE = 5000  # records in memory as dicts

in_hand: ContextVar[tuple[str, str, str] | None] = ContextVar("in_hand", default=None)
"""(folder below the root, stage, item) that is worked on here, for the log."""


@dataclass(frozen=True)
class Item:
    """One unit of work: an id and the names of its inputs, never data."""

    id: str
    inputs: dict[str, Any] = field(default_factory=dict)
    carries: tuple[tuple[str, bytes], ...] = field(default=(), compare=False)
    """Small files that go beside the plan before the item is planned, as (name, bytes); not kept in it."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: what was wrong with the sample `key`, and whether it was kept all the same."""

    key: str
    reason: str
    detail: str = ""
    kept: bool = False


@dataclass
class Output:
    """What `process` made: local files under their names in the stage folder, and counts."""

    samples: int = 0
    files: dict[str, Path] = field(default_factory=dict)
    ledger: list[Entry] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    aside: dict[str, bytes] = field(default_factory=dict)
    """Files that differ from run to run (times): put in place, and not part of the content."""
    mended: dict[str, int] = field(default_factory=dict)
    """What was skipped by earlier tries at the same rows: this one counts in their place."""
    counted: tuple[dict[str, int], dict[str, int]] | None = None
    """(skipped, noted) of a ledger that is among the files already."""
    times: dict[str, Any] = field(default_factory=dict)
    """Seconds by what they were spent with, and what else is known of the run and not part of the content."""
    elsewhere: list[dict[str, Any]] = field(default_factory=list)
    """Files described (name, bytes, sha256) that lie where they are; their names are whole addresses."""


@dataclass
class Outcome:
    """What became of one item: its record, or the error of its last try."""

    item: Item
    record: dict[str, Any] | None = None
    error: str = ""
    trace: str = ""
    full: bool = False
    """Whether a disk was full: no other item will fare better."""


@dataclass(frozen=True)
class Retired:
    """A worker that its runner gave up, and why; part of progress.json and of a manifest's `run`."""

    host: str
    node: str
    """The cluster's id of the node."""
    card: str
    """Name, UUID and CUDA_VISIBLE_DEVICES of its GPU; empty without one."""
    reason: str
    items: int
    """How many items failed on it."""
    replaced: bool
    """Whether a new worker may start in its place."""
    time: float
    """Unix time."""


class StageFailed(RuntimeError):
    """Some items failed for good; the rest is done and recorded, the stage is not sealed."""


class Stage(ABC):
    """A step from sealed folders to another; holds its settings and where it writes, nothing else.

    Subclasses add `plan`, `process` and, where needed, `setup` (once per worker) and `finish`
    (once, on the driver, when every record is there).
    """

    name: ClassVar[str]
    workers_need_gpu: ClassVar[bool] = False
    most_gpus: ClassVar[int] = 1  # that one worker can use
    shares_gpus: ClassVar[bool] = True  # whether two workers may have parts of one GPU
    precision = ""  # of its tensors, for records; known once a worker is set up
    device = ""  # for records, if the work was done by other processes
    by_choice: ClassVar[frozenset[str]] = frozenset()  # reasons that settings ask for: no failures
    decodes: ClassVar[bool] = False  # whether others can decode pictures for it
    decode: "Elsewhere | None" = None  # they, in a worker that somebody lends them to

    def __init__(self, root: str, folder: str, config: Any) -> None:
        self.root = storage.normal(root)
        self.path = folder
        self.folder = storage.join(self.root, folder)
        self.config = config
        self.heard: Callable[[], None] | None = None  # called at each word of a worker in this process
        self.beat = progress.Beat(self.folder, "")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"heard": None}

    @property
    def command(self) -> str:
        """The command line that would finish this stage, for hints."""
        return f"python -m jobs {self.name}"

    @property
    def elsewhere(self) -> str:
        """How to keep what is there and still get what is wanted, for hints."""
        return "write to another version (name@v2)"

    def section(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON."""
        assert is_dataclass(self.config)
        return json.loads(json.dumps(asdict(self.config)))

    def inputs(self) -> dict[str, dict[str, Any]]:
        """What the stage reads: name -> {"path": stage folder below the root or "", "digest": ...}."""
        return {}

    @abstractmethod
    def plan(self) -> Iterable[Item]:
        """The items, the same for the same inputs; runs on the driver and writes nothing.

        They are taken one by one, so a long list of files that they carry need not be in memory at once.
        """

    def rows(self, item: Item) -> int:
        """How many rows an item is about, 0 where that is not known; for progress."""
        return int(item.inputs.get("count", 0))

    def again(self, items: Sequence[Item], done: Sequence[dict[str, Any]]) -> Iterable[Item]:
        """More items, for another try at the rows that failed in the `done` records of `items`."""
        raise ValueError(f"{self.name} cannot try failed rows again")

    def setup(self) -> None:  # noqa: B027 (most stages load nothing)
        """Load what every item needs, once per worker."""

    @abstractmethod
    def process(self, item: Item, scratch: Path) -> Output:
        """Make the files of one item below the folder `scratch`."""

    def check_device(self) -> None:
        """DeviceUnavailable if this process reserved a GPU for the stage and cannot use it."""
        if self.workers_need_gpu:
            devices.choose()

    def together(self, gpu: bool | None = None) -> int:
        """How many items a worker takes at once, where that saves it work; `gpu`: workers have one, None: look here."""
        return 1

    def process_together(self, work: Sequence[tuple[Item, Path]]) -> Iterator[Output | Exception]:
        """`process` for each of several items with its folder, in order; what it raises comes in its place."""
        for item, scratch in work:
            try:
                output: Output | Exception = self.process(item, scratch)
            except StageFailed:  # the driver's own, heard in the middle of an item
                raise
            except Exception as error:
                output = error
            yield output

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        """Files and facts that need all items, for the manifest."""
        return Output()


def fingerprint(stage: Stage, inputs: dict[str, dict[str, Any]] | None = None) -> str:
    """Hash of format version, stage name, settings and inputs: who may write into a folder."""
    return digest([FORMAT, stage.name, stage.section(), inputs if inputs is not None else stage.inputs()])


def manifest_of(folder: str, command: str, sha256: str | None = None) -> dict[str, Any]:
    """The manifest of a sealed stage folder; ValueError with the `command` that would finish it.

    ValueError too if its bytes are not those of `sha256`, the hash under which it was published.
    """
    try:
        data = storage.read_bytes(storage.join(folder, "manifest.json"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not sealed: it has no manifest.json\nhint: {command}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{folder}/manifest.json is not the one that was published: somebody changed this version\n"
                         f"hint: python -m jobs verify --against current tells what else; rollback to another version")
    manifest = storage.json_of(data, storage.join(folder, "manifest.json"))
    if not isinstance(manifest, dict) or not manifest.keys() >= _MANIFEST_KEYS:
        raise ValueError(f"{folder}/manifest.json is damaged\nhint: python -m jobs verify tells what else is")
    if isinstance(manifest["items"], dict):
        manifest["items"] = records.load(folder, manifest["items"], records.records)
    return manifest


def changed_inputs(root: str, document: dict[str, Any]) -> list[str]:
    """Names of the inputs of a plan or manifest whose folder holds other content than when it was planned."""
    changed = []
    for name, one in document.get("inputs", {}).items():
        if one["path"]:
            try:
                now = storage.read_json(storage.join(root, one["path"], "manifest.json"))
            except FileNotFoundError:
                # A published version that was removed for its age did not change: its release stays to say so.
                if storage.exists(storage.join(root, one["path"].rpartition("/")[0], "release.json")):
                    continue
                now = None
            except ValueError:
                now = None
            if not isinstance(now, dict) or now.get("content") != one["digest"]:
                changed.append(name)
    return changed


def timeless(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its `run` parts (seconds, hosts, dates): equal for equal results."""
    bare = {key: value for key, value in manifest.items() if key != "run"}
    bare["items"] = [{key: value for key, value in record.items() if key != "run"} for record in manifest["items"]]
    return bare


def is_sealed(stage: Stage) -> bool:
    """Whether the folder of `stage` is finished."""
    return storage.exists(storage.join(stage.folder, "manifest.json"))


def prepare(stage: Stage) -> Sequence[Item]:
    """Claim the folder of `stage`: write plan.json, or find that the one there is ours.

    ValueError naming the field that differs where the folder is claimed by other settings or inputs.
    """
    return _claim(stage)[0]


def _claim(stage: Stage) -> tuple[Sequence[Item], bool]:
    """The items of a folder that is ours now, and whether it was before, or another driver came first."""
    inputs = stage.inputs()
    print_ = fingerprint(stage, inputs)
    address = storage.join(stage.folder, "plan.json")
    joined = storage.exists(address)
    if not joined:
        listed = _list(stage, stage.plan(), "items")
        if not records.count(listed):
            raise ValueError(f"{stage.name}: nothing to do: the inputs of {stage.folder} are empty")
        joined = not storage.create_bytes(storage.json_bytes({
            "format": FORMAT, "stage": stage.name, "fingerprint": print_, "section": stage.section(),
            "inputs": inputs, "items": listed, "code": code_revision(),
        }), address)
    claimed = storage.read_json(address)
    if not isinstance(claimed, dict) or not claimed.keys() >= _PLAN_KEYS:
        raise ValueError(f"{address} is damaged\nhint: --rebuild makes this folder anew")
    if claimed["fingerprint"] != print_:
        raise ValueError(_disagreement(stage, claimed, inputs))
    return planned(stage.folder), joined


def planned(folder: str) -> Sequence[Item]:
    """The items of the plan in a stage folder, and those that were added to it."""
    more = storage.join(folder, "more")
    documents = [storage.join(folder, "plan.json"), *(storage.join(more, name) for name in storage.names(more))]
    parts = [_items(folder, storage.read_json(document)["items"]) for document in documents]
    return _Joined(parts) if len(parts) > 1 else parts[0]


def _list(stage: Stage, items: Iterable[Item], name: str) -> Any:
    """Put what the items carry in place, and give their list as a plan holds it."""
    ready = ({"id": item.id, "inputs": item.inputs} for item in _carried(stage, items))
    few = list(itertools.islice(ready, records.INLINE + 1))
    if len(few) <= records.INLINE:
        return few
    data = records.items_to_bytes(itertools.chain(few, ready))
    name = name_by_content(f"{name}.parquet", data)
    storage.put_bytes(data, storage.join(stage.folder, name))
    return records.reference(name, data, len(records.items(data, Item)))


def _carried(stage: Stage, items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        for carried, data in item.carries:
            storage.put_bytes(data, storage.join(stage.folder, carried))
        yield item


def _items(folder: str, listed: Any) -> Sequence[Item]:
    if isinstance(listed, list):
        return [Item(one["id"], one["inputs"]) for one in listed]
    return records.load(folder, listed, partial(records.items, element=Item))


class _Joined(Sequence[Item]):
    """Lists of items one after the other, none of them unpacked."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self._parts)

    def ids(self) -> list[str]:
        """The ids alone, in order."""
        return [one for part in self._parts for one in _ids(part)]


def recorded(stage: Stage, ids: Sequence[str]) -> records.Collected:
    """The records that are there of the items `ids`; those of another plan do not count."""
    folder = storage.join(stage.folder, "records")
    plan = _planned(stage.folder)
    packs = storage.join(stage.folder, "packs", plan[:12])
    found = records.Collected(partial(_pack, packs))
    names = storage.names(folder)
    for name in storage.names(packs):
        found.add_pack(storage.read_bytes(storage.join(packs, name)))
    alone = {one for name in names if (one := name.removesuffix(".json")) not in found.ids}
    missing = [one for one in ids if one in alone]
    for first in range(0, len(missing), _AT_ONCE):
        some = [storage.join(folder, f"{one}.json") for one in missing[first:first + _AT_ONCE]]
        for record in storage.each(storage.read_json, some):
            if record["plan"] == plan:
                found.add(record)
    return found


def _pack(folder: str, data: bytes) -> None:
    """Keep thousands of records in one file: to go on after a million is not to read a million files."""
    storage.put_bytes(data, storage.join(folder, name_by_content("records.parquet", data)))


def work(stage: Stage, item: Item) -> dict[str, Any]:
    """Process and commit one item, and return its record; runs in whichever process is told to.

    Idempotent: a late twin of a worker thought dead finds the record and steps back.
    """
    return made(stage, item)()


def made(stage: Stage, item: Item) -> Callable[[], dict[str, Any]]:
    """Process one item; what commits it and returns its record, to be called once, in any thread."""
    address = storage.join(stage.folder, "records", f"{item.id}.json")
    plan = _planned(stage.folder)
    if found := _record(address, plan):
        return lambda: found
    started = time.time()
    stage.beat = progress.Beat(stage.folder, item.id, stage.heard, again="round" in item.inputs)
    with _holding(stage, item), contextlib.ExitStack() as stack:
        stack.callback(stage.beat.done)
        scratch = stack.enter_context(scratch_folder(f"{stage.name}-{item.id}"))
        output = stage.process(item, scratch)
        held = stack.pop_all()

    def commit() -> dict[str, Any]:
        with _holding(stage, item), held:
            record = _commit(stage, item, output, scratch, plan, started)
            _tell(stage, item, record)
            return record

    return commit


def work_together(stage: Stage, items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any] | Exception | None]]:
    """Process several items together and commit them one by one.

    A failed item comes with its exception, or with None if another item's exception ended them all: try it alone.
    """
    plan = _planned(stage.folder)
    there = {item.id: _record(storage.join(stage.folder, "records", f"{item.id}.json"), plan) for item in items}
    yield from ((item, there[item.id]) for item in items if there[item.id])
    new = [item for item in items if not there[item.id]]
    with contextlib.ExitStack() as stack:
        work = [(item, stack.enter_context(scratch_folder(f"{stage.name}-{item.id}"))) for item in new]
        outputs = stack.enter_context(contextlib.closing(stage.process_together(work)))
        for item, scratch in work:
            started, stage.beat = time.time(), progress.Beat(stage.folder, item.id, stage.heard)
            record: dict[str, Any] | Exception | None = None
            try:
                output = next(outputs, None)  # none is left where one error ended all of them
                if isinstance(output, Exception):
                    raise output
                if output:
                    with _holding(stage, item):
                        record = committed = _commit(stage, item, output, scratch, plan, started)
                        _tell(stage, item, committed)
            except StageFailed:  # the driver's own, heard in the middle of an item
                raise
            except Exception as error:
                record = error
                _log.warning("%s: %s failed among others and is tried alone: %s", stage.name, item.id, sentence(error))
            finally:
                stage.beat.done()
            yield item, record


@contextlib.contextmanager
def _holding(stage: Stage, item: Item) -> Iterator[None]:
    token = in_hand.set((stage.path, stage.name, item.id))
    try:
        yield
    finally:
        in_hand.reset(token)


def _tell(stage: Stage, item: Item, record: dict[str, Any]) -> None:
    _log.debug("%s: item %s is recorded: %d samples", stage.name, item.id, record["samples"], extra={"fields": {
        "samples": record["samples"], "skipped": record["skipped"], "seconds": record["run"]["seconds"]}})


def _commit(stage: Stage, item: Item, output: Output, scratch: Path, plan: str, started: float) -> dict[str, Any]:
    address = storage.join(stage.folder, "records", f"{item.id}.json")
    if output.ledger:
        ledger = scratch / "ledger.jsonl"
        ledger.write_text("".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in output.ledger))
        output.files[f"ledger/{item.id}.jsonl"] = ledger
    described = sorted([*(describe(name, path) for name, path in output.files.items()), *output.elsewhere],
                       key=lambda file: file["name"])
    skipped, noted = output.counted or (_count(entry for entry in output.ledger if not entry.kept),
                                        _count(entry for entry in output.ledger if entry.kept))
    if output.mended:
        net = Counter(skipped)
        net.subtract(output.mended)
        skipped = {reason: count for reason, count in sorted(net.items()) if count}
    record = {
        "id": item.id, "plan": plan, "samples": output.samples, "files": described,
        "skipped": skipped, "noted": noted,
        "info": output.info,
    }
    if found := _record(address, plan):
        return found
    for name, path in sorted(output.files.items()):
        storage.put_file(path, storage.join(stage.folder, name), give=path.is_relative_to(scratch))
    for name, data in sorted(output.aside.items()):
        storage.put_bytes(data, storage.join(stage.folder, name))
    # Of the process since its start, which may have done other items: what a machine must have for it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record["run"] = {"seconds": round(time.time() - started, 3), "host": platform.node(), "peak_mb": round(peak),
                     "device": stage.device or devices.describe(stage.precision)}
    if output.times:
        record["run"]["times"] = {name: round(value, 3) if isinstance(value, float) else value
                                  for name, value in sorted(output.times.items())}
    if not storage.create_bytes(storage.json_bytes(record), address):
        if found := _record(address, plan):
            return found
        storage.put_json(record, address)  # of a plan that a rebuild has replaced
    return record


def _planned(folder: str) -> str:
    """The fingerprint that the plan of a folder fixed."""
    return storage.read_json(storage.join(folder, "plan.json"))["fingerprint"]


def _record(address: str, plan: str) -> dict[str, Any] | None:
    """The record at `address` if it is one of this plan."""
    try:
        record = storage.read_json(address)
    except FileNotFoundError:
        return None
    return record if record["plan"] == plan else None


def seal(stage: Stage, items: Sequence[Item], done: Sequence[dict[str, Any]] | None = None,
         retired: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Write manifest.json from the records of all items; the folder is finished from then on."""
    ids = _ids(items)
    if done is None:
        done = recorded(stage, ids).in_order(ids)
    if len(done) != len(ids):
        missing = sorted(set(ids) - {record["id"] for record in done})
        raise StageFailed(f"{stage.name}: {len(missing)} of {len(ids)} items have no record, the first is "
                          f"{missing[0]}\nhint: run the same command again")
    with scratch_folder(f"{stage.name}-seal") as scratch:
        extra = stage.finish(done, scratch)
        described = [describe(name, path) for name, path in sorted(extra.files.items())]
        for name, path in sorted(extra.files.items()):
            storage.put_file(path, storage.join(stage.folder, name))
    plan = storage.read_json(storage.join(stage.folder, "plan.json"))
    manifest = {key: plan[key] for key in ("format", "stage", "fingerprint", "section", "inputs")}
    manifest |= {
        "items": done, "files": described, "info": extra.info, "totals": totals(done),
        "content": content(plan["fingerprint"], described, done),
        "run": {"sealed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "code": code_revision(),
                "seconds": round(records.seconds(done), 3)},
    }
    if any(found := records.devices(done)):
        manifest["run"]["devices"] = found
    if retired:
        manifest["run"]["retired"] = list(retired)
    if halved := records.halved(done):
        manifest["run"]["items_with_halved_batches"] = halved
    listed = done
    if len(done) > records.INLINE:
        data = done.data if isinstance(done, records.Rows) else records.to_bytes([records.table(done)])
        listed = records.reference(name_by_content("manifest.parquet", data), data, len(done))
        storage.put_bytes(data, storage.join(stage.folder, listed["file"]["name"]))
    storage.put_json(manifest | {"items": list(listed) if isinstance(listed, Sequence) else listed},
                     storage.join(stage.folder, "manifest.json"))
    return manifest


def _ids(items: Sequence[Item]) -> list[str]:
    return items.ids() if isinstance(items, records.Rows | _Joined) else [item.id for item in items]


Runner = Callable[[Stage, Sequence[Item]], Iterator[Outcome | Retired | None]]
"""Yields the outcome of every item, in any order, each worker that it retires, and None now and then when nothing
happens."""


def in_process(stage: Stage, items: Sequence[Item]) -> Iterator[Outcome | None]:
    """The runner without a cluster: one item after another in this process, each committed while the next is made."""
    stage.setup()
    if (size := stage.together()) > 1:
        for start in range(0, len(items), size):
            for item, record in work_together(stage, items[start:start + size]):
                if isinstance(record, Exception) and devices.unusable(record):
                    raise record  # this process cannot compute any other item either
                yield (Outcome(item, record) if isinstance(record, dict) else
                       _tried(stage, item, partial(work, stage, item)))
        return
    with ThreadPoolExecutor(1, "commit") as committer:
        before: tuple[Item, Future[dict[str, Any]]] | None = None
        for item in items:
            going, failed = None, None
            try:
                going = item, committer.submit(made(stage, item))
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


def run(stage: Stage, runner: Runner = in_process, *, rebuild: bool = False, retry: bool = False,
        max_failed: float = 1.0, watch: Callable[[Tally], None] | None = None) -> dict[str, Any]:
    """Bring `stage` to its sealed state with `runner`, and return its manifest.

    Runs whatever has no record yet; nothing if the folder is sealed. `rebuild` empties the folder
    first. `retry` tries the rows that failed once more before sealing. `max_failed` is the share of
    rows that may fail. `watch` is shown the tally whenever it changes.
    StageFailed if items failed, after all others were done, or if too many rows failed.
    """
    if check := getattr(runner, "check", None):
        check(stage, idle=not rebuild and is_sealed(stage))  # before anything is removed or planned
    if rebuild:
        empty(stage)
    more = storage.join(stage.folder, "more")
    rounds = storage.names(more)  # before the items: whoever adds a round meanwhile has added ours
    items, joined = _claim(stage)
    if is_sealed(stage):
        return manifest_of(stage.folder, stage.command)
    retry = retry and not _under_way(stage, rounds)
    done, tally = _work_off(stage, runner, items, joined, max_failed, watch)
    if retry:
        number = len(rounds) + 1
        listed = _list(stage, stage.again(items, done), f"more-{number:04d}")
        if records.count(listed):
            joined = not storage.create_bytes(storage.json_bytes({"items": listed}),
                                              storage.join(more, f"{number:04d}.json"))
            items = prepare(stage)
            done, tally = _work_off(stage, runner, items, joined, max_failed, watch)
    if over := tally.over(max_failed, final=True):
        raise StageFailed(f"{stage.name}: {over}\nhint: --retry-failed tries these rows once more; a higher "
                          f"--max-failed seals what is there")
    for name in storage.names(storage.join(stage.folder, "failures")):
        storage.remove(storage.join(stage.folder, "failures", name))
    tally.clear()
    return seal(stage, items, done, tally.retired)


def _under_way(stage: Stage, rounds: Sequence[str]) -> bool:
    """Whether the last try at rows that failed was cut off, so that it is to be ended and no other begun."""
    if not rounds:
        return False
    listed = storage.read_json(storage.join(stage.folder, "more", rounds[-1]))["items"]
    there = set(storage.names(storage.join(stage.folder, "records")))
    return any(f"{one}.json" not in there for one in _ids(_items(stage.folder, listed)))


def _work_off(stage: Stage, runner: Runner, items: Sequence[Item], joined: bool, max_failed: float,
              watch: Callable[[Tally], None] | None) -> tuple[Sequence[dict[str, Any]], Tally]:
    """Run every item that has no record; the records of all, in order, and what they add up to."""
    ids = _ids(items)
    done = recorded(stage, ids)
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
    failures = set(storage.names(storage.join(stage.folder, "failures")))
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
                           storage.without_credentials(outcome.error), extra={"fields": {"item": outcome.item.id}})
                storage.put_json({"id": outcome.item.id, "error": storage.without_credentials(outcome.error),
                                  "traceback": storage.without_credentials(outcome.trace)}, address)
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
                          f"{storage.without_credentials(first.error)}\nhint: the tracebacks are in "
                          f"{storage.join(stage.folder, 'failures')}; run the same command again to retry them")
    return done.in_order(ids), tally


def empty(stage: Stage) -> None:
    """Remove the folder of a stage that can be planned; what cannot must not cost what is there."""
    stage.inputs()
    for _ in stage.plan():
        pass
    clear(stage)


def clear(stage: Stage) -> None:
    """Remove the folder of a stage, in an order such that whoever is killed leaves no old result for a new plan."""
    folder = stage.folder
    if storage.exists(storage.join(folder, "plan.json")):
        storage.remove(storage.join(folder, "manifest.json"))
        for name in [*storage.folders(folder), *storage.names(folder)]:
            if name != "plan.json":
                storage.remove_tree(storage.join(folder, name))
        storage.remove_tree(folder)


def _tried(stage: Stage, item: Item, first: Callable[[], dict[str, Any]]) -> Outcome:
    """One item with retries in this process after the `first` try; a ValueError will not get better by another."""
    attempt = first
    for left in reversed(range(_TRIES)):
        try:
            return Outcome(item, record=attempt())
        except StageFailed:  # the driver's own, heard in the middle of an item
            raise
        except Exception as error:
            full = storage.full(error)
            if left == 0 or full or isinstance(error, ValueError):
                return Outcome(item, error=sentence(error), trace=traceback.format_exc(), full=bool(full))
            attempt = partial(work, stage, item)
    raise AssertionError


def sentence(error: BaseException) -> str:
    """What is told of the error of an item."""
    if full := storage.full(error):
        return full
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    explained = devices.explain(error)
    return text if "hint:" in text or not explained else f"{text.splitlines()[0]}\n{explained}"


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder of this attempt alone, removed afterwards; by a later process, if this one is killed."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"rdm-{name.replace('/', '-')}-"))
    try:
        with open(folder / _ALIVE, "w") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            yield folder
    except OSError as error:
        if storage.full(error) and error.filename is None:
            error.filename = f"{folder}/"  # what is written to a file that is open does not tell where
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shared_scratch(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of scratch that the processes of this machine have in common, filled by the first of them.

    It is there as long as one of them lives, and removed by a later process.
    """
    _sweep()
    folder = Path(tempfile.gettempdir()) / f"rdm-{name.replace('/', '-')}-{os.getuid()}"
    if folder in _shared:
        return folder
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            alive = open(folder / _ALIVE, "a")  # noqa: SIM115 (held until the process ends)
            fcntl.flock(alive, fcntl.LOCK_SH)
            if os.fstat(alive.fileno()).st_ino == (folder / _ALIVE).stat().st_ino:
                break
        except FileNotFoundError:  # somebody was just removing it
            continue
    with open(folder / ".fill", "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not (folder / "filled").exists():
            # What somebody left who died over it is no beginning.
            for left in folder.iterdir():
                if left.name not in {_ALIVE, ".fill"}:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                fill(folder)
            except BaseException:
                alive.close()
                raise
            (folder / "filled").touch()
    _shared[folder] = alive
    return folder


_shared: dict[Path, Any] = {}


@cache
def _sweep() -> None:
    """Remove the scratch folders whose processes are gone: nobody holds their locks."""
    for path in Path(tempfile.gettempdir()).glob(f"rdm-*/{_ALIVE}"):
        with contextlib.suppress(OSError), open(path) as alive:
            if time.time() - path.stat().st_mtime > 60:  # or it may not have got so far as to lock it
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)


def describe(name: str, path: Path) -> dict[str, Any]:
    """A manifest's entry of the local file `path` under `name`: name, bytes, sha256."""
    return {"name": name, "bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}


def name_by_content(name: str, data: bytes) -> str:
    """`name` with a hash of its content: of two plans made at once, neither overwrites the other's lists."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:12]}{dot}{ending}"


def identity(root: str, path: str, command: str, sha256: str | None = None) -> dict[str, Any]:
    """How another stage names the sealed folder `path` below `root` among its inputs.

    ValueError if that folder is stale: its rows would be taken for those of an input it was not made from.
    """
    manifest = manifest_of(storage.join(root, path), command, sha256)
    if changed := changed_inputs(root, manifest):
        raise ValueError(f"{storage.join(root, path)} is stale: {', '.join(changed)} changed since\n"
                         f"hint: make it again, with its own settings: {command} --rebuild")
    return {"path": path, "digest": manifest["content"]}


@cache
def code_revision() -> str:
    """The git revision of this code: what $RDM_REVISION says of a copy, or else git; without it the version."""
    if told := os.environ.get("RDM_REVISION"):
        return told
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        got = subprocess.run(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],
                             capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
        if got.returncode == 0 and got.stdout.strip():
            return got.stdout.strip()
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("retrieval-diffusion")
    except PackageNotFoundError:
        return "unknown"


def digest(document: Any) -> str:
    """sha256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _count(entries: Iterable[Entry]) -> dict[str, int]:
    return dict(sorted(Counter(entry.reason for entry in entries).items()))


def _disagreement(stage: Stage, claimed: dict[str, Any], inputs: dict[str, Any]) -> str:
    wanted = {"format": FORMAT, "stage": stage.name, "section": stage.section(), "inputs": inputs}
    differing = "; ".join(f"{field}: there {there}, now {now}" for field, there, now in
                          _differences({key: claimed[key] for key in wanted}, wanted))
    moved = [name for name, one in inputs.items() if one != claimed["inputs"].get(name)]
    changed = f"; what it is made from has changed: {', '.join(moved)}" if moved else ""
    return (f"{stage.folder} was planned with other settings or inputs ({differing}){changed}\n"
            f"hint: {stage.elsewhere}, or make this one anew with --rebuild")


def _differences(there: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            yield from _differences(there.get(key, "absent"), now.get(key, "absent"), f"{prefix}.{key}".strip("."))
    elif there != now:
        yield prefix, _short(there), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
