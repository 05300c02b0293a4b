"""The command that replaces a damaged folder, as `verify` names it."""

from collections.abc import Collection, Sequence

from jobs.publishing.check_published import list_published
from jobs.publishing.whole_versions import (
    find_false_facts,
    find_later_base,
    find_references,
    find_replacement,
    find_way_back,
    list_publications,
)
from jobs.runs.run import Run
from pipeline import storage
from pipeline.datasets.dataset import RELEASED_STAGES, Dataset, datasets
from pipeline.datasets.names import is_name
from pipeline.releases import release_files
from pipeline.releases.published import Published
from pipeline.releases.signatures import ReleaseKeys
from pipeline.storage import DamagedFile
from pipeline.takedowns import takedown_list

_OF_RUNS = {"samples", "judges", "evaluations"}


def find_command(root: str, paths: Sequence[str], keys: ReleaseKeys) -> str:
    """The command that repairs the first of `paths`, damaged folders and files. The log writes its `--root`."""
    path = paths[0]
    if denied := _find_denied(storage.manifest_file_url(root, path)):
        return f"let this user read {storage.quote(denied)}"
    command = _find_command(root, paths, keys)
    if "jobs repair " in command:  # it removes nothing that is no file: that may not be ours
        odd = [url for place in (path, takedown_list.NAME)
               if (url := storage.join(root, place)) not in command and _is_odd(url)]
        return "".join(f"remove {url}; then " for url in odd) + command
    return command


def _find_denied(url: str) -> str:
    """The URL that this user may not read: a file, or the plan or the manifest of a folder. That is no damage."""
    for file in (url, storage.join(url, "plan.json"), storage.join(url, "manifest.json")):
        try:
            storage.read_range(file, 0, 1)
        except PermissionError:
            return file
        except (OSError, ValueError):
            continue
    return ""


def _is_odd(url: str) -> bool:
    try:
        storage.refuse_special_file(url)
    except FileNotFoundError:
        return False
    except DamagedFile:
        return True
    return False


def _find_command(root: str, paths: Sequence[str], keys: ReleaseKeys) -> str:
    path = paths[0]
    if storage.is_whole_address(path):
        return _mend_adopted(root, path)
    if path.startswith("takedowns/"):
        return f"python -m jobs repair {(list_published(root) or ['NAME'])[0]}"
    kind, name, *rest = path.split("/")
    if kind in {"datasets", "published"} and rest and is_name(name):
        return _mend_dataset(root, name, kind, rest, keys, {storage.join(root, path) for path in paths})
    if kind == "runs" and len(rest) > 1 and rest[0] in _OF_RUNS:
        return f"python -m jobs rm runs/{name}/{rest[0]}/{rest[1]}"
    if kind == "runs":  # a command that trains again would remove the checkpoints that are whole
        return (f"restore {storage.join(root, kind, name)} from a backup{_train_again(Run(root, name))}; or, to remove "
                f"it with its samples: python -m jobs rm runs/{name}")
    return f"python -m jobs demo, after {storage.join(root, kind, name)} is removed"


def _train_again(run: Run) -> str:
    """Another way for a run that has lost its last checkpoint, "" for other damage."""
    try:
        lost = run.lost_step()
    except DamagedFile:  # its manifest
        lost = None
    return "" if lost is None else "; or repeat the command that made it, which makes the lost steps again"


def _mend_adopted(root: str, tar: str) -> str:
    """The way back for a tar that a dataset adopted where it lies: only its owner has another copy."""
    dataset = next((dataset for dataset in datasets(root) if tar in _adopted_tars(dataset)), Dataset(root, "NAME"))
    return (f"restore {storage.quote(tar)} from a backup; or, to adopt the tars as they are now: "
            f"{dataset.command('shards')} --adopt --overwrite")


def _adopted_tars(dataset: Dataset) -> set[str]:
    """The URLs of the tars that a dataset adopted; none if its manifest cannot be read, or it adopted none."""
    try:
        items = dataset.manifest("shards")["items"]
    except (ValueError, OSError):
        return set()
    return {entry["name"] for record in items for entry in record["files"] if storage.is_whole_address(entry["name"])}


def _mend_dataset(root: str, name: str, kind: str, rest: list[str], keys: ReleaseKeys, damaged: Collection[str]
                  ) -> str:
    try:
        current = Published.load(root, name, keys)
    except DamagedFile as error:
        return str(error).partition("\nhint: ")[2]
    version, stage = rest[0], "/".join(rest[1:3] if rest[1:2] in (["scores"], ["neighbors"]) else rest[1:2])
    dataset = Dataset(root, name, version)
    is_unpublished = not current.version and (version == "current.json" or release_files.has_release(dataset))
    if stage == "forgotten.json":
        return f"python -m jobs repair {name}"
    if kind == "published" or is_unpublished or (
            version == "current.json" and (find_false_facts(current, current.document) or find_later_base(current))):
        return f"python -m jobs repair {name}{current.repair_options()}"
    if stage in RELEASED_STAGES or stage == "release.json" or version == "current.json":
        if version in {current.version, "current.json"}:
            return find_way_back(current, damaged)
        if (version in list_publications(current) or version in find_references(current)
                or release_files.has_release(dataset)):
            return find_replacement(current, version, damaged)
    if stage == "clip-retrieval":
        return (f"python -m jobs rm {dataset.path(stage)}; then "
                f"python -m jobs embed {name}@{version} --export clip-retrieval")
    adopt = " --adopt" if stage == "shards" and _adopted_tars(dataset) else ""
    return f"{dataset.command(stage)}{adopt} --overwrite"
