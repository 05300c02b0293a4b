"""Which versions of a published dataset are undamaged, and the commands that replace a damaged one."""

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jobs.publishing.consumers import find_consumers
from jobs.telemetry.units import format_count
from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.datasets.names import version_number
from pipeline.datasets.pointer import DamagedPointer
from pipeline.releases import release_files, version_marks
from pipeline.releases.published import Published
from pipeline.releases.release_files import find_missing_files
from pipeline.storage import DamagedFile

_IN_EACH_RELEASE = ("shards", "embeddings", "index")  # gc removes their manifests first
_FACTS = ("number", "content", "samples", "recall@10")  # of a version, in its release and in each publication


def list_publications(current: Published) -> dict[str, dict[str, Any]]:
    """The last accepted publication of each version. The version that was published last comes last."""
    publications: dict[str, dict[str, Any]] = {}
    for document in current.history():
        if not current.keys.find_fault(current.name, document):
            publications.pop(document["version"], None)
            publications[document["version"]] = document
    return publications


def find_references(current: Published) -> dict[str, str]:
    """The versions that were published according to later publications and releases, and what says so.

    It is known even if the release of such a version and its entry in the history are lost.
    """
    references: dict[str, str] = {}
    for document in current.history():
        for key in ("previous", "rolled_back"):
            if version := document.get(key):
                references.setdefault(version, f"publication {document['sequence']} took its place")
    for version in current.versions():
        with contextlib.suppress(DamagedFile):
            release, _ = release_files.read_release(Dataset(current.root, current.name, version))
            if release and release.get("base"):
                references.setdefault(release["base"], f"{version} was built on it")
    return references


def find_later_base(current: Published) -> str:
    """A sentence if a release was built on a version that is newer than all publications, "" if none was.

    The pointer and the end of the history were removed or replaced then. A version whose rebuild was killed has a
    release too, but no other was built on it.
    """
    if current.keys.accepted:  # it trusts signed publications alone, and releases have no signature of their own
        return ""
    newest = max((version_number(document.get(key) or "") for document in current.history()
                  for key in ("version", "previous", "rolled_back")), default=0)
    return next((f"is an older one: {said}, and no publication names {version}"
                 for version, said in find_references(current).items() if version_number(version) > newest
                 ), "")


def find_fault(current: Published, document: Mapping[str, Any], damaged: Collection[str] = ()) -> str:
    """A fault of the version of a publication: its release, a manifest or a file; "" if all is there.

    Sizes are compared, and the hashes of files that are newer than their manifest or may be `damaged` (URLs).
    """
    try:
        dataset = Published(current.root, current.name, None, dict(document)).open()
        missing = find_missing_files(dataset, dict(dataset.trusted), suspects=damaged)
    except DamagedFile as error:
        return storage.first_line(error)
    return describe_missing(missing)


def describe_missing(urls: Sequence[str]) -> str:
    """The fault of a version whose files are missing or changed; "" if there are none."""
    return f"{format_count(len(urls), 'file')} missing or changed, the first is {urls[0]}" if urls else ""


def find_release_fault(dataset: Dataset) -> str:
    """A fault of a version that may never have been published, by its release; "" if it has none or is whole."""
    try:
        release, _ = release_files.read_release(dataset)
        missing = find_missing_files(dataset, release["manifests"]) if release else []
    except DamagedFile as error:
        return storage.first_line(error)
    return describe_missing(missing)


def is_signed(current: Published, version: str) -> bool:
    """Whether a publication of a version has a signature, by whatever key."""
    return any(document["version"] == version and "signature" in document for document in current.history())


def find_false_facts(current: Published, document: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a release with which its publication does not agree; {} if that is not the published release."""
    try:
        release, data = release_files.read_release(Dataset(current.root, current.name, document["version"]))
    except DamagedFile:
        return {}
    if release is None or hashlib.sha256(data).hexdigest() != document["release"]:
        return {}
    return {key: release[key] for key in _FACTS if key in document and key in release and document[key] != release[key]}


def find_false_entries(current: Published) -> dict[str, dict[str, Any]]:
    """The URLs of the pointer and of entries of the history that do not agree with their release, and its values."""
    documents = {url: document for url, document in current.entries.items() if document}
    documents[storage.join(current.folder, "current.json")] = current.document
    facts = storage.map_urls(lambda url: find_false_facts(current, documents[url]), documents)
    return {url: values for url, values in zip(documents, facts, strict=True) if values}


def is_removed(root: str, name: str, version: str) -> bool:
    """Whether gc removed a version. Its release, its mark and files that later versions use still exist.

    A mark alone is no proof: it may be forged, or gc was killed before it removed a file.
    """
    dataset = Dataset(root, name, version)
    if version_marks.read_mark(dataset) is None:
        return release_files.has_release(dataset) and not _has_manifest(dataset, "shards")
    if not version_marks.is_removing(dataset):
        return False
    return not release_files.has_release(dataset) or not all(_has_manifest(dataset, stage)
                                                             for stage in _IN_EACH_RELEASE)


def _has_manifest(dataset: Dataset, stage: str) -> bool:
    """Whether a stage has a manifest, or something odd in its place, which gc has not put there."""
    try:
        return dataset.is_sealed(stage)
    except DamagedFile:
        return True


def refuse_removed(dataset: Dataset, stage_name: str) -> None:
    """ValueError if a version was removed, with the command that makes a stage of the published version."""
    if not is_removed(dataset.root, dataset.name, dataset.version):
        return
    current = Published.load(dataset.root, dataset.name)
    current.refuse_removed()
    command = (f"python -m jobs rebuild {dataset.name} --source SOURCE{current.sign_option}"
               if stage_name == "shards" else Dataset(dataset.root, dataset.name, current.version).command(stage_name))
    raise ValueError(f"{dataset.name}@{dataset.version} was removed; the published version is {current.version}\n"
                     f"hint: {command}")


def find_earlier_version(current: Published, damaged: Collection[str] = ()) -> tuple[str, dict[str, str]]:
    """The newest undamaged version before the published one ("" if none), and the faults of later versions."""
    faults: dict[str, str] = {}
    for version, document in reversed(list_publications(current).items()):
        if version_number(version) < current.number and not is_removed(current.root, current.name, version):
            if not (fault := find_fault(current, document, damaged)):
                return version, faults
            faults[version] = fault
    return "", faults


def find_sign_option(root: str, name: str) -> str:
    """The option that a command needs to publish a version of a dataset, or to remove it; "" without signatures."""
    try:
        return Published.load(root, name).sign_option
    except DamagedPointer:  # readers name it
        return ""


def find_way_back(current: Published, damaged: Collection[str] = ()) -> str:
    """The commands that replace a damaged published version by an undamaged one.

    `damaged`: URLs of files that may be damaged. A plain `rebuild` does not read the files that it takes over.
    """
    sign = current.sign_option
    read = " --thorough" if find_fault(current, current.document, damaged) and not find_fault(
        current, current.document) else ""
    rebuild = f"python -m jobs rebuild {current.name} --source SOURCE{read}{sign}"
    version, _ = find_earlier_version(current, damaged)
    return f"python -m jobs rollback {current.name} --to {version}{sign}; or {rebuild}" if version else rebuild


def find_replacement(current: Published, version: str, damaged: Collection[str] = ()) -> str:
    """The command for a damaged version: another takes its place, or gc removes it.

    `damaged`: URLs of files that may be damaged. By itself gc does not read the files of a version.
    """
    if version == current.version or find_fault(current, current.document, damaged):  # gc needs a whole published one
        return find_way_back(current, damaged)
    document = list_publications(current).get(version)
    read = " --verify" if document and not find_fault(current, document) else ""
    command = f"python -m jobs gc {current.name} --lease 0{read}"
    users = find_consumers(current.root, current.name).get(version)
    if not users:
        return command
    return f"restore datasets/{current.name}/{version} from a backup; or remove {', '.join(users)}, then {command}"
