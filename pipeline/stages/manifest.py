"""Read the manifest of a sealed folder, and detect stale inputs."""

import contextlib
import hashlib
import os
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.documents import check_manifest, check_shape
from pipeline.stages.stage import Stage
from pipeline.stages.types import Claim
from pipeline.storage import DamagedFile

REMOVED_FOR_AGE = "removed.json"
"""The file beside the checkpoints of a run that says through which step they were removed for newer ones."""
_KEPT_FILES = 16
_kept: OrderedDict[str, tuple[str, bytes]] = OrderedDict()  # url -> stamp, content
_kept_lock = threading.Lock()


def _read_if_changed(url: str) -> bytes:
    """The content of `url`. This process keeps it and reads it again when the file was replaced."""
    stamp = storage.stamp(url)
    with _kept_lock:
        known, data = _kept.get(url, ("", b""))
        if stamp and stamp == known:
            _kept.move_to_end(url)
            return data
    data = storage.read_bytes(url)
    with _kept_lock:
        _kept[url] = stamp, data  # if it was replaced since the stamp was taken, the next stamp differs
        _kept.move_to_end(url)
        while len(_kept) > _KEPT_FILES:
            _kept.popitem(last=False)
    return data


class NotSealed(ValueError):
    """A stage folder has no manifest: its stage did not run, or is not finished."""


def _text(command: str | Callable[[], str]) -> str:
    return command if isinstance(command, str) else command()


def read_manifest(folder: str, command: str | Callable[[], str], sha256: str | None = None) -> dict[str, Any]:
    """The manifest of a sealed stage folder; ValueError with the `command` that would finish it, or what it returns.

    ValueError too if its bytes are not those of `sha256`, the hash under which it was published.
    """
    try:
        data = _read_if_changed(storage.join(folder, "manifest.json"))
    except FileNotFoundError:
        raise NotSealed(f"{folder} is not sealed: it has no manifest.json\nhint: {_text(command)}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedFile(f"{folder}/manifest.json is not the one that was published: its files were changed\n"
                          f"hint: python -m jobs verify --against current")
    manifest = storage.parse_json(data, storage.join(folder, "manifest.json"))
    check_manifest(manifest, f"{folder}/manifest.json")
    if isinstance(manifest["items"], dict):
        manifest["items"] = records.load(folder, manifest["items"], records.records)
    return manifest


def changed_inputs(root: str, document: dict[str, Any], *, removed: bool = True) -> list[str]:
    """Names of the inputs of a plan or manifest whose folder holds other content than when it was planned.

    `removed`: count folders that do not exist any more. A folder that is being made again always counts.
    """
    changed = []
    for name, described in document.get("inputs", {}).items():
        if described["path"]:
            folder = storage.join(root, described["path"])
            url = storage.join(folder, "manifest.json")
            try:
                manifest = storage.parse_json(_read_if_changed(url), url)
            except (FileNotFoundError, NotADirectoryError):
                if _was_removed_for_age(folder):
                    continue
                if not removed and not storage.exists(storage.join(folder, "plan.json")):
                    continue
                manifest = None
            except ValueError:
                manifest = None
            if not isinstance(manifest, dict) or manifest.get("content") != described["digest"]:
                changed.append(name)
    return changed


def _was_removed_for_age(folder: str) -> bool:
    """Whether a folder that is gone belonged to a published version, or was an old checkpoint. Neither has changed."""
    parent, _, name = folder.rpartition("/")
    if storage.exists(storage.join(parent, "release.json")):
        return True
    try:
        url = storage.join(parent, REMOVED_FOR_AGE)
        return name.isdigit() and int(name) <= check_shape(storage.read_json(url), url, {"through": int}, "")["through"]
    except (FileNotFoundError, ValueError):
        return False


def stale_inputs(stage: Stage, claim: Claim) -> str:
    """A sentence if inputs of a stage changed since it was planned, "" if not. An input that is gone did not change."""
    changed = changed_inputs(stage.root, {"inputs": claim.inputs}, removed=False)
    if not changed:
        return ""
    return (f"{stage.name}: {', '.join(changed)} changed since {stage.folder} was planned: expected the content that "
            f"plan.json names, got another\nhint: {stage.replacement}")


def without_run_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its `run` parts (seconds, hosts, dates): equal for equal results."""
    result = {key: value for key, value in manifest.items() if key != "run"}
    result["items"] = [{key: value for key, value in record.items() if key != "run"} for record in manifest["items"]]
    return result


def is_sealed(stage: Stage) -> bool:
    """Whether the folder of `stage` is finished."""
    return storage.exists(storage.join(stage.folder, "manifest.json"))


def sealed_input(root: str, path: str, command: str | Callable[[], str], sha256: str | None = None) -> dict[str, Any]:
    """How another stage names the sealed folder `path` below `root` among its inputs.

    ValueError if that folder is stale: its rows would be taken for those of an input it was not made from. DamagedFile
    if it was published under `sha256`.
    """
    manifest = read_manifest(storage.join(root, path), command, sha256)
    if changed := changed_inputs(root, manifest):
        if sha256 is not None:  # a published version never changes: nothing of it is made again
            raise DamagedFile(f"{storage.join(root, path)} was published, and is stale: {', '.join(changed)} changed "
                              f"since\nhint: python -m jobs verify --against current")
        raise ValueError(f"{storage.join(root, path)} is stale: {', '.join(changed)} changed since\n"
                         f"hint: make it again, with its own settings: {_text(command)} --overwrite")
    return {"path": path, "digest": manifest["content"]}


@cache
def code_revision() -> str:
    """The git revision of this code: what $RDM_REVISION says of a copy, or else git; without it the version."""
    if revision := os.environ.get("RDM_REVISION"):
        return revision
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        got = subprocess.run(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],
                             capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
        if got.returncode == 0 and got.stdout.strip():
            return got.stdout.strip()
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("retrieval-diffusion")
    except PackageNotFoundError:
        return "unknown"
