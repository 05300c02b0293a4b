"""One stage, one shape: plan, process, commit, seal; resumed by running it again.

On disk a stage is a folder:

    plan.json            fingerprint, settings, inputs and items, written before work starts
    records/<item>.json  one per finished item: its files with bytes and sha256, counts, seconds
    ledger/<item>.jsonl  samples left out or remarked on, with key and reason (only where there are any)
    failures/<item>.json the last traceback of an item that failed, gone once it succeeds
    manifest.json        every record together, written last: a folder without it is not finished
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pipeline import storage

FORMAT = 1
_MANIFEST_KEYS = {"stage", "content", "items", "files"}  # those of a checkpoint's manifest too
_PLAN_KEYS = {"format", "stage", "fingerprint", "section", "inputs", "items"}
_TRIES = 3


@dataclass(frozen=True)
class Item:
    """One unit of work: an id and the names of its inputs, never data."""

    id: str
    inputs: dict[str, Any] = field(default_factory=dict)


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


@dataclass
class Plan:
    """The items of a stage, and small files that belong to the plan (lists that items refer to)."""

    items: list[Item]
    side_files: Iterable[tuple[str, bytes]] = ()


@dataclass
class Outcome:
    """What became of one item: its record, or the error of its last try."""

    item: Item
    record: dict[str, Any] | None = None
    error: str = ""
    trace: str = ""


class StageFailed(RuntimeError):
    """Some items failed for good; the rest is done and recorded, the stage is not sealed."""


class Stage(ABC):
    """A step from sealed folders to another; holds its settings and where it writes, nothing else.

    Subclasses add `plan`, `process` and, where needed, `setup` (once per worker) and `finish`
    (once, on the driver, when every record is there).
    """

    name: ClassVar[str]
    workers_need_gpu: ClassVar[bool] = False

    def __init__(self, root: str, folder: str, config: Any) -> None:
        self.root = storage.normal(root)
        self.path = folder
        self.folder = storage.join(self.root, folder)
        self.config = config

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
    def plan(self) -> Plan:
        """The items, the same for the same inputs; runs on the driver and writes nothing."""

    def setup(self) -> None:  # noqa: B027 (most stages load nothing)
        """Load what every item needs, once per worker."""

    @abstractmethod
    def process(self, item: Item, scratch: Path) -> Output:
        """Make the files of one item below the folder `scratch`."""

    def finish(self, records: list[dict[str, Any]], scratch: Path) -> Output:
        """Files and facts that need all items, for the manifest."""
        return Output()


def fingerprint(stage: Stage, inputs: dict[str, dict[str, Any]] | None = None) -> str:
    """Hash of format version, stage name, settings and inputs: who may write into a folder."""
    return digest([FORMAT, stage.name, stage.section(), inputs if inputs is not None else stage.inputs()])


def manifest_of(folder: str, command: str) -> dict[str, Any]:
    """The manifest of a sealed stage folder; ValueError with the `command` that would finish it."""
    try:
        manifest = storage.read_json(storage.join(folder, "manifest.json"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not sealed: it has no manifest.json\nhint: {command}") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= _MANIFEST_KEYS:
        raise ValueError(f"{folder}/manifest.json is damaged\nhint: python -m jobs verify tells what else is")
    return manifest


def changed_inputs(root: str, document: dict[str, Any]) -> list[str]:
    """Names of the inputs of a plan or manifest whose folder holds other content than when it was planned."""
    changed = []
    for name, one in document.get("inputs", {}).items():
        if one["path"]:
            try:
                now = storage.read_json(storage.join(root, one["path"], "manifest.json"))
            except (FileNotFoundError, ValueError):
                now = None
            if not isinstance(now, dict) or now.get("content") != one["digest"]:
                changed.append(name)
    return changed


def timeless(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its `run` parts (seconds, hosts, dates): equal for equal results."""
    bare = {key: value for key, value in manifest.items() if key != "run"}
    bare["items"] = [{key: value for key, value in record.items() if key != "run"} for record in manifest["items"]]
    return bare


def prepare(stage: Stage) -> list[Item]:
    """Claim the folder of `stage`: write plan.json, or find that the one there is ours.

    ValueError naming the field that differs where the folder is claimed by other settings or inputs.
    """
    inputs = stage.inputs()
    print_ = fingerprint(stage, inputs)
    address = storage.join(stage.folder, "plan.json")
    if not storage.exists(address):
        plan = stage.plan()
        if not plan.items:
            raise ValueError(f"{stage.name}: nothing to do: the inputs of {stage.folder} are empty")
        for name, data in plan.side_files:
            storage.put_bytes(data, storage.join(stage.folder, name))
        storage.create_bytes(storage.json_bytes({
            "format": FORMAT, "stage": stage.name, "fingerprint": print_, "section": stage.section(),
            "inputs": inputs, "items": [asdict(item) for item in plan.items], "code": code_revision(),
        }), address)
    claimed = storage.read_json(address)
    if not isinstance(claimed, dict) or not claimed.keys() >= _PLAN_KEYS:
        raise ValueError(f"{address} is damaged\nhint: --rebuild makes this folder anew")
    if claimed["fingerprint"] != print_:
        raise ValueError(_disagreement(stage, claimed, inputs))
    return [Item(**item) for item in claimed["items"]]


def records(stage: Stage, items: list[Item]) -> list[dict[str, Any]]:
    """The records that are there, in the order of the items; those of another plan do not count."""
    folder = storage.join(stage.folder, "records")
    there = set(storage.names(folder))
    found = storage.each(storage.read_json, [storage.join(folder, f"{item.id}.json") for item in items
                                             if f"{item.id}.json" in there])
    plan = _planned(stage.folder)
    return [record for record in found if record["plan"] == plan]


def work(stage: Stage, item: Item) -> dict[str, Any]:
    """Process and commit one item, and return its record; runs in whichever process is told to.

    Idempotent: a late twin of a worker thought dead finds the record and steps back.
    """
    address = storage.join(stage.folder, "records", f"{item.id}.json")
    plan = _planned(stage.folder)
    if found := _record(address, plan):
        return found
    started = time.time()
    with scratch_folder(f"{stage.name}-{item.id}") as scratch:
        output = stage.process(item, scratch)
        if output.ledger:
            ledger = scratch / "ledger.jsonl"
            ledger.write_text("".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in output.ledger))
            output.files[f"ledger/{item.id}.jsonl"] = ledger
        described = [describe(name, path) for name, path in sorted(output.files.items())]
        record = {
            "id": item.id, "plan": plan, "samples": output.samples, "files": described,
            "skipped": _count(entry for entry in output.ledger if not entry.kept),
            "noted": _count(entry for entry in output.ledger if entry.kept),
            "info": output.info,
        }
        if found := _record(address, plan):
            return found
        for name, path in sorted(output.files.items()):
            storage.put_file(path, storage.join(stage.folder, name))
        record["run"] = {"seconds": round(time.time() - started, 3), "host": platform.node()}
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


def seal(stage: Stage, items: list[Item]) -> dict[str, Any]:
    """Write manifest.json from the records of all items; the folder is finished from then on."""
    done = records(stage, items)
    if len(done) != len(items):
        missing = sorted({item.id for item in items} - {record["id"] for record in done})
        raise StageFailed(f"{stage.name}: {len(missing)} of {len(items)} items have no record, the first is "
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
                "seconds": round(sum(record["run"]["seconds"] for record in done), 3)},
    }
    storage.put_json(manifest, storage.join(stage.folder, "manifest.json"))
    return manifest


def content(print_: str, described: list[dict[str, Any]], done: list[dict[str, Any]]) -> str:
    """Hash of what a sealed folder is and holds; later stages name their inputs by it."""
    files = [*described, *(file for record in done for file in record["files"])]
    return digest([print_, *([file["name"], file["sha256"]] for file in files)])


def totals(done: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Samples, bytes, and counts by reason over records."""
    result: dict[str, Any] = {"items": 0, "samples": 0, "bytes": 0, "skipped": Counter(), "noted": Counter()}
    for record in done:
        result["items"] += 1
        result["samples"] += record["samples"]
        result["bytes"] += sum(file["bytes"] for file in record["files"])
        result["skipped"].update(record["skipped"])
        result["noted"].update(record["noted"])
    return result | {"skipped": dict(result["skipped"]), "noted": dict(result["noted"])}


Runner = Callable[[Stage, list[Item]], Iterator[Outcome]]


def in_process(stage: Stage, items: list[Item]) -> Iterator[Outcome]:
    """The runner without a cluster: one item after another, in this process."""
    stage.setup()
    for item in items:
        yield _tried(stage, item)


def run(stage: Stage, runner: Runner = in_process, *, rebuild: bool = False,
        watch: Callable[[Iterable[Outcome], int, int], Iterable[Outcome]] | None = None) -> dict[str, Any]:
    """Bring `stage` to its sealed state with `runner`, and return its manifest.

    Runs whatever has no record yet; nothing if the folder is sealed. `rebuild` empties the folder
    first. `watch(outcomes, done, total)` wraps the stream of outcomes, for a progress bar.
    StageFailed if items failed, after all others were done.
    """
    if rebuild:
        empty(stage)
    items = prepare(stage)
    sealed = storage.join(stage.folder, "manifest.json")
    if storage.exists(sealed):
        return manifest_of(stage.folder, stage.command)
    have = {record["id"] for record in records(stage, items)}
    todo = [item for item in items if item.id not in have]
    outcomes: Iterable[Outcome] = runner(stage, todo) if todo else ()
    failed = []
    failures = set(storage.names(storage.join(stage.folder, "failures")))
    for outcome in watch(outcomes, len(have), len(items)) if watch else outcomes:
        address = storage.join(stage.folder, "failures", f"{outcome.item.id}.json")
        if outcome.record is None:
            failed.append(outcome)
            storage.put_json({"id": outcome.item.id, "error": storage.without_credentials(outcome.error),
                              "traceback": storage.without_credentials(outcome.trace)}, address)
        elif f"{outcome.item.id}.json" in failures:
            storage.remove(address)
    if failed:
        first = failed[0]
        raise StageFailed(f"{stage.name}: {len(failed)} of {len(items)} items failed, the first is {first.item.id}: "
                          f"{storage.without_credentials(first.error)}\nhint: the tracebacks are in "
                          f"{storage.join(stage.folder, 'failures')}; run the same command again to retry them")
    for name in storage.names(storage.join(stage.folder, "failures")):
        storage.remove(storage.join(stage.folder, "failures", name))
    return seal(stage, items)


def empty(stage: Stage) -> None:
    """Remove the folder of a stage that can be planned; what cannot must not cost what is there.

    In an order such that whoever is killed meanwhile leaves no old result for a new plan.
    """
    stage.inputs()
    stage.plan()
    folder = stage.folder
    if storage.exists(storage.join(folder, "plan.json")):
        storage.remove(storage.join(folder, "manifest.json"))
        for name in [*storage.folders(folder), *storage.names(folder)]:
            if name != "plan.json":
                storage.remove_tree(storage.join(folder, name))
        storage.remove_tree(folder)


def _tried(stage: Stage, item: Item) -> Outcome:
    """One item with retries in this process; a ValueError will not get better by trying again."""
    for left in reversed(range(_TRIES)):
        try:
            return Outcome(item, record=work(stage, item))
        except Exception as error:
            if left == 0 or isinstance(error, ValueError):
                return Outcome(item, error=_sentence(error), trace=traceback.format_exc())
    raise AssertionError


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder of this attempt alone, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f"rdm-{name.replace('/', '-')}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe(name: str, path: Path) -> dict[str, Any]:
    """A manifest's entry of the local file `path` under `name`: name, bytes, sha256."""
    return {"name": name, "bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}


def name_by_content(name: str, data: bytes) -> str:
    """`name` with a hash of its content: of two plans made at once, neither overwrites the other's lists."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:12]}{dot}{ending}"


def identity(root: str, path: str, command: str) -> dict[str, Any]:
    """How another stage names the sealed folder `path` below `root` among its inputs.

    ValueError if that folder is stale: its rows would be taken for those of an input it was not made from.
    """
    manifest = manifest_of(storage.join(root, path), command)
    if changed := changed_inputs(root, manifest):
        raise ValueError(f"{storage.join(root, path)} is stale: {', '.join(changed)} changed since\n"
                         f"hint: make it again, with its own settings: {command} --rebuild")
    return {"path": path, "digest": manifest["content"]}


@cache
def code_revision() -> str:
    """The git revision of this code, or where there is no git the installed version."""
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
    return (f"{stage.folder} was planned with other settings or inputs ({differing})\n"
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
