"""The readers of documents below a root, each as a function of a path. Commands write them, others may edit them."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import generate_latest

from jobs.inspection import prometheus, status, watch
from jobs.publishing import check_published, releases
from jobs.runs.run import Run
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.releases import release_files, version_marks
from pipeline.stages import plan, records
from pipeline.stages.manifest import read_manifest
from pipeline.stages.progress import Tally
from pipeline.stages.seal import read_records
from pipeline.stages.stage import Stage
from pipeline.stages.types import Claim, Item
from pipeline.takedowns import takedown_list, takedowns

_SHARDS = "datasets/x/v1/shards"
_SHA256 = "0" * 64


class _Shards(Stage):
    name = "shard"

    def plan(self) -> list[Item]:
        return [Item("000000", {"count": 3})]

    def process(self, item: Item, scratch: Path) -> None:  # type: ignore[override]
        raise AssertionError


def _root(path: Path, place: str) -> str:
    """A root with a dataset in which the file at `path` has the name `place`."""
    root = path.parent / "root"
    shards = root / _SHARDS
    shards.mkdir(parents=True)
    for other in ("plan.json", "manifest.json"):
        shutil.copy(path.parent / f"good-{other}", shards / other)
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, root / place)
    return str(root)


def _unsealed(path: Path, place: str) -> _Shards:
    """A planned stage in which the file at `path` has the name `place`."""
    root = _root(path, f"{_SHARDS}/{place}")
    (Path(root) / _SHARDS / "manifest.json").unlink()
    stage = _Shards(root, _SHARDS, None)
    stage.claim = Claim(_SHA256, {}, "")
    return stage


def _show(root: str) -> None:
    """Run every command that shows the state of a root."""
    states = status.read_status(root)
    status.status_table(root, states)
    rows = [watch._stage_row(state) for state in states if state["state"] != "absent"]
    watch.snapshot_text({"time": 0.0, "root": root, "published": status.read_published(root), "stages": rows})
    families = [*prometheus._stage_metrics(states), *prometheus._database_metrics(status.read_published(root))]
    generate_latest(SimpleNamespace(collect=lambda: families))  # type: ignore[arg-type]


def read_plan(path: Path) -> None:
    """plan.json of a sealed stage."""
    root = _root(path, f"{_SHARDS}/plan.json")
    _show(root)
    stage = _Shards(root, _SHARDS, None)
    plan.count_rows(stage, plan.read_items(stage.folder))


def read_stage_manifest(path: Path) -> None:
    """manifest.json of a stage."""
    root = _root(path, f"{_SHARDS}/manifest.json")
    _show(root)
    manifest = read_manifest(storage.join(root, _SHARDS), "shard")
    records.totals(manifest["items"])


def read_progress(path: Path) -> None:
    """progress.json of a stage under way."""
    _show(_unsealed(path, "progress.json").root)


def read_report(path: Path) -> None:
    """progress/<item>.json: how far a worker is."""
    stage = _unsealed(path, "progress/000000.json")
    tally = Tally(stage.folder, 1, 3)
    tally._old.clear()
    tally.look()
    tally.over(0.5)
    _show(stage.root)


def read_record(path: Path) -> None:
    """records/<item>.json of a stage under way."""
    stage = _unsealed(path, "records/000000.json")
    done = read_records(stage, ["000000"]).in_order(["000000"])
    tally = Tally(stage.folder, 1, 3)
    tally.start(done)
    tally.look()
    storage.json_bytes(list(done))
    records.to_bytes([records.table(done)])
    records.totals(done), records.seconds(done), records.devices(done), records.content("", [], done)
    _show(stage.root)


def read_pack(path: Path) -> None:
    """A pack of records of a stage under way."""
    stage = _unsealed(path, f"packs/{_SHA256[:12]}/records.parquet")
    list(read_records(stage, ["000000"]).in_order(["000000"]))


def read_failure(path: Path) -> None:
    """failures/<item>.json: only its name counts."""
    _show(_unsealed(path, "failures/000000.json").root)


def read_more_items(path: Path) -> None:
    """more/0001.json: items that were added to a plan."""
    stage = _unsealed(path, "more/0001.json")
    _show(stage.root)
    plan.count_rows(stage, plan.read_items(stage.folder))


def read_lease(path: Path) -> None:
    """A lease on a folder."""
    root = _root(path, "leases/datasets+x+v1+shards.0123456789abcdef.json")
    for holder in storage.find_holders(root, _SHARDS, time.time()):
        str(holder)
    storage.remove_ended_leases(root, time.time() + 1000)


def read_pointer(path: Path) -> None:
    """current.json of a dataset, and an entry of its history."""
    root = _root(path, "datasets/x/current.json")
    _show(root)
    check_published.check_published(root, quick=True)
    (Path(root) / "datasets/x/current.json").unlink()
    history = Path(root) / "published/x/000001.json"
    history.parent.mkdir(parents=True)
    shutil.copy(path, history)
    check_published.check_published(root, quick=True)


def read_release(path: Path) -> None:
    """release.json of a version, and its gates.json."""
    root = _root(path, "datasets/x/v1/release.json")
    releases.versions_table(releases.list_versions(root, "x"))
    release_files.read_release(Dataset(root, "x"))


def read_gates(path: Path) -> None:
    """gates.json of a version that was not published."""
    root = _root(path, "datasets/x/v1/gates.json")
    releases.versions_table(releases.list_versions(root, "x"))


def read_mark(path: Path) -> None:
    """mark.json of a version."""
    dataset = Dataset(_root(path, "datasets/x/v1/mark.json"), "x")
    version_marks.is_removing(dataset)
    version_marks.publishing_sequence(version_marks.read_mark(dataset))


def read_takedowns(path: Path) -> None:
    """forgotten.json of a root and of a version."""
    root = _root(path, "forgotten.json")
    shutil.copy(path, Path(root) / "datasets/x/v1/forgotten.json")
    manifest = Path(root) / _SHARDS / "manifest.json"  # without rows to compare with the list
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"items": []}))
    takedown_list.count_requests(root)
    takedown_list.read_takedowns(root).has({"sha256": "a", "url": "http://a/b"})
    takedowns.read_forgotten_rows(Dataset(root, "x"))


def read_takedown_copy(path: Path) -> None:
    """takedowns/000001.json: the copy of a request."""
    takedown_list.restore_takedowns(_root(path, "takedowns/000001.json"))


def read_fault(path: Path) -> None:
    """fault.json of a training run."""
    root = _root(path, "runs/r/fault.json")
    shutil.copy(path.parent / "good-run.json", Path(root) / "runs/r/plan.json")
    _show(root)
    Run(root, "r").fault()


def read_run(path: Path) -> None:
    """plan.json of a training run."""
    root = _root(path, "runs/r/plan.json")
    _show(root)
    run = Run(root, "r")
    run.section(), run.encoder(), run.lineage()


STORE_READERS: dict[str, Callable[[Path], None]] = {
    "plan": read_plan, "manifest": read_stage_manifest, "progress": read_progress, "report": read_report,
    "record": read_record, "pack": read_pack, "failure": read_failure, "more_items": read_more_items,
    "lease": read_lease, "pointer": read_pointer, "release": read_release, "gates": read_gates, "mark": read_mark,
    "takedowns": read_takedowns, "takedown_copy": read_takedown_copy, "fault": read_fault, "run": read_run}
"""The readers by name."""
