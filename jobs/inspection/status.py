"""How far every stage below a root has come, and what a stage would still have to do."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from jobs.runs.labels import run_labels, stage_labels
from jobs.runs.metrics import read
from jobs.runs.run import Run
from jobs.telemetry import progress_bar, tables
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages import records
from pipeline.stages.manifest import changed_inputs
from pipeline.stages.plan import prepare
from pipeline.stages.seal import read_records
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item

_SILENT_S = 120.0
_OF_A_DATASET = ("shards", "embeddings", "index")
_OF_SOME = ("text_embeddings", "clip-retrieval", "tombstones", "latents")
_KEYS = {"plan.json": {"stage", "items", "inputs", "section"}, "manifest.json": {"stage", "items", "content"}}


def read_status(root: str) -> list[dict[str, Any]]:
    """Every stage below `root` with its state: absent, planned, i of n, sealed, stale or damaged.

    Stale means that an input was rebuilt since, and has other content now; damaged, that a plan or
    manifest cannot be read.
    """
    found = []
    for path in _paths(root):
        try:
            found.append({"path": path, **_state(root, path)})
        except ValueError as error:
            found.append({"path": path, "state": "damaged", "error": str(error).splitlines()[0]})
    return found


def status_table(root: str, found: list[dict[str, Any]]) -> str:
    """The states below a root as text, a line each."""
    if not found:
        return f"nothing here yet: {storage.redact_credentials(root)} has no datasets and no runs"
    return tables.render([[one["path"], one["state"], _detail(one)] for one in found])


def published(root: str) -> dict[str, dict[str, Any]]:
    """What is published of each dataset that has anything published: version, number, when (Unix time), recall@10."""
    found = {}
    for name in storage.list_folders(storage.join(root, "datasets")):
        with contextlib.suppress(FileNotFoundError, ValueError):
            one = storage.read_json(storage.join(root, "datasets", name, "current.json"))
            if isinstance(one, dict) and "version" in one:
                found[name] = one
    return found


def named(path: str, one: dict[str, Any]) -> dict[str, str]:
    """The labels of a stage folder with this state."""
    if one.get("dataset"):
        dataset = Dataset.parse("", one["dataset"])
        return run_labels(dataset.name, dataset.version, path.split("/")[1])
    return stage_labels(path, one.get("stage") or path.rsplit("/", 1)[1])


def silent(now: dict[str, Any]) -> float:
    """Seconds since a driver's last word, 0 while it may still be there."""
    seconds = time.time() - now["updated"]
    return seconds if seconds > _SILENT_S else 0.0


def forecast(stage_: Stage, *, overwrite: bool = False) -> dict[str, Any]:
    """What running a stage would do: items, how many are left, bytes to read, seconds as far as known."""
    claimed = not overwrite and storage.exists(storage.join(stage_.folder, "plan.json"))
    items: Sequence[Item] = prepare(stage_) if claimed else list(stage_.plan())
    ids = [item.id for item in items]
    done = read_records(stage_, ids).in_order(ids) if claimed else []
    sealed = claimed and storage.exists(storage.join(stage_.folder, "manifest.json"))
    left = 0 if sealed else len(items) - len(done)
    each = [record["run"]["seconds"] for record in done]
    if not each:
        # Other folders of the same stage tell how long an item takes here.
        for path in _paths(stage_.root):
            manifest = _read(stage_.root, path, "manifest.json")
            if manifest and manifest.get("stage") == stage_.name:
                each.append(manifest["run"]["seconds"] / max(manifest["totals"]["items"], 1))
    reads = sum((_read(stage_.root, one["path"], "manifest.json") or {}).get("totals", {}).get("bytes", 0)
                for one in stage_.inputs().values() if one["path"])
    rows = sum(map(stage_.rows, items))
    return {"stage": stage_.name, "folder": stage_.folder, "items": len(items), "left": left, "input_bytes": reads,
            **({"rows": rows} if rows else {}),
            "worker_seconds": round(left * sum(each) / len(each), 1) if each else None}


def _paths(root: str) -> list[str]:
    paths = [f"pictures/{name}" for name in storage.list_folders(storage.join(root, "pictures"))]
    for name in storage.list_folders(storage.join(root, "datasets")):
        for version in storage.list_folders(storage.join(root, "datasets", name)):
            base = f"datasets/{name}/{version}"
            paths += [f"{base}/{one}" for one in _OF_A_DATASET]
            paths += [f"{base}/{one}" for one in _OF_SOME
                      if storage.exists(storage.join(root, base, one, "plan.json"))]
            paths += [f"{base}/neighbors/{one}" for one in storage.list_folders(storage.join(root, base, "neighbors"))]
    for run in storage.list_folders(storage.join(root, "runs")):
        paths.append(f"runs/{run}")
        paths += [f"runs/{run}/{of}/{one}" for of in ("samples", "judges", "evaluations")
                  for one in storage.list_folders(storage.join(root, "runs", run, of))]
    return paths


def _state(root: str, path: str) -> dict[str, Any]:
    plan = _read(root, path, "plan.json")
    if plan is None:
        return {"state": "absent"}
    manifest = _read(root, path, "manifest.json")
    items = records.count(plan["items"])
    about = {"stage": plan["stage"], "items": items}
    changed = changed_inputs(root, plan)
    if manifest is None:
        for name in storage.list_files(storage.join(root, path, "more")):
            items += records.count(storage.read_json(storage.join(root, path, "more", name))["items"])
        done = min(len(storage.list_files(storage.join(root, path, "records"))), items)
        failed = len(storage.list_files(storage.join(root, path, "failures")))
        about["progress"] = _progress(root, path)
        state = f"{done} of {items}" if done or about["progress"] else "planned"
        about["done"] = done
        if plan["stage"] == "train":
            run = Run(root, path.split("/")[1])
            steps = run.steps()
            state = f"at step {steps[-1]}" if steps else "planned"
            about |= {"dataset": plan["section"].get("dataset"), "curve": _last(read(run)),
                      "fault": run.fault()}
        return about | {"state": "stale" if changed else state, "changed": changed, "failed": failed}
    sealed = about | {"state": "stale" if changed else "sealed", "changed": changed,
                      **{key: manifest["totals"][key] for key in ("samples", "bytes", "skipped", "noted")},
                      "seconds": manifest["run"]["seconds"], "sealed": manifest["run"]["sealed"],
                      "retired": manifest["run"].get("retired", []), "devices": manifest["run"].get("devices", {})}
    if plan["stage"] == "index":
        sealed["recall"] = manifest["info"].get("recall", {}).get("image", {})
    if plan["stage"] == "train":
        # The stage only collects what the run left: its time and bytes are those of the run.
        run = Run(root, path.split("/")[1])
        lines = read(run)
        sealed["seconds"] = round(lines[-1]["seconds"], 1) if lines else None
        sealed |= {"dataset": plan["section"].get("dataset"), "curve": _last(lines), "fault": None}
        sealed["bytes"] += sum(entry["bytes"] for step in run.steps() for entry in run.checkpoint(step)["files"])
    return sealed


def _detail(one: dict[str, Any]) -> str:
    if one["state"] == "damaged":
        return one["error"]
    if one.get("changed"):
        return f"rebuilt since: {', '.join(one['changed'])}"
    if "samples" in one:
        skipped = ", ".join(f"{count} {reason}" for reason, count in one["skipped"].items())
        return "; ".join(filter(None, [
            f"{one['samples']} samples, {one['bytes'] / 1e6:.1f} MB" + (f", left out: {skipped}" if skipped else ""),
            progress_bar.computed_on(one.get("devices", {})), progress_bar.retired(one.get("retired", []))]))
    said = [f"{one['failed']} failed"] if one.get("failed") else []
    if now := one.get("progress"):
        # Of a driver that is gone the records tell, and its last word does not.
        gone = silent(now)
        said.append(f"nothing heard for {round(gone / 60)} min" if gone else progress_bar.sentence(now))
        said += [progress_bar.computed_on(now.get("devices", {})), progress_bar.retired(now.get("retired", []))]
    return "; ".join(filter(None, said))


def _last(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    return lines[-1] if lines else None


def _progress(root: str, path: str) -> dict[str, Any] | None:
    """What the driver of a stage under way said last."""
    try:
        return storage.read_json(storage.join(root, path, "progress.json"))
    except (FileNotFoundError, ValueError):
        return None


def _read(root: str, path: str, name: str) -> Any:
    """A document of a stage folder, None if it is not there; ValueError if it is not ours."""
    try:
        document = storage.read_json(storage.join(root, path, name))
    except FileNotFoundError:
        return None
    if not isinstance(document, dict) or not _KEYS[name] <= document.keys():
        raise ValueError(f"{storage.join(root, path, name)} is damaged")
    return document
