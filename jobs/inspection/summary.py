"""The text at the end of a command: a summary of the sealed stage, and the usual next command."""

import shlex
from collections.abc import Callable
from typing import Any

from jobs.telemetry.units import format_bytes, format_count, format_duration, format_number
from pipeline import storage
from pipeline.stages.stage import Stage

_FACTS = {"index": ("key", "recall_at_10"), "neighbors": ("k", "database", "recall"), "train": ("steps", "loss"),
          "shard": ("format",)}
"""Facts of a manifest that people look for, by stage."""
_PROMPT = "--prompt 'a red apple'"


def summarize_stage(stage: Stage, manifest: dict[str, Any]) -> str:
    """A sealed stage in a few lines: counts, losses, facts, where it is."""
    totals, info = manifest["totals"], manifest["info"]
    size = f", {format_bytes(totals['bytes'])}" if totals["bytes"] else ""
    lost = sum(totals["skipped"].values())
    # The stage of a run only collects what the run left.
    work = "" if stage.name == "train" else f", {format_duration(manifest['run']['seconds'])} of work"
    lines = [f"{stage.name.replace('_', ' ')}: {format_count(totals['samples'], 'sample')}{size}{work}"
             + (f"; {lost:,} left out" if lost else "")]
    if facts := [f"{name.replace('_', ' ')} {_number(info[name])}" for name in _FACTS.get(stage.name, ())
                 if info.get(name) is not None]:
        lines.append(f"  {', '.join(facts)}")
    lines.append(f"  {storage.redact_credentials(stage.folder)}")
    if stage.name == "sample":
        lines.append(f"  the images: {storage.redact_credentials(storage.join(stage.folder, 'grid.png'))}")
    return "\n".join(lines)


def next_command(stage: Stage) -> str:
    """The usual next command after a sealed stage, without its root. Empty if there is none."""
    follow = _FOLLOWING.get(stage.name)
    return f"python -m jobs {follow(stage)}" if follow else ""


def next_sample(root: str, dataset: str) -> str:
    """A command that uses a database: `sample` with a run of the root, or `search` if there is no run."""
    if runs := storage.list_folders(storage.join(root, "runs")):
        return f"python -m jobs sample {shlex.quote(runs[0])} {_PROMPT} --database {dataset}"
    return f"python -m jobs search {dataset} 'a red apple'"


def _number(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else format_number(value, 4)


def _dataset(stage: Stage) -> str:
    """NAME, or NAME@VERSION, of the folder of a stage of a dataset."""
    _, name, version, *_ = stage.path.split("/")
    return name if version == "v1" else f"{name}@{version}"


def _after_neighbors(stage: Stage) -> str:
    dataset, database = _dataset(stage), stage.path.rsplit("/", 1)[1]
    name = dataset.partition("@")[0]
    other = "" if database.partition("@")[0] == name else f" --database {database}"
    return f"train {name}_run --dataset {dataset}{other}"


def _after_training(stage: Stage) -> str:
    label = stage.section().get("database", "")
    return f"sample {stage.path.split('/')[1]} {_PROMPT}" + (f" --database {label}" if label else "")


_FOLLOWING: dict[str, Callable[[Stage], str]] = {
    "shard": lambda stage: f"embed {_dataset(stage)}",
    "embed": lambda stage: f"index {_dataset(stage)}",
    "embed_captions": lambda stage: f"index {_dataset(stage)}",
    "score": lambda stage: f"index {_dataset(stage)} --hide '{stage.path.rsplit('/', 1)[1]} < 0.5'",
    "index": lambda stage: f"neighbors {_dataset(stage)}",
    "tombstones": lambda stage: "verify",
    "neighbors": _after_neighbors,
    "latents": lambda stage: f"train {_dataset(stage).partition('@')[0]}_run --dataset {_dataset(stage)} --latents",
    "train": _after_training,
    "convert": _after_training,
    "import": lambda stage: f"sample {stage.path.split('/')[1]} {_PROMPT}",
    "sample": lambda stage: f"evaluate {stage.path.split('/')[1]}",
    "evaluate": lambda stage: "report",
}
