"""MLflow: a server or a local database. The only file that imports mlflow."""

import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from jobs.telemetry import output
from jobs.telemetry.trackers.background import BackgroundTracker, Record, numbers
from jobs.telemetry.trackers.subject import State, read_image
from jobs.telemetry.units import flat_settings
from pipeline import storage
from pipeline.stages.documents import check_shape
from pipeline.stages.manifest import code_revision

_PACKAGES = ("mlflow", "sqlalchemy", "alembic")
_INSTALL = "pip install mlflow-skinny sqlalchemy alembic"
_METRICS_PER_CALL = 1000
_SETTINGS_PER_CALL = 100
_LONGEST_SETTING = 500
"""Characters of a value that every MLflow server takes. settings.json has the whole value."""
_LONGEST_TAG = 5000
_STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_KNOWN = {"id": str, "store": str}
_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
             "MLFLOW_DISABLE_TELEMETRY": "true"}


def check_packages() -> None:
    """ValueError if a package of MLflow is missing."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the tracker mlflow needs the package {name}, which is not installed\nhint: {_INSTALL}")


class MlflowTracker(BackgroundTracker):
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in the database `mlflow/mlflow.db` below the root.

    mlflow.json in the folder of the subject keeps the id, so a resumed run continues the same run of MLflow. The
    histories of the metrics tell which steps the server has. A step that it has is not reported again.
    """

    name = "mlflow"

    def open(self) -> None:
        client, store = self._connect()
        self._last_steps: dict[str, int] = {}
        self._run_id, is_new = self._find_run(client, store)
        self._report_settings(client, is_new=is_new)

    def _connect(self) -> tuple[Any, str]:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        store = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._artifacts = None
        if not store:
            root = self.subject.root
            folder = (storage.local_path(root) if storage.is_local(root) else self.subject.place) / "mlflow"
            folder.mkdir(parents=True, exist_ok=True)
            store, self._artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        self._client = MlflowClient(store)
        return self._client, storage.redact_credentials(store)

    def _find_run(self, client: Any, store: str) -> tuple[str, bool]:
        """The id of the run of MLflow, and whether it is new."""
        from mlflow.exceptions import MlflowException
        url = storage.join(self.subject.folder, "mlflow.json")
        try:
            known = check_shape(storage.read_json(url), url, _KNOWN, "remove the file; MLflow then shows a new run")
            if known["store"] == store:
                client.update_run(known["id"], status="RUNNING")
                return known["id"], False
        except FileNotFoundError:
            pass
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        labels = {f"rdm.{key}": value for key, value in self.subject.labels.items() if value}
        run = client.create_run(self._experiment(client), run_name=self.subject.title, tags=labels)
        storage.put_json({"id": run.info.run_id, "store": store}, url)
        return run.info.run_id, True

    def _experiment(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rdm")
        found = client.get_experiment_by_name(name)
        return found.experiment_id if found else client.create_experiment(name, artifact_location=self._artifacts)

    def _report_settings(self, client: Any, *, is_new: bool) -> None:
        """The settings as parameters. MLflow never changes a parameter, so a changed setting becomes a tag."""
        from mlflow.entities import Param, RunTag
        settings = output.escape_document(self.subject.settings)
        inputs = output.escape_document(self.subject.inputs)
        known = {} if is_new else client.get_run(self._run_id).data.params
        flat = {_name(key): value[:_LONGEST_SETTING] for key, value in flat_settings(settings)}
        params = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(params), _SETTINGS_PER_CALL):
            client.log_batch(self._run_id, params=params[start:start + _SETTINGS_PER_CALL])
        tags = {f"resumed.{key}": value for key, value in flat.items() if known.get(key, value) != value}
        tags |= {"rdm.code": code_revision(), "rdm.inputs": json.dumps(inputs)[:_LONGEST_TAG]}
        client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.log_dict(self._run_id, {"settings": settings, "inputs": inputs}, "settings.json")

    def report(self, records: list[Record]) -> None:
        from mlflow.entities import Metric
        now, metrics = round(time.time() * 1000), []
        for record, images in records:
            fresh = {key: value for key, value in self._named_numbers(record) if record["step"] > self._last(key)}
            metrics += [Metric(key, value, now, record["step"]) for key, value in fresh.items()]
            for name, url in images.items() if fresh or not numbers(record) else ():
                if image := read_image(url):
                    self._client.log_image(self._run_id, image, key=_name(name), step=record["step"])
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            part = metrics[start:start + _METRICS_PER_CALL]
            self._client.log_batch(self._run_id, metrics=part)
            self._last_steps |= {metric.key: metric.step for metric in part}

    def _named_numbers(self, record: dict[str, Any]) -> Iterator[tuple[str, float]]:
        for key, value in numbers(record).items():
            yield _name(storage.escape_controls(key)), value

    def _last(self, key: str) -> int:
        """The last step of a metric that the server has, -1 without any."""
        if key not in self._last_steps:
            history = self._client.get_metric_history(self._run_id, key)
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]

    def flush(self) -> None:
        """Nothing waits here: every call is answered by the server."""

    def finish(self, summary: dict[str, Any], state: State, *, complete: bool) -> None:
        if summary:
            self._client.log_dict(self._run_id, output.escape_document(summary), "summary.json")
        self._client.set_tag(self._run_id, "rdm.state", state)
        self._client.set_terminated(self._run_id, _STATES[state])


def _name(text: str) -> str:
    """A name that MLflow takes for metrics and parameters."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", text).strip("/. ") or "_"
