"""Read the manifest of a sealed folder, and detect stale inputs."""

import contextlib
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.stages import records
from pipeline.stages.stage import Stage

_MANIFEST_KEYS = {"stage", "content", "items", "files"}  # those of a checkpoint's manifest too


def read_manifest(folder: str, command: str, sha256: str | None = None) -> dict[str, Any]:
    """The manifest of a sealed stage folder; ValueError with the `command` that would finish it.

    ValueError too if its bytes are not those of `sha256`, the hash under which it was published.
    """
    try:
        data = storage.read_bytes(storage.join(folder, "manifest.json"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not sealed: it has no manifest.json\nhint: {command}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{folder}/manifest.json is not the one that was published: somebody changed this version\n"
                         f"hint: python -m jobs verify --against current tells what else; rollback to another version")
    manifest = storage.parse_json(data, storage.join(folder, "manifest.json"))
    if not isinstance(manifest, dict) or not manifest.keys() >= _MANIFEST_KEYS:
        raise ValueError(f"{folder}/manifest.json is damaged\nhint: python -m jobs verify tells what else is")
    if isinstance(manifest["items"], dict):
        manifest["items"] = records.load(folder, manifest["items"], records.records)
    return manifest


def changed_inputs(root: str, document: dict[str, Any]) -> list[str]:
    """Names of the inputs of a plan or manifest whose folder holds other content than when it was planned."""
    changed = []
    for name, one in document.get("inputs", {}).items():
        if one["path"]:
            try:
                now = storage.read_json(storage.join(root, one["path"], "manifest.json"))
            except FileNotFoundError:
                # A published version that was removed for its age did not change: its release stays to say so.
                if storage.exists(storage.join(root, one["path"].rpartition("/")[0], "release.json")):
                    continue
                now = None
            except ValueError:
                now = None
            if not isinstance(now, dict) or now.get("content") != one["digest"]:
                changed.append(name)
    return changed


def without_run_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its `run` parts (seconds, hosts, dates): equal for equal results."""
    bare = {key: value for key, value in manifest.items() if key != "run"}
    bare["items"] = [{key: value for key, value in record.items() if key != "run"} for record in manifest["items"]]
    return bare


def is_sealed(stage: Stage) -> bool:
    """Whether the folder of `stage` is finished."""
    return storage.exists(storage.join(stage.folder, "manifest.json"))


def sealed_input(root: str, path: str, command: str, sha256: str | None = None) -> dict[str, Any]:
    """How another stage names the sealed folder `path` below `root` among its inputs.

    ValueError if that folder is stale: its rows would be taken for those of an input it was not made from.
    """
    manifest = read_manifest(storage.join(root, path), command, sha256)
    if changed := changed_inputs(root, manifest):
        raise ValueError(f"{storage.join(root, path)} is stale: {', '.join(changed)} changed since\n"
                         f"hint: make it again, with its own settings: {command} --rebuild")
    return {"path": path, "digest": manifest["content"]}


@cache
def code_revision() -> str:
    """The git revision of this code: what $RDM_REVISION says of a copy, or else git; without it the version."""
    if told := os.environ.get("RDM_REVISION"):
        return told
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
