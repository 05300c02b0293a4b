"""The text at the end of a command: a summary of the sealed stage, and the usual next command."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jobs.checks.inputs import stored_sizes
from jobs.config import recipes
from jobs.inspection.status import COUNT_PARAMETERS
from jobs.runs.newest_run import find_newest_run
from jobs.runs.run import Run
from jobs.telemetry.units import format_bytes, format_count, format_duration, format_number
from model import recipes as networks
from pipeline import storage
from pipeline.datasets.dataset import DEFAULT_VERSION, Dataset, datasets
from pipeline.datasets.pointer import parse_pointer, read_pointer
from pipeline.embeddings.embed import dataset_encoder
from pipeline.neighbors.files import why_recall_is_unknown
from pipeline.releases.published import open_dataset
from pipeline.releases.release_files import has_release
from pipeline.stages.stage import Stage

_FACTS = {"index": ("key", "recall_at_10"), "neighbors": ("k", "database"), "train": ("steps", "loss"),
          "shard": ("format",)}
"""Facts of a manifest that people look for, by stage."""
_FACT_NAMES = {"recall_at_10": "recall at 10", "loss": "loss of the last step"}
_SLOWEST = 4
"""Parts of a rebuild whose seconds people see."""
_PROMPT = "--prompt 'a red apple'"


def summarize_stage(stage: Stage, manifest: dict[str, Any]) -> str:
    """A sealed stage in a few lines: counts, losses, facts, where it is."""
    totals, info = manifest["totals"], manifest["info"]
    size = f", {format_bytes(totals['bytes'])}" if totals["bytes"] else ""
    lost = sum(totals["skipped"].values())
    # The stage of a run only collects what the run left.
    work = "" if stage.name == "train" else f", {format_duration(manifest['run']['seconds'])} of work"
    noun = "parameter" if stage.name in COUNT_PARAMETERS else "sample"
    lines = [f"{stage.name.replace('_', ' ')}: {format_count(totals['samples'], noun)}{size}{work}"
             + (f"; {lost:,} left out" if lost else "")]
    facts = [f"{_FACT_NAMES.get(name, name)} {_number(info[name])}" for name in _FACTS.get(stage.name, ())
             if info.get(name) is not None]
    if stage.name == "neighbors":
        unknown = why_recall_is_unknown(info)
        facts.append(f"recall not measured ({unknown})" if unknown else f"recall {_number(info['recall'])}")
    if facts:
        lines.append(f"  {', '.join(facts)}")
    lines.append(f"  {storage.redact_credentials(stage.folder)}")
    if stage.name == "sample":
        lines.append(f"  the images: {storage.redact_credentials(storage.join(stage.folder, 'grid.png'))}")
        side = Run(stage.root, stage.path.split("/")[1]).image_size
        lines.append(f"  {side} x {side} pixels, the size that the run was trained with")
    return "\n".join(lines)


def summarize_rebuild(result: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The result of a rebuild in a few lines: rows that were counted, and the seconds of the slowest parts."""
    counts = {name: value for name, value in result.items() if isinstance(value, int) and not isinstance(value, bool)}
    rows = ", ".join(f"{format_count(value)} {name}" for name, value in counts.items() if value)
    slowest = sorted(seconds.items(), key=lambda part: -part[1])[:_SLOWEST]
    times = ", ".join(f"{part} {value:g}" for part, value in slowest if value)
    return {name: value for name, value in result.items() if name not in counts} | {
        "rows": rows or "none", "seconds": f"{sum(seconds.values()):.1f}" + (f": {times}" if times else "")}


def next_command(stage: Stage) -> str:
    """The command that usually follows a sealed stage, without its root. Empty if nothing does.

    The command is one that works: its inputs are in the root.
    """
    follow = _FOLLOWING.get(stage.name)
    command = follow(stage) if follow else ""
    return f"python -m jobs {command}" if command else ""


def next_sample(root: str, dataset: str) -> str:
    """A command that uses a published database: `sample` if a run has its encoder, or else `search`."""
    if find_newest_run(root, dataset_encoder(open_dataset(root, dataset))):  # `sample` takes this run
        return f"python -m jobs sample 'a red apple' --database {dataset}"
    return f"python -m jobs search {dataset} 'a red apple'"


def _number(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else format_number(value, 4)


def _dataset_of(stage: Stage) -> Dataset:
    """The dataset of a stage, from its folder."""
    _, name, version, *_ = stage.path.split("/")
    return Dataset(stage.root, name, version)


def _label(dataset: Dataset) -> str:
    """NAME, or NAME@VERSION where readers of NAME would get another version."""
    read = (parse_pointer(read_pointer(dataset.root, dataset.name) or b"") or {}).get("version", DEFAULT_VERSION)
    return dataset.label if dataset.version != DEFAULT_VERSION or read == DEFAULT_VERSION else (
        f"{dataset.name}@{DEFAULT_VERSION}")


def _dataset(stage: Stage) -> str:
    return _label(_dataset_of(stage))


def _after_score(stage: Stage) -> str:
    """Hide rows, but not of a published version: it never changes."""
    if has_release(_dataset_of(stage)):
        return ""
    return f"index {_dataset(stage)} --hide '{stage.path.rsplit('/', 1)[1]} < 0.5'"


def _after_neighbors(stage: Stage) -> str:
    dataset, label = _dataset_of(stage), stage.path.rsplit("/", 1)[1]
    database = Dataset.parse(stage.root, label)
    if (flags := _flags_for_images(dataset)) is None:  # training is not possible
        return f"search {_label(database)} 'a red apple'" if database.is_sealed("index") else ""
    other = "" if database == dataset else f" --database {_label(database)}"
    flags += _flags_for_vectors(dataset, label)
    return f"train {_free_run(dataset)} --dataset {_label(dataset)}{other}{flags}"


def _after_latents(stage: Stage) -> str:
    """Train with the neighbors that are there, or find them first."""
    dataset = _dataset_of(stage)
    databases = [label for label in storage.list_folders(dataset.folder("neighbors"))
                 if dataset.is_sealed(f"neighbors/{label}")]
    if not databases:
        return f"neighbors {_label(dataset)}"
    channels, *sides = dataset.manifest("latents")["info"]["shape"][1:]
    network = networks.tiny().unet
    flags = "" if channels == network.in_channels else f" --in-channels {channels} --out-channels {channels}"
    database = _label(Dataset.parse(stage.root, databases[0]))
    return (f"train {_free_run(dataset)} --dataset {_label(dataset)} --database {database}"
            f"{_flags_for_vectors(dataset, databases[0])}{flags}{_patch_flag(sides)} --latents")


def _free_run(dataset: Dataset) -> str:
    """A name that no run has."""
    there, first = set(storage.list_folders(storage.join(dataset.root, "runs"))), f"{dataset.name}_run"
    names = itertools.chain([first], (f"{first}{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in there)


def _flags_for_vectors(dataset: Dataset, database: str) -> str:
    """The flags of `train` without a recipe that fit these neighbors."""
    config, info = networks.tiny(), dataset.manifest(f"neighbors/{database}")["info"]
    length = dataset_encoder(Dataset.parse(dataset.root, database))["dim"]
    return ("" if length == config.unet.context_dim else f" --context-dim {length}") + (
        f" --k {info['k']}" if info["k"] < config.k else "")


def _flags_for_images(dataset: Dataset) -> str | None:
    """The flags of `train` without a recipe that fit the images of a dataset. None if they have several sizes."""
    sizes = set(stored_sizes(dataset))
    if len(sizes) > 1:
        return None
    stride, most = networks.tiny().unet.stride, recipes.tiny().shard.image_size
    for width, height in sizes:
        if width == height and (width > most or width % stride):
            sides = [side for side in range(most, 0, -stride) if width % side == 0]
            return f" --image-size {sides[0]}" if sides else _patch_flag((width, height))
        return _patch_flag((width, height))
    return ""


def _patch_flag(sides: Sequence[int]) -> str:
    """The flag of `train` for the largest patch that divides these sides."""
    patch = math.gcd(networks.tiny().unet.patch, *sides)
    return "" if patch == networks.tiny().unet.patch else f" --patch {patch}"


def _after_training(stage: Stage) -> str:
    """Sample from the database of the training, or from another one with the encoder of the run."""
    run = Run(stage.root, stage.path.split("/")[1])
    trained_on = stage.section().get("database", "")
    usable = [dataset.label for dataset in datasets(stage.root)
              if dataset.is_sealed("index") and dataset_encoder(dataset) == run.encoder()]
    label = trained_on if trained_on in usable else next(iter(usable), "")
    return f"sample {run.name} {_PROMPT} --database {label}" if label else ""


def _after_sample(stage: Stage) -> str:
    """Evaluate, or list the credits of the samples if the root has too few databases for it."""
    from jobs.config.recipes import RECIPES
    from jobs.evaluation.evaluation_data import can_evaluate
    run = Run(stage.root, stage.path.split("/")[1])
    recipe = f" --recipe {run.name}" if run.name in RECIPES else ""  # the bundled run has the name of its recipe
    return f"evaluate {run.name}{recipe}" if can_evaluate(run) else f"credits {stage.path}"


_FOLLOWING: dict[str, Callable[[Stage], str]] = {
    "shard": lambda stage: f"embed {_dataset(stage)}",
    "embed": lambda stage: f"index {_dataset(stage)}",
    "embed_captions": lambda stage: f"index {_dataset(stage)}",
    "score": _after_score,
    "index": lambda stage: f"neighbors {_dataset(stage)}",
    "tombstones": lambda stage: "verify",
    "neighbors": _after_neighbors,
    "latents": _after_latents,
    "train": _after_training,
    "convert": _after_training,
    "import": _after_training,
    "sample": _after_sample,
    "evaluate": lambda stage: "report",
}
