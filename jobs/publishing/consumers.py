"""Runs, neighbor lists and samples that use a version of a dataset, according to their plans."""

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

from jobs.runs.metrics import never_made_a_step
from jobs.runs.run import Run, read_shown_rows
from pipeline import storage
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.stages.documents import RootPath, check_shape
from pipeline.storage import DamagedFile
from pipeline.takedowns.takedown_list import Forgotten

_log = logging.getLogger(__name__)
_EXPORT = "clip-retrieval"
_INPUTS = {"stage": str, "inputs": {"*": {"path": RootPath}}}


def find_consumers(root: str, name: str, *, skip_damaged: bool = True) -> dict[str, list[str]]:
    """The runs, and the neighbor lists of other datasets, that use a dataset, by its version.

    DamagedFile if neither the plan nor the manifest of one can be read, unless `skip_damaged`.
    """
    consumers: dict[str, list[str]] = defaultdict(list)
    for consumer, document in _consumers(root, skip_damaged=skip_damaged):
        for version in sorted(set(_read_by(document, name))):
            if not consumer.startswith(f"datasets/{name}/{version}/"):
                consumers[version].append(consumer)
    return consumers


def find_samples(root: str, name: str) -> dict[str, list[str]]:
    """The samples whose neighbors are from a dataset, by its version. They keep no version: `credits` needs it."""
    samples: dict[str, list[str]] = defaultdict(list)
    root = storage.normalize(root)
    for path in _sample_folders(root):
        for version in sorted(set(_read_by(_plan(root, path) or {}, name))):
            samples[version].append(path)
    return samples


def find_samples_showing(root: str, wanted: Forgotten, hashes: Collection[str]) -> list[str]:
    """The samples that hold a copy of a wanted image, or of one with one of these hashes, as a neighbor.

    The log names samples of a removed version that may show one: older samples do not name the URLs of their neighbors.
    """
    root, showing = storage.normalize(root), []
    for path in _sample_folders(root):
        try:
            pictures = storage.read_json(storage.join(root, path, "samples.json"))["pictures"]
            used = [(neighbor.get("database", picture["database"]), neighbor)
                    for picture in pictures for neighbor in picture["neighbors"]]
            is_showing = any(neighbor["sha256"] in hashes or wanted.has(neighbor) for _, neighbor in used)
            unnamed = {label for label, neighbor in used if "url" not in neighbor}
        except FileNotFoundError:
            continue
        except (ValueError, LookupError, TypeError):
            _log.warning("forget: %s/samples.json is damaged: it may show images that are taken down", path)
            continue
        if is_showing:
            showing.append(path)
        elif (wanted.urls or wanted.domains) and any(
                not Dataset.parse(root, label).is_sealed("shards") for label in unnamed):
            _log.warning("forget: %s may show such images: gc removed its database, and it names no URLs\n"
                         "hint: python -m jobs rm %s", path, path)
    return showing


def find_grids_showing(root: str, wanted: Forgotten, hashes: Collection[str]) -> list[str]:
    """The folders with validation images of runs that show a wanted image, or one with one of these hashes.

    Images that were written before they named their rows are not known.
    """
    root, showing = storage.normalize(root), []
    for run in storage.list_folders(storage.join(root, "runs")):
        folder = f"runs/{run}/validation"
        for file in storage.list_files(storage.join(root, folder)):
            if not file.endswith(".png"):
                continue
            try:
                shown = read_shown_rows(storage.read_bytes(storage.join(root, folder, file))) or []
            except PermissionError:
                raise
            except Exception as error:  # Pillow raises its own errors for damaged and huge images
                _log.warning("forget: %s/%s may show images that are taken down: %s\nhint: python -m jobs rm %s",
                             folder, file, storage.first_line(error), folder)
                continue
            if any(row["sha256"] in hashes or wanted.has(row) for row in shown):
                showing.append(folder)
                break
    return showing


def find_exports_showing(root: str, hashes: Collection[str]) -> list[Dataset]:
    """The versions whose export to clip-retrieval has an image with one of these hashes."""
    showing = []
    for dataset in datasets(storage.normalize(root), {}):
        try:
            if dataset.is_sealed(_EXPORT) and any(value in hashes for value in _exported_hashes(dataset)):
                showing.append(dataset)
        except PermissionError as error:
            _log.warning("forget: %s", storage.error_reason(error))
        except (ValueError, OSError, LookupError, TypeError):
            _log.warning("forget: %s is damaged: it may show images that are taken down\nhint: python -m jobs rm %s",
                         dataset.path(_EXPORT), dataset.path(_EXPORT))
    return showing


def _exported_hashes(dataset: Dataset) -> Iterator[str]:
    from pipeline.formats import parquet  # `status` needs no tables
    for record in dataset.manifest(_EXPORT)["items"]:
        for entry in record["files"]:
            if entry["name"].endswith(".parquet"):
                yield from parquet.read(dataset.fetch(_EXPORT, entry), columns=["sha256"])["sha256"].to_pylist()


def _sample_folders(root: str) -> list[str]:
    return [f"runs/{run}/samples/{sample}" for run in storage.list_folders(storage.join(root, "runs"))
            for sample in storage.list_folders(storage.join(root, "runs", run, "samples"))]


def list_encoders(root: str, name: str) -> dict[str, dict[str, Any]]:
    """The encoders of the runs that take neighbors from a dataset, by run. Runs that never made a step are left out."""
    by_run = {}
    for run in storage.list_folders(storage.join(storage.normalize(root), "runs")):
        document = _plan(root, f"runs/{run}")
        if (document and document.get("stage") == "train" and any(_read_by(document, name))
                and not never_made_a_step(Run(storage.normalize(root), run))):
            by_run[f"the run {run}"] = Run(storage.normalize(root), run).encoder()
    return by_run


def list_consumer_encoders(root: str, name: str, base: Dataset | None) -> dict[str, dict[str, Any]]:
    """The encoders that a database is bound to, by name: those of its runs and of its published version `base`."""
    from pipeline.embeddings.embed import dataset_encoder  # `status` needs no arrays
    return list_encoders(root, name) | ({base.label: dataset_encoder(base)} if base else {})


def _consumers(root: str, *, skip_damaged: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plans of the stages that read databases, by folder.

    `skip_damaged`: those that this user may not read are left out too, but not the folder of all runs.
    """
    root = storage.normalize(root)
    paths = [f"runs/{run}" for run in storage.list_folders(storage.join(root, "runs"))]
    for dataset in datasets(root, {} if skip_damaged else None):
        try:
            paths += [dataset.path(f"neighbors/{database}")
                      for database in storage.list_folders(dataset.folder("neighbors"))]
        except PermissionError:
            if not skip_damaged:
                raise
    for path in paths:
        try:
            document = read_inputs(root, path)
        except (DamagedFile, PermissionError) as error:
            if not skip_damaged:
                raise
            _log.warning("%s", storage.error_reason(error))
            continue
        if document:
            yield path, document


def read_inputs(root: str, path: str) -> dict[str, Any] | None:
    """The stage and inputs of a folder by its plan, or by its manifest if that is damaged; None without both.

    DamagedFile if the plan is damaged and the manifest does not tell: the folder may need anything.
    """
    fault: DamagedFile | None = None
    for file in ("plan.json", "manifest.json"):
        url = storage.join(storage.normalize(root), path, file)
        try:
            return check_shape(storage.read_json(url), url, _INPUTS, "")
        except FileNotFoundError:
            continue
        except DamagedFile as error:
            fault = fault or error
    if not fault:
        return None
    raise DamagedFile(f"{storage.first_line(fault)}: what {path} needs is unknown\n"
                      f"hint: python -m jobs rm {path}; or restore the file from a backup")


def _plan(root: str, path: str) -> dict[str, Any] | None:
    try:
        return read_inputs(root, path)
    except DamagedFile:
        return None


def _read_by(document: dict[str, Any], name: str) -> Iterator[str]:
    """The versions of a dataset that a plan has inputs from."""
    for stage_input in document.get("inputs", {}).values():
        parts = stage_input["path"].split("/")
        if parts[0] == "datasets" and len(parts) > 3 and parts[1] == name:
            yield parts[2]
