"""Run a stage with all observers: the terminal, the log, the metrics of Ray, wandb."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jobs.runs.labels import stage_labels
from jobs.telemetry import logs, wandb_tracker
from jobs.telemetry.progress_bar import show_progress
from pipeline.stages.driver import Runner, run_in_process, run_stage
from pipeline.stages.progress import Tally
from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)


@dataclass
class Observation:
    """Observers of a stage while it runs."""

    watch: Callable[[Tally], None]
    """To call whenever the tally changes."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """To set when the stage is sealed."""


@contextlib.contextmanager
def observe(stage: Stage, *, name: str = "", tracker: str = "none") -> Iterator[Observation]:
    """Observers of a stage that is shown as `name` and tracked by `tracker`. The caller sets the manifest."""
    labels = stage_labels(stage.path, stage.name)
    with logs.label_events(labels), wandb_tracker.track_stage(stage, labels, tracker) as tracked:
        _log.debug("%s begins", stage.name)
        with show_progress(name or stage.name) as show:
            observation = Observation(_call_all([show, _ray_watcher(labels), tracked.watch]))
            yield observation
        manifest = observation.manifest
        tracked.sealed(manifest)
        _log.debug("%s is sealed", stage.name, extra={"fields": manifest["totals"] | {"folder": stage.folder}})


def run_observed(stage: Stage, runner: Runner = run_in_process, *, name: str = "", tracker: str = "none",
                 **how: Any) -> dict[str, Any]:
    """Run a stage with its observers, and return its manifest. `how` goes to `run_stage`."""
    with observe(stage, name=name, tracker=tracker) as observation:
        observation.manifest = run_stage(stage, runner, watch=observation.watch, **how)
    return observation.manifest


def _call_all(watchers: list[Callable[[Tally], None]]) -> Callable[[Tally], None]:
    def watch(tally: Tally) -> None:
        for show in watchers:
            show(tally)

    return watch


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
