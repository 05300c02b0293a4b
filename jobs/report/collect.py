"""The datasets, runs and stages of a root. Each manifest is read once; a missing one is None."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup

from jobs.inspection import status
from jobs.report.render import render
from jobs.runs.run import Run
from pipeline import storage
from pipeline.datasets.dataset import Dataset, datasets
from pipeline.datasets.names import version_number
from pipeline.stages.documents import check_plan, check_sealed
from pipeline.takedowns.hidden_rows import read_hidden_rows
from pipeline.takedowns.takedown_list import Forgotten, read_takedowns

_log = logging.getLogger(__name__)


class RootContents:
    """The datasets, runs and stages below an address."""

    def __init__(self, address: str) -> None:
        self.address = storage.normalize(address)
        self.unreadable: list[str] = []
        """The parts of the report that could not be read, with the reasons."""
        self._hidden: dict[Dataset, np.ndarray] = {}
        self._manifests: dict[str, dict[str, Any] | None] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self.datasets = datasets(self.address)
        self.runs = [Run(self.address, name) for name in self._folders("runs")]
        self.broken = ""
        try:
            self.stages = status.read_status(self.address)
        except (ValueError, OSError, LookupError, TypeError) as error:
            self.stages, self.broken = [], str(error)  # the table of stages reports it
            _log.debug("report: the states of the stages could not be read", exc_info=True)
        self._states = {state["path"]: state for state in self.stages}

    @cached_property
    def current(self) -> list[Dataset]:
        """One version of each dataset: the published one, or else the newest with sealed shards."""
        published = {"/".join(state["path"].split("/")[:3]) for state in self.stages if state.get("published")}

        def rank(dataset: Dataset) -> tuple[bool, bool, int, str]:
            return (f"datasets/{dataset.name}/{dataset.version}" in published,
                    self.manifest(dataset.path("shards")) is not None, version_number(dataset.version), dataset.version)

        by_name = {dataset.name: dataset for dataset in sorted(self.datasets, key=rank)}
        return [dataset for dataset in self.datasets if by_name[dataset.name] is dataset]

    def manifest(self, path: str) -> dict[str, Any] | None:
        """The manifest of the stage folder `path`, None if it is not sealed or not readable."""
        if path not in self._manifests:
            try:
                url = storage.join(self.address, path, "manifest.json")
                self._manifests[path] = check_sealed(storage.read_json(url), url)
            except FileNotFoundError:
                self._manifests[path] = None
            except ValueError as error:
                self._manifests[path] = None
                self._note(path, error)
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
            url = storage.join(self.address, path, "plan.json")
            return check_plan(storage.read_json(url), url)
        except FileNotFoundError:
            return None

    def samples(self, run: Run) -> list[str]:
        """Names of the sample folders of a run, sealed or not."""
        return self._folders(f"{run.path}/samples")

    def newest_samples(self, run: Run) -> list[str]:
        """Names of the sealed sample folders of a run, the newest first."""
        manifests = {name: self.manifest(f"{run.path}/samples/{name}") for name in self.samples(run)}
        sealed = {name: manifest["run"].get("sealed", "") for name, manifest in manifests.items() if manifest}
        return sorted(sealed, key=sealed.__getitem__, reverse=True)

    def evaluation(self, path: str) -> dict[str, Any]:
        """The results of a sealed evaluation, read once."""
        if path not in self._results:
            self._results[path] = storage.read_json(storage.join(self.address, path, "evaluation.json"))
        return self._results[path]

    def checkpoints(self, run: Run) -> list[str]:
        """Names of the checkpoint folders of a run."""
        return self._folders(f"{run.path}/checkpoints")

    def evaluations(self, run: Run) -> list[str]:
        """Names of the evaluation folders of a run, sealed or not."""
        return self._folders(f"{run.path}/evaluations")

    def databases(self, dataset: Dataset) -> list[str]:
        """Labels of the databases for which a dataset has a folder of neighbor lists, sealed or not."""
        return self._folders(dataset.path("neighbors"))

    def hidden_rows(self, dataset: Dataset) -> np.ndarray:
        """The rows of a dataset that must not be shown, ascending (T,) int64."""
        if dataset not in self._hidden:
            self._hidden[dataset] = read_hidden_rows(dataset)
        return self._hidden[dataset]

    def is_hidden(self, neighbor: Mapping[str, Any], label: str) -> bool:
        """Whether a neighbor of a sample (sha256, row, url) must not be shown. `label`: the database of its entry.

        The takedown list has no hashes for a domain and for tombstones, so the hidden rows count too. If the version
        was removed, they are not known. Older samples do not name the URLs of their neighbors: with a domain or URL in
        the list these are not shown either.
        """
        if self.forgotten.has(neighbor):
            return True
        database = Dataset.parse(self.address, neighbor.get("database", label))
        if not database.is_sealed("shards"):
            return "url" not in neighbor and bool(self.forgotten.domains or self.forgotten.urls)
        return bool(np.isin(neighbor["row"], self.hidden_rows(database)))

    @cached_property
    def forgotten(self) -> Forgotten:
        """All takedown requests of the root."""
        return read_takedowns(self.address)

    def try_part(self, name: str, make: Callable[..., Markup | None], *arguments: Any) -> Markup | None:
        """The result of `make`, or a line with the reason if it fails: one damaged part must not cost the others."""
        try:
            return make(*arguments)
        except Exception as error:
            return render("unreadable.html", name=name, reason=self._note(name, error))

    def _note(self, name: str, error: Exception) -> str:
        """Note that a part could not be read. Returns the reason."""
        reason = _reason(error)
        self.unreadable.append(f"{name}: {reason}")
        _log.warning("report: %s could not be read: %s", name, reason)
        _log.debug("report: %s could not be read", name, exc_info=True)
        return reason

    def changed_inputs(self, path: str) -> list[str]:
        """The inputs of a sealed stage that were rebuilt since."""
        state = self._states.get(path, {})
        return state["changed"] if state.get("state") == "stale" else []

    def _folders(self, path: str) -> list[str]:
        return storage.list_folders(storage.join(self.address, path))


def _reason(error: Exception) -> str:
    """Why a part could not be read, without the name of an exception where possible."""
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error).partition("\nhint:")[0]
    if isinstance(error, KeyError):
        return f"one of its files has no value named {error.args[0]!r}"
    return f"one of its files is not in the expected form ({type(error).__name__}: {error})"
