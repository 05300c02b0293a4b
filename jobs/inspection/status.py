"""The state of every stage below a root, and the remaining work of a stage."""

import contextlib
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from jobs.publishing.releases import describe_failed_gates, read_failed_gates
from jobs.runs.labels import run_labels, stage_labels
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from jobs.telemetry import progress_bar, tables
from jobs.telemetry.units import format_bytes, format_count
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.names import is_name
from pipeline.releases import version_marks
from pipeline.stages import records
from pipeline.stages.documents import NUMBER, check_more_items, check_plan, check_progress, check_sealed, check_shape
from pipeline.stages.manifest import changed_inputs
from pipeline.stages.plan import count_rows, prepare
from pipeline.stages.seal import read_records
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item

_SILENT_S = 120.0
_OF_A_DATASET = ("shards", "embeddings", "index")
_OF_SOME = ("text_embeddings", "clip-retrieval", "tombstones", "latents")
_OF_ALL_SAMPLES = (*_OF_A_DATASET, "text_embeddings", "latents")
COUNT_PARAMETERS = ("import", "convert")
"""Stages of a run whose manifests count the parameters of the network as their samples."""
_POINTER = {"version": str, "number?": int, "published?": NUMBER, "checked?": NUMBER,
            "recall@10?": (int, float, type(None))}
_CHECKS = {"plan.json": check_plan, "manifest.json": check_sealed}


def read_status(root: str) -> list[dict[str, Any]]:
    """Every stage below `root` with its state: absent, planned, i of n, sealed, stale, failed or damaged.

    Versions that gc or rm has removed are left out.

    * stale: an input was rebuilt later, with different content.
    * damaged: a plan or manifest cannot be read.
    * failed: a run ended with an error that a retry does not fix.

    `published`: whether the version of a dataset is the published one. `failed_gates`: the gates that stopped it.
    The table, the live table, the metrics, the report and `ls` show these states.
    """
    states = []
    for path in _paths(root):
        try:
            states.append({"path": path, **_state(root, path)})
        except (ValueError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            states.append({"path": path, "state": "damaged", "error": storage.first_line(error)})
    published = {f"datasets/{name}/{pointer['version']}" for name, pointer in read_published(root).items()}
    return [marked for version, members in groupby(states, key=lambda state: "/".join(state["path"].split("/")[:3]))
            for marked in _mark(root, version, list(members), version in published)
            if marked["state"] != "absent" or not _is_removed(root, version)]


def _is_removed(root: str, folder: str) -> bool:
    """Whether a folder is a version of a dataset that gc or rm has removed."""
    kind, name, *number = folder.split("/")
    return kind == "datasets" and version_marks.is_removing(Dataset(root, name, number[0]))


def _mark(root: str, version: str, states: list[dict[str, Any]], published: bool) -> list[dict[str, Any]]:
    """The stages of a version with what was decided about it."""
    gates: list[str] = []
    kind, name, *number = version.split("/")
    if kind == "datasets" and not published:
        try:
            gates = read_failed_gates(Dataset(root, name, number[0]))
        except ValueError as error:
            states = [*states, {"path": f"{version}/gates.json", "state": "damaged",
                                "error": storage.first_line(error)}]
    # The vectors of samples that a rebuild removed stay where they are, in every stage with a row for each sample.
    removed = next((state["removed"] for state in states if state.get("removed")), 0)
    return [state | {"published": published, **({"failed_gates": gates} if gates else {}),
                     **({"removed": removed} if removed and state["path"].split("/")[-1] in _OF_ALL_SAMPLES else {})}
            for state in states]


def status_table(root: str, states: list[dict[str, Any]]) -> str:
    """The states below a root as text, one line for each."""
    if not states:
        return f"nothing here yet: {storage.redact_credentials(root)} has no datasets and no runs"
    return tables.render([[state["path"], state["state"], "; ".join(filter(None, (
        "published" if state.get("published") else "", describe_failed_gates(state.get("failed_gates", ())),
        _detail(state))))] for state in states], whole={0})


def read_published(root: str) -> dict[str, dict[str, Any]]:
    """The pointer of each dataset that has one: version, number, publication time (Unix), recall@10.

    Damaged pointers are left out: `releases.check_published` names them.
    """
    pointers = {}
    for name in storage.list_folders(storage.join(root, "datasets")):
        with contextlib.suppress(FileNotFoundError, ValueError):
            url = storage.join(root, "datasets", name, "current.json")
            pointer = check_shape(storage.read_json(url), url, _POINTER, "python -m jobs repair NAME")
            if is_name(pointer["version"]) and "removed" not in pointer:
                pointers[name] = pointer
    return pointers


def state_labels(path: str, state: dict[str, Any]) -> dict[str, str]:
    """The labels of a stage folder with this state."""
    if state.get("dataset"):
        dataset = Dataset.parse("", state["dataset"])
        return run_labels(dataset.name, dataset.version, path.split("/")[1])
    return stage_labels(path, state.get("stage") or path.rsplit("/", 1)[1])


def seconds_silent(now: dict[str, Any]) -> float:
    """Seconds since the last report of a driver; 0 while it counts as running."""
    seconds = time.time() - now["updated"]
    return seconds if seconds > _SILENT_S else 0.0


def forecast_stage(stage: Stage, *, overwrite: bool = False) -> dict[str, Any]:
    """Estimate a stage before it runs: items, items left, bytes to read, and seconds if known."""
    claimed = not overwrite and storage.exists(storage.join(stage.folder, "plan.json"))
    items: Sequence[Item] = prepare(stage) if claimed else list(stage.plan())
    ids = [item.id for item in items]
    done = read_records(stage, ids).in_order(ids) if claimed else []
    sealed = claimed and storage.exists(storage.join(stage.folder, "manifest.json"))
    items_left = 0 if sealed else len(items) - len(done)
    each = [record["run"]["seconds"] for record in done]
    if not each:
        # Other folders of the same stage show how long an item takes.
        for path in _paths(stage.root):
            manifest = _read(stage.root, path, "manifest.json")
            if manifest and manifest.get("stage") == stage.name:
                each.append(manifest["run"]["seconds"] / max(manifest["totals"]["items"], 1))
    reads = sum(_input_bytes(stage.root, identity["path"]) for identity in stage.inputs().values() if identity["path"])
    rows = count_rows(stage, items)
    return {"stage": stage.name, "folder": stage.folder, **stage.summary(), "items": len(items), "left": items_left,
            "input_bytes": reads, **({"rows": rows} if rows else {}),
            "worker_seconds": round(items_left * sum(each) / len(each), 1) if each else None}


def _input_bytes(root: str, path: str) -> int:
    """Bytes of a folder that a stage reads: another stage, or a checkpoint, whose manifest has another form."""
    parts = path.split("/")
    if parts[0] == "runs" and parts[2:3] == ["checkpoints"]:
        return sum(entry["bytes"] for entry in Run(root, parts[1]).checkpoint(int(parts[3]))["files"])
    return (_read(root, path, "manifest.json") or {}).get("totals", {}).get("bytes", 0)


def _paths(root: str) -> list[str]:
    paths = [f"pictures/{name}" for name in storage.list_folders(storage.join(root, "pictures"))]
    for name in storage.list_folders(storage.join(root, "datasets")):
        for version in storage.list_folders(storage.join(root, "datasets", name)):
            base = f"datasets/{name}/{version}"
            folders = storage.list_folders(storage.join(root, base))
            paths += [f"{base}/{stage}" for stage in _OF_A_DATASET]
            paths += [f"{base}/{stage}" for stage in _OF_SOME if stage in folders]
            paths += [f"{base}/{stage}/{folder}" for stage in ("scores", "neighbors") if stage in folders
                      for folder in storage.list_folders(storage.join(root, base, stage))]
    for run in storage.list_folders(storage.join(root, "runs")):
        paths.append(f"runs/{run}")
        paths += [f"runs/{run}/{kind}/{folder}" for kind in ("samples", "judges", "evaluations")
                  for folder in storage.list_folders(storage.join(root, "runs", run, kind))]
    return paths


def _state(root: str, path: str) -> dict[str, Any]:
    plan = _read(root, path, "plan.json")
    if plan is None:
        if storage.exists(storage.join(root, path, "manifest.json")):
            raise ValueError("plan.json is missing, though the folder is sealed")
        return {"state": "absent"}
    manifest = _read(root, path, "manifest.json")
    items = records.count(plan["items"])
    about = {"stage": plan["stage"], "items": items}
    changed = changed_inputs(root, plan)
    if manifest is not None and (lost := _lost_step(root, path, plan["stage"])) is not None:
        return about | {"state": "damaged", "error": f"its last checkpoint, of step {lost}, is missing",
                        "lost_step": lost}
    if manifest is None or (plan["stage"] == "train" and _goes_on(root, path, manifest)):
        for name in storage.list_files(storage.join(root, path, "more")):
            url = storage.join(root, path, "more", name)
            items += records.count(check_more_items(storage.read_json(url), url)["items"])
        done = min(len(storage.list_files(storage.join(root, path, "records"))), items)
        failed = len(storage.list_files(storage.join(root, path, "failures")))
        about["progress"] = _progress(root, path)
        state = f"{done} of {items}" if done or about["progress"] else "planned"
        about["done"] = done
        if plan["stage"] == "train":
            run = Run(root, path.split("/")[1])
            steps = run.steps()
            fault = run.fault()
            now = about["progress"]
            live = [now["step"]] if now and "step" in now and not seconds_silent(now) else []
            state = "failed" if fault else f"at step {max(steps[-1:] + live)}" if steps or live else "planned"
            about |= {"dataset": _dataset(plan), "curve": _last(read_metrics(run)), "fault": fault}
            if steps:
                about["of_steps"] = run.config(steps[-1]).get("steps")
                about["bytes"] = run.checkpoint_bytes()
        return about | {"state": "stale" if changed else state, "changed": changed, "failed": failed}
    sealed = about | {"state": "stale" if changed else "sealed", "changed": changed,
                      **{key: manifest["totals"][key] for key in ("samples", "bytes", "skipped", "noted")},
                      "seconds": manifest["run"]["seconds"], "sealed": manifest["run"]["sealed"],
                      "retired": manifest["run"].get("retired", []), "devices": manifest["run"].get("devices", {})}
    if isinstance(dead := manifest["info"].get("dead"), int) and dead:
        sealed["removed"] = dead  # a rebuild keeps shards of which it hides a few samples
    if plan["stage"] == "index":
        recall = manifest["info"].get("recall")
        sealed["recall"] = _numbers(recall.get("image")) if isinstance(recall, dict) else {}
    if plan["stage"] == "train":
        # The stage only collects what the run left: its time and bytes are those of the run.
        run = Run(root, path.split("/")[1])
        lines = read_metrics(run)
        sealed["seconds"] = round(curve["seconds"], 1) if (curve := _last(lines)) and "seconds" in curve else None
        sealed |= {"dataset": _dataset(plan), "curve": curve, "fault": None, "of_steps": manifest["info"].get("steps")}
    if plan["stage"] in {"train", *COUNT_PARAMETERS}:  # its checkpoints are no files of the stage
        sealed["bytes"] += Run(root, path.split("/")[1]).checkpoint_bytes()
    return sealed


def _lost_step(root: str, path: str, stage: str) -> int | None:
    """The step of the last checkpoint of a sealed run, if it is lost and no command trains the run."""
    if stage not in {"train", *COUNT_PARAMETERS}:
        return None
    now = _progress(root, path)
    return None if now and not seconds_silent(now) else Run(root, path.split("/")[1]).lost_step()


def _goes_on(root: str, path: str, manifest: dict[str, Any]) -> bool:
    """Whether a finished run was started again with more steps, and has not made them."""
    now = _progress(root, path)
    more = now.get("of_steps", 0) if now and not seconds_silent(now) else 0
    return more > manifest["info"].get("steps", more) or not Run(root, path.split("/")[1]).is_finished()


def _detail(state: dict[str, Any]) -> str:
    if state["state"] == "damaged":
        return state["error"]
    if state.get("changed"):
        return f"rebuilt since: {', '.join(state['changed'])}"
    if "samples" in state:
        return "; ".join(filter(None, [
            format_count(state["samples"], "parameter") if state.get("stage") in COUNT_PARAMETERS else
            f"{format_count(state['samples'], 'row')} hidden" if state.get("stage") == "tombstones" else
            f"{format_count(state['samples'] - state.get('removed', 0), 'sample')}, {format_bytes(state['bytes'])}",
            f"{state['removed']} removed" if state.get("removed") else "",
            progress_bar.describe_losses(state, state["path"]),
            progress_bar.describe_devices(state.get("devices", {})),
            progress_bar.describe_retired(state.get("retired", []))]))
    said = [f"{state['failed']} failed"] if state.get("failed") else []
    if fault := state.get("fault"):
        said.append((fault["message"].splitlines() or [fault["kind"]])[0])
    elif state.get("of_steps") and not state.get("progress"):
        said.append(describe_stopped(state["of_steps"]))
    if now := state.get("progress"):
        # A silent driver may be dead. Its last report is then out of date, but the records are right.
        seconds = seconds_silent(now)
        said.append(f"no report for {round(seconds / 60)} min" if seconds else
                    f"{progress_bar.describe_steps(now)}, {progress_bar.describe_pace(now)}" if "of_steps" in now else
                    progress_bar.describe_progress(now))
        said += [progress_bar.describe_devices(now.get("devices", {})),
                 progress_bar.describe_retired(now.get("retired", []))]
    return "; ".join(filter(None, said))


def describe_stopped(steps: int) -> str:
    """The state of a run with a checkpoint that no command trains at this moment."""
    return f"not running; {format_count(steps, 'step')} in all"


def _last(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    return _numbers(lines[-1]) if lines else None


def _numbers(values: Any) -> dict[str, Any]:
    """The numbers in a dict; no others, because a damaged document may hold anything."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)
            } if isinstance(values, dict) else {}


def _dataset(plan: dict[str, Any]) -> str | None:
    """The dataset of a training run; None if the plan names none."""
    label = plan["section"].get("dataset")
    return label if isinstance(label, str) and all(map(is_name, label.split("@", 1))) else None


def _progress(root: str, path: str) -> dict[str, Any] | None:
    """The last report of the driver of a running stage."""
    try:
        url = storage.join(root, path, "progress.json")
        return check_progress(storage.read_json(url), url)
    except (FileNotFoundError, ValueError):
        return None


def _read(root: str, path: str, name: str) -> Any:
    """A document of a stage folder, None if it is missing; ValueError if its form is wrong."""
    try:
        document = storage.read_json(storage.join(root, path, name))
    except FileNotFoundError:
        return None
    return _CHECKS[name](document, storage.join(root, path, name))
