"""Run a stage with all observers: the terminal, the log, the metrics of Ray, trackers."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs.runs.labels import stage_labels
from jobs.telemetry import heartbeat, logs
from jobs.telemetry.progress_bar import describe_losses, show_progress
from jobs.telemetry.trackers.trackers import StageTrackers, track_stage
from pipeline.stages.driver import Runner, run_in_process, run_stage
from pipeline.stages.progress import Tally
from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)


class Observers:
    """The observers of a stage while it runs."""

    def __init__(self, stage: Stage, tracked: StageTrackers, watchers: Sequence[Callable[[Tally], None]]) -> None:
        self._stage, self._tracked, self._watchers = stage, tracked, watchers

    def watch(self, tally: Tally) -> None:
        """Show a tally to all observers."""
        for watcher in self._watchers:
            watcher(tally)

    def sealed(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Report that the stage is sealed, and what it lost. Returns its manifest."""
        self._tracked.sealed(manifest)
        if losses := describe_losses(manifest["totals"], self._stage.folder):
            level = logging.WARNING if manifest["totals"]["skipped"] else logging.INFO
            _log.log(level, "%s: %s", self._stage.name, losses)
        _log.debug("%s is sealed", self._stage.name,
                   extra={"fields": manifest["totals"] | {"folder": self._stage.folder}})
        return manifest


@contextlib.contextmanager
def observe(stage: Stage, *, name: str = "", trackers: Sequence[str] = ("none",)) -> Iterator[Observers]:
    """Observers of a stage that is shown as `name` and tracked by `trackers`."""
    labels = stage_labels(stage.path, stage.name)
    with (heartbeat.doing(name or stage.name), logs.label_events(labels),
          track_stage(stage, labels, trackers) as tracked):
        _log.debug("%s begins", stage.name)
        with show_progress(name or stage.name) as show:
            yield Observers(stage, tracked, [show, _ray_watcher(labels), tracked.watch])


def run_observed(stage: Stage, runner: Runner = run_in_process, *, name: str = "",
                 trackers: Sequence[str] = ("none",), **how: Any) -> dict[str, Any]:
    """Run a stage with its observers, and return its manifest. `how` goes to `run_stage`."""
    with observe(stage, name=name, trackers=trackers) as observers:
        return observers.sealed(run_stage(stage, runner, watch=observers.watch, **how))


def _ray_watcher(labels: dict[str, str]) -> Callable[[Tally], None]:
    """A watcher that updates the metrics of Ray if the stage runs on Ray."""
    meter: Any = None

    def watch(tally: Tally) -> None:
        nonlocal meter
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # do not import Ray for this alone
            from jobs.telemetry import ray_metrics
            meter = meter or ray_metrics.Meter(labels)
            meter.watch(tally)

    return watch
