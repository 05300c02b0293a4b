"""Remove a dataset, a version or a stage of it, a run, or samples. A published dataset is removed as a whole.

    <root>/removing+datasets+mine.json    written first and removed last, while datasets/mine is removed

A command that was killed leaves this file, so the same command finishes the removal. The order keeps the root readable:
stages go before their inputs, and the manifest of a stage goes first. So no reader takes the rest for a whole stage.

The removal of a published dataset is a publication: the pointer says first that the dataset is removed. The pointer,
the history and the mark of each version stay, so that no later version gets a number that readers have seen.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.publishing.check_published import list_published
from jobs.publishing.consumers import find_consumers, read_inputs
from jobs.publishing.garbage_collect import files_of
from jobs.publishing.whole_versions import find_sign_option
from jobs.runs.run import Run
from jobs.runs.targets import is_within, refuse_unknown_target, suggest
from jobs.telemetry.units import format_count
from pipeline import storage
from pipeline.datasets.dataset import RELEASED_STAGES, Dataset
from pipeline.releases import release_files, version_marks
from pipeline.releases.published import Published
from pipeline.releases.signatures import ReleaseKeys
from pipeline.stages.plan import empty_folder
from pipeline.stages.types import StageFailed


@dataclass(frozen=True)
class Removal:
    """A folder to remove."""

    root: str
    path: str
    """The folder below the root."""
    stages: tuple[str, ...]
    """The stage folders in it, in the order of their removal."""
    files: int
    bytes: int
    published: Published | None = None
    """The pointer, if the folder is a published dataset."""
    blocked_by: tuple[str, ...] = ()
    """The folders that must be removed first, in this order."""

    def document(self) -> dict[str, Any]:
        """The removal as JSON."""
        return {"removed": self.path, "stages": list(self.stages), "files": self.files, "bytes": self.bytes}

    def refuse_blocked(self) -> None:
        """ValueError if other folders depend on this one."""
        if self.blocked_by:
            raise ValueError(f"{self.path} cannot be removed: {format_count(len(self.blocked_by), 'folder')} made from "
                             f"it: {', '.join(self.blocked_by)}\nhint: python -m jobs rm {self.blocked_by[0]}")


def plan_removal(root: str, path: str, stages: Sequence[str], keys: ReleaseKeys | None = None, *,
                 published: bool = False) -> Removal:
    """The removal of a folder. `stages`: all stage folders of the root, as `status` lists them.

    `published`: also a dataset with published versions; `keys` sign that it was removed.

    ValueError if there is no such folder, or if it is published and `published` is not set. DamagedFile if the plan
    of a folder outside is damaged: it may depend on it.
    """
    root = storage.normalize(root)
    parent, _, name = storage.join(root, path).rpartition("/")
    is_there = name in storage.list_folders(parent)
    if not is_there and not storage.exists(_mark(root, path)):
        refuse_unknown_target(root, path)
        raise ValueError(f"there is no {path} in {root}\nhint: {suggest(path, stages)}")
    current = _read_pointer(root, path, keys)
    if current and current.is_removed and not storage.exists(_mark(root, path)):
        current.refuse_removed()
    if not (current and (published or current.is_removed)):
        _refuse_published(root, path)
    if current and not current.is_removed:
        current.keys.refuse_unsigned(current.name, current.document)
    inputs = {stage: _read_inputs(root, stage, is_removed=is_within(stage, path)) for stage in stages}
    own = {stage: paths for stage, paths in inputs.items() if is_within(stage, path)}
    sizes = [length or 0 for _, length in storage.walk(storage.join(root, path))] if is_there else []
    return Removal(root, path, tuple(_removal_order(own)), len(sizes), sum(sizes), current,
                   _blockers(root, path, inputs))


def _blockers(root: str, path: str, inputs: dict[str, list[str]]) -> tuple[str, ...]:
    """The folders outside `path` that were made from it, also by way of others, in an order of removal."""
    users, found = set(_versions_with_files(root, path)), {path}
    while found:
        found = {stage for stage, paths in inputs.items() if not is_within(stage, path) and stage not in users
                 and any(is_within(used, place) for used in paths for place in found | users)}
        users |= found
    order = _removal_order({user: inputs.get(user, []) for user in users})
    return tuple(user for user in order if not any(is_within(user, other) for other in users if other != user))


def _read_pointer(root: str, path: str, keys: ReleaseKeys | None) -> Published | None:
    """The pointer of a dataset that was published; None if the folder is something else."""
    kind, name, *below = path.split("/")
    if kind != "datasets" or below:
        return None
    current = Published.load(root, name, keys)
    return current if current.document or name in list_published(root) else None


def remove(removal: Removal) -> None:
    """Remove a folder; StageFailed if another command works in it, or has published it since it was planned."""
    root, path = removal.root, removal.path
    try:
        with storage.hold_lease(root, path, exclusive=True):
            if removal.published:
                _withdraw(removal.published)
            else:
                _refuse_published(root, path)
                storage.put_json({"path": path}, _mark(root, path))
            for stage in removal.stages:
                kind, name, *below = stage.split("/")
                if kind == "runs" and not below:
                    Run(root, name).forget(0)
                empty_folder(storage.join(root, stage))
            if removal.published:
                _remove_rest(removal.published)
            else:
                storage.remove_tree(storage.join(root, path))
                _remove_empty_folders(root, path)
    except storage.LeaseConflict as error:
        raise StageFailed(f"rm: {error}") from None
    storage.remove(_mark(root, path))


def _withdraw(current: Published) -> None:
    """Publish that a dataset is removed, and mark its versions, so that no command publishes one of them.

    StageFailed if a run or a dataset uses it now, or if another command has published it.
    """
    root, name = current.root, current.name
    if users := sorted({user for users in find_consumers(root, name).values() for user in users
                        if not is_within(user, f"datasets/{name}")}):
        raise StageFailed(f"{name} is used by {', '.join(users)}\nhint: python -m jobs rm {users[0]}")
    storage.put_json({"path": f"datasets/{name}"}, _mark(root, f"datasets/{name}"))
    if not current.withdraw():
        raise StageFailed(f"another command published a version of {name} meanwhile\n"
                          f"hint: python -m jobs versions {name}")
    for version in current.versions():
        dataset = Dataset(root, name, version)
        while not version_marks.is_removing(dataset):
            version_marks.mark_removing(dataset, version_marks.read_mark(dataset))


def _remove_rest(current: Published) -> None:
    """Remove all of a dataset but the pointer and the marks of its versions."""
    for version in current.versions():
        folder = storage.join(current.folder, version)
        for below in storage.list_folders(folder):
            storage.remove_tree(storage.join(folder, below))
        for file in storage.list_names(folder):  # also unfinished ones
            if file != version_marks.NAME:
                storage.remove(storage.join(folder, file))


def _mark(root: str, path: str) -> str:
    return storage.join(root, f"removing+{path.replace('/', '+')}.json")


def _remove_empty_folders(root: str, path: str) -> None:
    """Remove the folders above `path` that are empty now. An object store has none."""
    folder = os.path.dirname(path)
    with contextlib.suppress(OSError):
        while folder and storage.is_local(root):
            storage.local_path(storage.join(root, folder)).rmdir()
            folder = os.path.dirname(folder)


def _refuse_published(root: str, path: str) -> None:
    """ValueError if the folder is or has a part of a published version, or of one that is being published."""
    kind, name, *below = path.split("/")
    if kind != "datasets" or (len(below) > 1 and below[1] not in RELEASED_STAGES):
        return
    if not below and name in list_published(root):
        raise ValueError(f"{name} is published, and readers may use it\nhint: to remove all versions: "
                         f"python -m jobs rm {name} --published{find_sign_option(root, name)}; to remove old ones: "
                         f"python -m jobs gc {name}")
    for version in below[:1] or storage.list_folders(storage.join(root, path)):
        dataset = Dataset(root, name, version)
        is_marked = version_marks.publishing_sequence(version_marks.read_mark(dataset)) is not None
        if release_files.has_release(dataset) or is_marked:
            raise ValueError(f"{name}@{version} was published, and a published version never changes\n"
                             f"hint: python -m jobs gc {name}; or python -m jobs versions {name}")


def _read_inputs(root: str, stage: str, *, is_removed: bool) -> list[str]:
    """The folders that a stage was made from; none if its plan is missing, or damaged and it is removed itself."""
    try:
        inputs = (read_inputs(root, stage) or {}).get("inputs", {})
    except storage.DamagedFile:
        if not is_removed:
            raise
        inputs = {}
    return [described["path"] for described in inputs.values() if described["path"]]


def _versions_with_files(root: str, path: str) -> list[str]:
    """The other versions of a dataset whose manifests name files in the folder: a version takes over shards."""
    kind, name, *below = path.split("/")
    if kind != "datasets" or not below:
        return []
    others = [version for version in storage.list_folders(storage.join(root, "datasets", name)) if version != below[0]]
    return [f"datasets/{name}/{version}" for version in others
            if any(is_within(url, storage.join(root, path)) for url in files_of(root, name, version))]


def _removal_order(inputs: dict[str, list[str]]) -> list[str]:
    """Stages in the order of removal: after the stages that were made from it, and after those in its folder."""
    pending, order = dict(inputs), []
    while pending:
        needed = {stage for stage in pending for other, paths in pending.items() if other != stage and (
            is_within(other, stage) or any(is_within(used, stage) for used in paths))}
        free = sorted(pending.keys() - needed) or sorted(pending)  # plans that were tampered with may form a circle
        order += free
        for stage in free:
            del pending[stage]
    return order
