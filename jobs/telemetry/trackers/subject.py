"""The stage or run that a tracker follows, and the interface of every tracker."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from PIL import Image

from pipeline import storage

State = Literal["finished", "failed", "stopped"]
"""How a session ends. A run that a signal stopped is `stopped`: the same command continues it."""
Images = Mapping[str, str]
"""The URLs of images by name."""


@dataclass(frozen=True)
class Subject:
    """The stage or the training run that a tracker follows."""

    root: str
    folder: str
    labels: dict[str, str]
    """Dataset, version, stage and run (`jobs.runs.labels`)."""
    settings: dict[str, Any]
    inputs: dict[str, Any]
    first_step: int = 0
    """The first step that this session reports. Earlier steps have been reported, or are replayed."""
    training: bool = False

    @property
    def group(self) -> str:
        """The common name of the stages of a pipeline: dataset@version, or the run if there is none."""
        return "@".join(filter(None, (self.labels["dataset"], self.labels["version"]))) or self.labels["run"]

    @property
    def title(self) -> str:
        """The name that the tracker shows."""
        return self.labels["run"] or f"{self.group} {self.labels['stage']}"

    @property
    def place(self) -> Path:
        """The local folder for files of trackers: next to the stages of a version, or in the folder of a run.

        No code lists stages in this folder. With an object store it is the cache of this machine.
        """
        if not storage.is_local(self.root):
            return Path(storage.cache_folder())
        return storage.local_path(self.root).joinpath(*self._place_parts())

    def own_folder(self, tracker: str) -> Path:
        """A local folder for the files of a tracker that no other subject uses."""
        path = PurePosixPath(self.folder.removeprefix(self.root).strip("/"))
        if not storage.is_local(self.root):
            return self.place / tracker / storage.digest(self.root)[:12] / path
        return (self.place / tracker).joinpath(*path.parts[len(self._place_parts()):])

    def _place_parts(self) -> list[str]:
        labels = self.labels
        parts = (("runs", labels["run"]) if labels["run"] else
                 ("datasets" if labels["version"] else "pictures", labels["dataset"], labels["version"]))
        return [part for part in parts if part]


class Tracker(Protocol):
    """One tracker of one subject. No method raises an error or waits long for a server."""

    def add(self, record: dict[str, Any], images: Images | None = None, *, hold: bool = False) -> None:
        """Report the numbers of a record under its step. With `hold`, wait until a checkpoint has the step."""

    def saved(self) -> None:
        """A checkpoint has all steps so far: a resumed run will not repeat them."""

    def replay(self, records: Iterable[tuple[dict[str, Any], Images]]) -> None:
        """Report the records of earlier sessions that the tracker does not have."""

    def close(self, summary: dict[str, Any] | None = None, state: State = "finished") -> None:
        """End the session."""


def read_image(url: str) -> Image.Image | None:
    """The image at a URL; None if it is missing, because not every validation makes one."""
    if not storage.exists(url):
        return None
    return Image.open(io.BytesIO(storage.read_bytes(url))).convert("RGB")
