"""A stage that is run and watched meanwhile: by people, by the log, by Ray's metrics, by wandb."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from jobs.runs.labels import stage_labels
from jobs.telemetry import logs, wandb_tracker
from jobs.telemetry.progress_bar import watcher
from pipeline.stages.driver import Runner, run_in_process, run_stage
from pipeline.stages.progress import Tally
from pipeline.stages.stage import Stage

_log = logging.getLogger(__name__)


def run_observed(stage: Stage, runner: Runner = run_in_process, *, name: str = "", tracker: str = "none",
        **how: Any) -> dict[str, Any]:
    """`stage.run`, shown as `name`, tracked by `tracker`."""
    known = stage_labels(stage.path, stage.name)
    with logs.about(known), wandb_tracker.tracker_of_stage(stage, known, tracker) as tracked:
        _log.debug("%s begins", stage.name)
        with watcher(name or stage.name) as show:
            manifest = run_stage(stage, runner, watch=_all([show, _metered(known), tracked.watch]), **how)
        tracked.sealed(manifest)
        _log.debug("%s is sealed", stage.name, extra={"fields": manifest["totals"] | {"folder": stage.folder}})
        return manifest


def _all(watching: list[Callable[[Tally], None]]) -> Callable[[Tally], None]:
    def watch(tally: Tally) -> None:
        for watch_tally in watching:
            watch_tally(tally)

    return watch


def _metered(known: dict[str, str]) -> Callable[[Tally], None]:
    """Tells Ray, where the stage runs on it."""
    meter: Any = None

    def watch(tally: Tally) -> None:
        nonlocal meter
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # never loaded for this alone
            from jobs.telemetry import ray_metrics
            meter = meter or ray_metrics.Meter(known)
            meter.watch(tally)

    return watch
