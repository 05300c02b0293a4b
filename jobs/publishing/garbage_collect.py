"""Remove old versions of a published dataset that nothing needs.

Another command may publish or build a version at the same time. So gc takes an exclusive lease on a version, marks it
for removal, and reads the pointer again before each file. Ages come from the file times of the store.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.publishing.config import GcConfig
from jobs.publishing.consumers import find_consumers, find_samples
from jobs.publishing.whole_versions import find_fault, find_replacement, find_way_back, is_removed, list_publications
from jobs.telemetry import tables
from jobs.telemetry.units import format_bytes
from pipeline import storage
from pipeline.datasets.dataset import RELEASED_STAGES, Dataset
from pipeline.datasets.names import version_number
from pipeline.datasets.pointer import parse_pointer, read_pointer
from pipeline.releases import version_marks
from pipeline.releases.published import Published
from pipeline.stages.documents import check_record
from pipeline.stages.manifest import read_manifest
from pipeline.stages.plan import read_items
from pipeline.stages.types import StageFailed
from pipeline.storage import DamagedFile
from pipeline.versions.verify import find_faults

_log = logging.getLogger(__name__)
_PUBLISHING_S = 3600.0  # how long gc waits for a command that has marked a version and not yet published it
_STAYS = {"release.json", "mark.json"}  # they say that the version existed, and that it was removed


def collect_garbage(root: str, name: str, config: GcConfig, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove versions that nothing needs. Files that later versions took over stay. Each version with its outcome.

    Samples do not keep a version. "samples" names the samples that lose their credits with it.

    DamagedFile if a run or a list of neighbors does not tell what it needs.

    A version that stays and cannot be read has its fault under "unreadable". It may have taken over files of any
    earlier version, so these stay too.
    """
    root = storage.normalize(root)
    with _read_clock(root, name, dry_run) as now:
        if not dry_run:
            _remove_leftovers(root, name, now)
        marks = {version: version_marks.read_mark(Dataset(root, name, version))
                 for version in storage.list_folders(storage.join(root, "datasets", name))}
        current = Published.load(root, name)  # after the marks: a version that is published later has another mark
        current.refuse_removed()
        if not current.version:
            raise ValueError(f"nothing of {name} is published in {root}: nothing is old\n"
                             f"hint: python -m jobs versions {name}")
        _refuse_damaged(current, config.verify)
        versions = _choose(current, config, now)
        stays = _keep_unreadable(current, versions)
        samples = find_samples(root, name)
        for entry in versions:
            if entry["kept"] and not dry_run:
                _clear_mark(Dataset(root, name, entry["version"]))
            elif not entry["kept"]:
                if lost := samples.get(entry["version"]):
                    entry["samples"] = lost
                entry |= _remove(current, entry["version"], marks.get(entry["version"]), stays, now, dry_run)
    return versions


def _refuse_damaged(current: Published, verify: bool) -> None:
    """StageFailed if the published version is damaged: an earlier one may have to replace it."""
    damaged = _read_version(current, current.version) if verify else []
    if fault := find_fault(current, current.document, damaged) or ", ".join(damaged[:1]):
        raise StageFailed(f"the published {current.name}@{current.version} is damaged: {fault}\n"
                          f"hint: {find_way_back(current, damaged)}")


def _read_version(current: Published, version: str) -> list[str]:
    """URLs of the damaged files of a version, by reading all of them."""
    dataset = Dataset(current.root, current.name, version)
    return [storage.join(current.root, fault["path"]) for stage in RELEASED_STAGES if dataset.is_sealed(stage)
            for fault in find_faults(current.root, dataset.path(stage))]


@contextlib.contextmanager
def _read_clock(root: str, name: str, dry_run: bool) -> Iterator[float]:
    """The time of the store while gc holds a lease. A dry run writes nothing, so it has the time of this machine."""
    if dry_run:
        yield time.time()
        return
    with storage.hold_lease(root, f"gc/{name}") as lease:
        yield lease.now()


def _remove_leftovers(root: str, name: str, now: float) -> None:
    """Remove what killed commands left unfinished in a root, and their leases."""
    storage.remove_ended_leases(root, now)
    count = storage.remove_unfinished(root, now)
    count += sum(storage.remove_unfinished(storage.join(root, folder), now)
                 for folder in ("takedowns", f"published/{name}", f"datasets/{name}"))
    # No other command cleans the folders of sealed stages that are not published.
    count += sum(storage.remove_unfinished(storage.join(root, folder), now, below=True)
                 for folder in ("datasets", "runs"))
    if count:
        _log.info("gc: removed %d files and uploads that killed commands left unfinished", count)


def _choose(current: Published, config: GcConfig, now: float) -> list[dict[str, Any]]:
    """Every version with the reason to keep it; no reason for versions to remove."""
    root, name = current.root, current.name
    pinned = find_consumers(root, name, skip_damaged=False)
    all_versions = current.versions()
    removed = {version for version in all_versions if is_removed(root, name, version)}
    past = [version for version in all_versions if current.unpublished_since(version) is not None
            and version not in removed]
    newest = _newest_whole(current, past, config)

    def reason(version: str) -> str:
        if version == current.version:
            return "published"
        if version in removed:  # a command that was killed may have left files
            return ""
        if version in pinned:
            return f"pinned by {', '.join(pinned[version])}"
        if version in newest:
            return f"one of the newest {config.keep}"
        dataset = Dataset(root, name, version)
        if (version not in past and not storage.exists(storage.join(current.folder, version, "rebuild.json"))
                and any(dataset.is_sealed(stage) for stage in RELEASED_STAGES)):
            return "not made by rebuild"
        return "leased" if now - _last_used(current, version) < 3600 * config.lease else ""

    return [{"version": version, "kept": reason(version)} for version in all_versions
            if version not in removed or list(_removable(current, version))]


def _newest_whole(current: Published, versions: list[str], config: GcConfig) -> set[str]:
    """The newest undamaged versions, `config.keep` of them: a rollback needs an undamaged one."""
    publications, newest = list_publications(current), set[str]()
    for version in reversed(versions):
        if len(newest) == config.keep:
            break
        fault = find_fault(current, publications[version]) if version in publications else ""
        if not fault and config.verify and (damaged := _read_version(current, version)):
            fault = f"{damaged[0]} is damaged"
        if fault:
            _log.warning("gc: %s@%s does not count among the newest versions: %s", current.name, version, fault)
        else:
            newest.add(version)
    return newest


def _keep_unreadable(current: Published, versions: list[dict[str, Any]]) -> set[str]:
    """URLs of the files that the versions that stay name.

    A version that cannot be read gets its fault under "unreadable", and all versions before it are kept.
    """
    stays, last_unreadable = set[str](), ""
    for entry in versions:
        if entry["kept"]:
            try:
                stays |= files_of(current.root, current.name, entry["version"])
            except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError) as error:
                entry["unreadable"] = storage.first_line(error)
                last_unreadable = entry["version"]
                _log.warning("gc: %s@%s cannot be read: %s", current.name, last_unreadable, entry["unreadable"])
    for entry in versions:
        if not entry["kept"] and version_number(entry["version"]) < version_number(last_unreadable):
            entry["kept"] = f"{last_unreadable} cannot be read and may need its files"
    return stays


def refuse_unreadable(root: str, name: str, versions: list[dict[str, Any]]) -> None:
    """DamagedFile if versions that stay could not be read, and the command for the first."""
    if unreadable := {entry["version"]: entry["unreadable"] for entry in versions if "unreadable" in entry}:
        current = Published.load(storage.normalize(root), name)
        faults = "; ".join(f"{name}@{version} ({fault})" for version, fault in unreadable.items())
        raise DamagedFile(f"{len(unreadable)} versions stay and cannot be read, so earlier versions stay too: "
                          f"{faults}\nhint: {find_replacement(current, next(iter(unreadable)))}")


def _read_sealed(folder: str) -> dict[str, Any] | None:
    """The manifest of a sealed folder; None if it is damaged. A manifest of a newer program is an error."""
    try:
        return read_manifest(folder, "")
    except (DamagedFile, FileNotFoundError) as error:
        _log.warning("gc: %s cannot be read: %s", folder, storage.first_line(error))
        return None


def _last_used(current: Published, version: str) -> float:
    """The time when a version was replaced, or when a command last worked on it."""
    if (since := current.unpublished_since(version)) is not None:
        return since
    base = storage.join(current.folder, version)
    times = [0.0]
    for path in ("rebuild.json", "gates.json", *(f"{stage}/{file}" for stage in RELEASED_STAGES for file in
                                                 ("plan.json", "progress.json", "manifest.json"))):
        try:
            times.append(storage.modified_time(storage.join(base, path)))
        except FileNotFoundError:
            continue
    return max(times)


def files_of(root: str, name: str, version: str) -> set[str]:
    """URLs of the files that the manifests and plans of a version name."""
    urls, dataset = set(), Dataset(root, name, version)
    for stage_name in RELEASED_STAGES:
        folder = dataset.folder(stage_name)
        is_sealed = dataset.is_sealed(stage_name)
        if manifest := _read_sealed(folder) if is_sealed else None:
            records: Any = manifest["items"]
        else:  # in progress or damaged: the records, and the files that its plan takes over
            files = storage.list_files(storage.join(folder, "records"))
            records = [check_record(storage.read_json(url), url, {})
                       for url in (storage.join(folder, "records", file) for file in files)]
            if is_sealed and len(records) < len(read_items(folder)):
                raise DamagedFile(f"the manifest of {folder} is damaged, and its records do not name all its files\n"
                                  f"hint: restore it from a backup; or remove {folder}")
            if storage.exists(storage.join(folder, "plan.json")):
                records += _to_be_taken(dataset, stage_name, folder)
        urls |= {storage.manifest_file_url(folder, entry["name"]) for record in records for entry in record["files"]}
    return urls


def _to_be_taken(dataset: Dataset, stage_name: str, folder: str) -> list[dict[str, Any]]:
    """Records of other versions that the items of a plan will take over, their files as full URLs."""
    records = []
    for item in read_items(folder):
        for key in ("last", "vectors", "of"):
            record = item.inputs.get(key)
            version = item.inputs.get("version") or item.inputs.get("last")
            if isinstance(record, dict) and isinstance(version, str):
                there = dataset.other_version(version).folder("shards" if key == "of" else stage_name)
                records.append({"files": [entry | {"name": storage.manifest_file_url(there, entry["name"])}
                                        for entry in record["files"]]})
    return records


def _remove(current: Published, version: str, mark: bytes | None, stays: set[str], now: float, dry_run: bool
            ) -> dict[str, Any]:
    """Remove the files of a version that nothing needs: counts of files and bytes, or the reason to keep it."""
    if dry_run:
        return _remove_files(current, version, stays, dry_run=True)
    dataset = Dataset(current.root, current.name, version)
    if _is_being_published(current, dataset, mark, now):
        return {"kept": "being published"}
    try:
        with storage.hold_lease(current.root, f"datasets/{current.name}/{version}", exclusive=True):
            if not version_marks.is_removing(dataset) and not version_marks.mark_removing(dataset, mark):
                return {"kept": "being published"}
            if Published.load(current.root, current.name).version == version:
                version_marks.mark_kept(dataset)
                return {"kept": "published"}
            return _remove_files(current, version, stays, dry_run=False)
    except storage.LeaseConflict as error:
        return {"kept": f"in use by {error.holder}"}


def _clear_mark(dataset: Dataset) -> None:
    """Remove the mark for removal of a whole version that stays: gc was killed, or another process forged the mark."""
    if not version_marks.is_removing(dataset):
        return
    with contextlib.suppress(storage.LeaseConflict), storage.hold_lease(
            dataset.root, f"datasets/{dataset.name}/{dataset.version}", exclusive=True):
        if not is_removed(dataset.root, dataset.name, dataset.version):
            version_marks.mark_kept(dataset)
            _log.warning("gc: %s@%s was marked for removal and stays: the mark is removed", dataset.name,
                         dataset.version)


def _is_being_published(current: Published, dataset: Dataset, mark: bytes | None, now: float) -> bool:
    """Whether a command marked a version to publish it, and has not done so yet."""
    sequence = version_marks.publishing_sequence(mark)
    sequences = [document["sequence"] for document in current.history() if document["version"] == dataset.version]
    if sequence is None or any(number >= sequence for number in sequences):
        return False
    if not sequences and version_number(dataset.version) < current.number:
        return False  # a rebuild does not publish a version that is older than the published one
    return now - version_marks.mark_time(dataset) < _PUBLISHING_S


def _remove_files(current: Published, version: str, stays: set[str], *, dry_run: bool) -> dict[str, Any]:
    counts = {"removed_files": 0, "removed_bytes": 0, "taken_over": 0}
    for url, length in _removable(current, version):
        if url in stays:
            counts["taken_over"] += 1
            continue
        if not dry_run:
            _refuse_published(current, version)
            storage.remove(url)
        counts["removed_files"] += 1
        counts["removed_bytes"] += length or 0
    if not dry_run and storage.is_local(current.root):
        _remove_empty_folders(storage.local_path(storage.join(current.folder, version)))
    return counts


def _remove_empty_folders(folder: Path) -> None:
    """Remove the empty folders below one, also one in the place of a file, which would look like a damaged file."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not if there is something in it
                path.rmdir()


def _removable(current: Published, version: str) -> Iterator[tuple[str, int | None]]:
    """URL and bytes of the files of a version, those that stay for other versions too; manifests come first.

    So nothing begins to read a version that is half gone.
    """
    base = storage.join(current.folder, version)
    files = sorted(storage.walk(base), key=lambda entry: (not entry[0].endswith("manifest.json"), entry[0]))
    for file, length in files:
        if file not in _STAYS:
            yield storage.join(base, file), length


def _refuse_published(current: Published, version: str) -> None:
    data = read_pointer(current.root, current.name)
    if data != current.data and (parse_pointer(data or b"") or {}).get("version") == version:
        raise StageFailed(f"{current.name}@{version} was published while gc removed it\n"
                          f"hint: python -m jobs repair {current.name} --root {storage.quote(current.root)}")


def removed_table(versions: list[dict[str, Any]], dry_run: bool) -> str:
    """One line for each version: kept or removed."""
    verb = "would be removed" if dry_run else "removed"
    return tables.render([[version["version"], f"kept: {version['kept']}"
                           + ("; cannot be read" if "unreadable" in version else "") if version["kept"] else
                           f"{verb}: {version['removed_files']} files, {format_bytes(version['removed_bytes'])}"
                           + (f"; {version['taken_over']} files stay, for later versions took them over"
                              if version["taken_over"] else "")
                           + (f"; credits {'would be' if dry_run else 'are'} lost for {', '.join(version['samples'])}"
                              if "samples" in version else "")] for version in versions])
