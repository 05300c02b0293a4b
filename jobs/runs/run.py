"""The folder of a training run: <root>/runs/<run>/ with its checkpoints, curve and samples."""

import contextlib
import difflib
import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.datasets.names import MOST_LETTERS
from pipeline.stages.documents import NUMBER, RootPath, check_manifest, check_shape
from pipeline.stages.manifest import REMOVED_FOR_AGE, NotSealed, read_manifest

_log = logging.getLogger(__name__)
# The first one that fits an error counts.
HOPELESS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (FloatingPointError, MemoryError,
                                                                        storage.DamagedFile, ValueError)}
LINEAGE = {"*": {"path": RootPath, "digest?": str}}
_PLAN = {"section": {"encoder?": dict, "image_size?": int, "dataset?": str, "lineage?": LINEAGE}, "inputs?": LINEAGE}
_FAULT = {"kind": str, "message": str, "launch": str, "at": NUMBER}
_SHOWN = [{"database": str, "row": int, "sha256": str, "url?": str}]
SHOWN_ROWS = "rows"
"""The text in a PNG of validation that names the rows which it shows."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_shown_rows(grid: bytes) -> list[dict[str, Any]] | None:
    """The rows (database, row, sha256, url) that a PNG of validation shows; None for an old one that names none.

    OSError if it is no image, ValueError or DamagedFile if the text with the rows is damaged.
    """
    from PIL import Image
    with Image.open(io.BytesIO(grid)) as image:
        text = image.info.get(SHOWN_ROWS)
    return None if text is None else check_shape(json.loads(text), f"the text {SHOWN_ROWS}", _SHOWN, "")


def is_run_name(text: str) -> bool:
    """Whether a text may be the name of a run."""
    return bool(_NAME.fullmatch(text)) and len(text) <= MOST_LETTERS


def _find_lost_step(info: dict[str, Any], steps: list[int]) -> int | None:
    """The last step of a sealed run, if none of the `steps` with a checkpoint reaches it. `info` is of its manifest."""
    last = info.get("steps", info.get("step"))
    return last if "checkpoint" in info and last is not None and max(steps, default=-1) < last else None


@dataclass(frozen=True)
class Run:
    """The address of a training run."""

    root: str
    name: str

    @classmethod
    def parse(cls, root: str, text: str) -> "Run":
        """The run `text` below `root`."""
        if len(text) > MOST_LETTERS:
            raise ValueError(f"{text[:20]}... has {len(text)} letters: expected at most {MOST_LETTERS}\n"
                             f"hint: a shorter run name")
        if not _NAME.fullmatch(text):
            raise ValueError(f"{text!r} is not a name of a run\nhint: letters, digits, '.', '_' and '-'")
        return cls(storage.normalize(root), text)

    @property
    def path(self) -> str:
        """The folder of the run below the root."""
        return f"runs/{self.name}"

    @property
    def folder(self) -> str:
        """The address of the folder of the run."""
        return storage.join(self.root, self.path)

    @property
    def command(self) -> str:
        """The command that would finish the run, for hints."""
        return f"python -m jobs train {self.name} --dataset NAME --root {storage.quote(self.root)}"

    def section(self) -> dict[str, Any]:
        """The settings the run was planned with; ValueError if there is no such run."""
        try:
            return self._read_plan()["section"]
        except FileNotFoundError:
            close = difflib.get_close_matches(self.name, storage.list_folders(storage.join(self.root, "runs")), n=1)
            hint = f"did you mean {close[0]}?" if close and close[0] != self.name else self.command
            raise ValueError(f"there is no run {self.name} in {self.root}\nhint: {hint}") from None

    def _read_plan(self) -> dict[str, Any]:
        url = storage.join(self.folder, "plan.json")
        return check_shape(storage.read_json(url), url, _PLAN, "python -m jobs verify")

    def planned(self) -> dict[str, Any]:
        """The settings the run was planned with, nothing if it was not."""
        return self.section() if storage.exists(storage.join(self.folder, "plan.json")) else {}

    def is_finished(self) -> bool:
        """Whether the run was trained to its last step, imported or converted. More steps make it unfinished."""
        if (info := self._sealed_info()) is None or _find_lost_step(info, steps := self.steps()) is not None:
            return False
        finished = info.get("steps")
        return finished is None or not steps or steps[-1] <= finished or steps[-1] >= self.config(steps[-1])["steps"]

    def lost_step(self) -> int | None:
        """The step of the last checkpoint of a sealed run, if neither it nor a later one is there. None otherwise."""
        info = self._sealed_info()
        return None if info is None else _find_lost_step(info, self.steps())

    def _sealed_info(self) -> dict[str, Any] | None:
        try:
            return read_manifest(self.folder, self.command)["info"]
        except NotSealed:
            return None

    def validated(self, step: int) -> str:
        """The URL of the images of a validation."""
        return storage.join(self.folder, "validation", f"{step:07d}.png")

    def lineage(self) -> dict[str, Any]:
        """The inputs of the run: the folders of data, database and neighbors, with their digests."""
        try:
            plan = self._read_plan()
            return plan["section"].get("lineage") or plan.get("inputs", {})
        except FileNotFoundError:
            return {}

    @property
    def fault_address(self) -> str:
        """The file with the error that ended the run, until it is started again."""
        return storage.join(self.folder, "fault.json")

    def fault(self) -> dict[str, Any] | None:
        """The error that ended the run: kind, message, launch and time. None: there is none."""
        try:
            return check_shape(storage.read_json(self.fault_address), self.fault_address, _FAULT,
                               "remove the file; the run says again what is wrong")
        except FileNotFoundError:
            return None

    def mend(self) -> None:
        """Remove the error that ended the run, because it is started again."""
        storage.remove(self.fault_address)

    @contextlib.contextmanager
    def telling(self, launch: str = "") -> Iterator[None]:
        """Record an error that a retry would repeat, for this launch and for `status`."""
        try:
            yield
        except tuple(HOPELESS.values()) as error:
            kind = next(name for name, kind_of_error in HOPELESS.items() if isinstance(error, kind_of_error))
            storage.put_json({"launch": launch, "kind": kind, "message": str(error), "at": round(time.time(), 1)},
                             self.fault_address)
            raise

    def encoder(self) -> dict[str, Any]:
        """The encoder of the vectors the run was trained with."""
        return self._setting("encoder")

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that the run was trained with."""
        return self._setting("image_size")

    def _setting(self, name: str) -> Any:
        section = self.section()
        if name not in section:
            raise storage.DamagedFile(f"{storage.join(self.folder, 'plan.json')} is damaged: it has no {name}\n"
                                      f"hint: python -m jobs verify")
        return section[name]

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [name for name in storage.list_folders(storage.join(self.folder, "checkpoints")) if name.isdigit()]
        complete = storage.map_urls(lambda name: storage.exists(
            storage.join(self.folder, "checkpoints", name, "manifest.json")), names)
        return sorted(int(name) for name, whole in zip(names, complete, strict=True) if whole)

    def latest_step(self) -> int:
        """Step of the newest complete checkpoint; ValueError if there is none."""
        steps = self.steps()
        if not steps:
            self.section()
            raise ValueError(f"the run {self.name} has no checkpoint yet\nhint: {self.command}")
        return steps[-1]

    def choose_step(self, step: int) -> int:
        """`step`, or that of the newest complete checkpoint if it is 0; ValueError if there is none.

        The log says if a later one is lost.
        """
        if step:
            self.checkpoint(step)
            return step
        newest = self.latest_step()
        if (lost := self.lost_step()) is not None:
            _log.warning("the last checkpoint of the run %s, of step %d, is missing: that of step %d is used\n"
                         "hint: python -m jobs verify --only %s", self.name, lost, newest, self.path)
        return newest

    def checkpoint(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint; ValueError if it is not there."""
        url = storage.join(self.folder, "checkpoints", f"{step:07d}", "manifest.json")
        try:
            return check_manifest(storage.read_json(url), url)
        except FileNotFoundError:
            raise ValueError(f"the run {self.name} has no checkpoint {step}\nhint: it has "
                             f"{', '.join(map(str, self.steps())) or 'none'}") from None

    def checkpoint_bytes(self) -> int:
        """Bytes of the complete checkpoints. One that is removed meanwhile does not count."""
        total = 0
        for step in self.steps():
            try:
                total += sum(entry["bytes"] for entry in self.checkpoint(step)["files"])
            except ValueError:
                if step in self.steps():  # it is damaged
                    raise
        return total

    def refuse_replaced(self, step: int) -> None:
        """DamagedFile if the run was sealed at this step with another checkpoint."""
        if (info := self._sealed_info()) is None:
            return
        expected, got = info.get("checkpoint"), self.checkpoint(step)["content"]
        if step == info.get("steps", info.get("step")) and expected not in {None, got}:
            raise storage.DamagedFile(f"checkpoint {step} of the run {self.name} is not the one of the sealed run: "
                                      f"expected the content {expected[:12]}, got {got[:12]}\n"
                                      f"hint: python -m jobs verify --only {self.path}")

    def fetch(self, step: int) -> Path:
        """A local folder with the files of a checkpoint, hashes checked; ValueError if they are not as they were."""
        folder = storage.join(self.folder, "checkpoints", f"{step:07d}")
        try:
            return self._fetched(folder, self.checkpoint(step)["files"])
        except ValueError as error:
            others = ", ".join(str(other) for other in self.steps() if other != step)
            raise type(error)(f"{storage.first_line(error)}\nhint: the run {self.name} has "
                              f"{f'these checkpoints too: {others}' if others else 'no other checkpoint'}") from error

    def config(self, step: int) -> dict[str, Any]:
        """The settings that a checkpoint was trained with."""
        url = storage.join(self.folder, "checkpoints", f"{step:07d}", "checkpoint.json")
        return check_shape(storage.read_json(url), url, {"config": dict}, "python -m jobs verify")["config"]

    def first_stage(self) -> Path:
        """A local folder with the first stage that was converted together with the run, hashes checked."""
        manifest = read_manifest(self.folder, self.command)
        return self._fetched(storage.join(self.folder, "first_stage"), [
            entry | {"name": entry["name"].removeprefix("first_stage/")} for record in manifest["items"]
            for entry in record["files"] if entry["name"].startswith("first_stage/")])

    @staticmethod
    def _fetched(folder: str, files: list[dict[str, Any]]) -> Path:
        if storage.is_local(folder):
            for entry in files:
                storage.fetch(storage.file_below(folder, entry["name"]), entry, check=True)
            return storage.local_path(folder)
        # The cache names files by hash; these are read by name.
        digest = storage.digest([[entry["name"], entry["sha256"]] for entry in files])
        local = storage.cache_folder() / f"files-{digest}"
        local.mkdir(exist_ok=True)
        for entry in files:
            # The processes of a node do this at the same time. Links: a copy could be damaged and the original not.
            own = local / f".{entry['name']}-{os.getpid()}-{threading.get_ident()}"
            own.unlink(missing_ok=True)
            storage.fetch_and_open(storage.file_below(folder, entry["name"]), entry, own.hardlink_to, check=True)
            own.replace(local / entry["name"])
            own.unlink(missing_ok=True)  # replacing a link by one to the same file does nothing
        return local

    def publish(self, step: int, folder: Path) -> None:
        """Put the finished checkpoint in the local `folder` in place, its manifest last."""
        target = storage.join(self.folder, "checkpoints", f"{step:07d}")
        files = [storage.describe_file(path.name, path) for path in sorted(folder.iterdir())]
        for entry in files:
            storage.put_file(folder / entry["name"], storage.join(target, entry["name"]))
        storage.put_json({"stage": "checkpoint", "step": step, "files": files, "items": [],
                          "content": storage.digest([[entry["name"], entry["sha256"]] for entry in files])},
                         storage.join(target, "manifest.json"))

    def forget(self, keep: int) -> None:
        """Remove all complete checkpoints but the newest `keep`; the manifest goes first.

        A file beside them says through which step they are gone for their age, so that this is no loss.
        """
        steps = self.steps()
        if old := steps[:max(len(steps) - keep, 0)]:
            storage.put_json({"through": old[-1]}, storage.join(self.folder, "checkpoints", REMOVED_FOR_AGE))
        for step in old:
            self.discard(step)

    def discard(self, step: int) -> None:
        """Remove a checkpoint; the manifest goes first."""
        target = storage.join(self.folder, "checkpoints", f"{step:07d}")
        storage.remove(storage.join(target, "manifest.json"))
        storage.remove_tree(target)
