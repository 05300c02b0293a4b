"""How far a training run is: shown by the command, and written to progress.json for other terminals and the driver."""

import contextlib
import logging
import platform
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from jobs.runs.run import Run
from jobs.telemetry import logs
from jobs.telemetry.live_line import LiveLine, is_live
from jobs.telemetry.progress_bar import EVERY_S, describe_pace, describe_steps
from jobs.telemetry.units import format_share
from model.config import TrainConfig
from pipeline import storage
from pipeline.stages.documents import check_progress
from pipeline.stages.progress import period

_SHOW_S = 0.5
_WINDOW_S = 30.0  # over which the rate is taken: a validation or a checkpoint slows it, and shall
_log = logging.getLogger(__name__)


class RunProgress:
    """Counts the steps of a run in its process of rank 0."""

    def __init__(self, run: Run, config: TrainConfig, show: Callable[[dict[str, Any]], None] | None = None) -> None:
        """`show` is called twice a second."""
        self._folder, self._config, self._show = run.folder, config, show
        self._url = storage.join(run.folder, "progress.json")
        self._losses: deque[float] = deque(maxlen=config.log_every)
        self._window: deque[tuple[float, int]] = deque()  # from the first step on: what is before it takes longer
        self._shown = self._written = 0.0

    def __call__(self, step: int, loss: float) -> None:
        """Count a finished step and its loss."""
        now = time.monotonic()
        self._losses.append(loss)
        self._window.append((now, step))
        while len(self._window) > 2 and now - self._window[0][0] > _WINDOW_S:
            self._window.popleft()
        if now - self._shown >= _SHOW_S and self._show:
            self._shown = now
            self._show(self._document(step))
        if now - self._written >= period(self._folder):
            self._written = now
            with contextlib.suppress(OSError):  # a run must not fail because its progress cannot be written
                storage.put_json(self._document(step), self._url)

    def close(self, step: int) -> None:
        """Show the last step, and remove progress.json: the checkpoints and the curve have the rest."""
        if self._show and self._losses:
            self._show(self._document(step))
        with contextlib.suppress(OSError):
            storage.remove(self._url)

    def _document(self, step: int) -> dict[str, Any]:
        """Counts under the same names as in every stage. A row is an image that training has seen."""
        (began, first), batch = self._window[0], self._config.global_batch
        rate = (step - first) * batch / max(self._window[-1][0] - began, 1e-9)
        left = max(self._config.steps - step, 0) * batch
        return {"step": step, "of_steps": self._config.steps, "loss": sum(self._losses) / len(self._losses),
                "rows": step * batch, "of_rows": self._config.steps * batch, "samples": step * batch, "bytes": 0,
                "items": 0, "of_items": 1, "failed_items": 0, "retried": 0, "skipped": {},
                "rows_per_s": round(rate, 1), "seconds_left": round(left / rate) if rate else None,
                "updated": round(time.time(), 1), "host": platform.node()}


def read_run_progress(run: Run) -> dict[str, Any] | None:
    """The last progress of a run, as rank 0 wrote it. None if it is not running, or has not finished a step."""
    try:
        url = storage.join(run.folder, "progress.json")
        document = check_progress(storage.read_json(url), url)
    except (FileNotFoundError, ValueError):
        return None
    return document if "step" in document else None


class TrainingView:
    """Shows a run: a live line on a terminal, elsewhere a line of the log every few seconds."""

    def __init__(self) -> None:
        self._line: LiveLine | None = None
        self._logged, self._last = time.monotonic(), -1

    def show(self, now: dict[str, Any]) -> None:
        """Show the numbers of `RunProgress`."""
        step, steps = now["step"], now["of_steps"]
        if is_live():
            self._line = self._line or LiveLine("train")
            self._line.show(step, steps, f"{format_share(step, steps, 0):>4}  {describe_steps(now)}",
                            describe_pace(now))
        elif step != self._last and self._is_due(step == steps):
            _log.info("train: %s, %s", describe_steps(now), describe_pace(now), extra={"fields": now})
        self._last = step

    def record(self, line: dict[str, Any], steps: int) -> None:
        """Show a record of the curve, if it is newer. Programs get every record."""
        step = line["step"]
        if is_live():
            if step > self._last:
                self.show({"step": step, "of_steps": steps, "loss": line["loss"],
                           "rows_per_s": line["samples_per_s"], "seconds_left": None})
        elif logs.current_format() == "json" or (step > self._last and self._is_due(step == steps)):
            self._last = step
            _log.info("train: step %d of %d, loss %.4f, %.0f samples/s", step, steps, line["loss"],
                      line["samples_per_s"], extra={"fields": line})

    def close(self) -> None:
        """Leave the last state on the terminal."""
        if self._line is not None:
            self._line.close()

    def _is_due(self, finished: bool) -> bool:
        due = finished or time.monotonic() - self._logged >= EVERY_S
        if due:
            self._logged = time.monotonic()
        return due
