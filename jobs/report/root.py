"""What is below a root, as a report needs it: every manifest read once, what is missing simply missing."""

import logging
from typing import Any

from jobs.inspection import status
from jobs.report.page import Html, tag
from jobs.runs.run import Run
from pipeline import storage
from pipeline.datasets.dataset import Dataset, datasets

_log = logging.getLogger(__name__)


class Root:
    """The datasets, runs and stages below an address."""

    def __init__(self, address: str) -> None:
        self.address = storage.normal(address)
        self._manifests: dict[str, dict[str, Any] | None] = {}
        self.datasets = datasets(self.address)
        self.runs = [Run(self.address, name) for name in self._folders("runs")]
        self.broken = ""
        try:
            self.stages = status.read_status(self.address)
        except (ValueError, OSError, LookupError, TypeError) as error:
            _log.warning("report: the states of the stages could not be read", exc_info=True)
            self.stages, self.broken = [], str(error)
        self._states = {one["path"]: one for one in self.stages}

    def manifest(self, path: str) -> dict[str, Any] | None:
        """The manifest of the stage folder `path`, None if it is not sealed or not readable."""
        if path not in self._manifests:
            try:
                self._manifests[path] = storage.read_json(storage.join(self.address, path, "manifest.json"))
            except FileNotFoundError:
                self._manifests[path] = None
            except ValueError as error:
                # The states of the stages will say so, too.
                _log.warning("report: %s", error)
                self._manifests[path] = None
        return self._manifests[path]

    def sealed(self, path: str) -> dict[str, Any]:
        """The manifest of the stage folder `path`; ValueError if it is not sealed."""
        manifest = self.manifest(path)
        if manifest is None:
            raise ValueError(f"{path} is not sealed")
        return manifest

    def plan(self, path: str) -> dict[str, Any] | None:
        """The plan of the stage folder `path`, None if it has none."""
        try:
            return storage.read_json(storage.join(self.address, path, "plan.json"))
        except FileNotFoundError:
            return None

    def samples(self, run: Run) -> list[str]:
        """Names of the sample folders of a run, sealed or not."""
        return self._folders(f"{run.path}/samples")

    def evaluations(self, run: Run) -> list[str]:
        """Names of the evaluation folders of a run, sealed or not."""
        return self._folders(f"{run.path}/evaluations")

    def databases(self, dataset: Dataset) -> list[str]:
        """Labels of the databases that a dataset has, or will have, neighbours in."""
        return self._folders(dataset.path("neighbors"))

    def mark(self, path: str) -> Html | None:
        """A mark for a stage whose inputs were rebuilt since."""
        if self._states.get(path, {}).get("state") != "stale":
            return None
        return tag("span", "stale", class_="mark stale", title=f"rebuilt since: {self._states[path]['changed']}")

    def _folders(self, path: str) -> list[str]:
        return storage.folders(storage.join(self.address, path))
