"""Training shows step, loss, rate and time left: to the terminal, the log, and other terminals."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from jobs.runs.run import Run
from jobs.training.live_progress import RunProgress, TrainingView, read_run_progress
from model.config import TrainConfig
from tests.laws.terminal import run_on_screen


def test_progress_is_written_for_other_terminals_and_removed_at_the_end(tmp_path: Path) -> None:
    run, shown = Run(str(tmp_path), "small"), []
    (tmp_path / "runs/small").mkdir(parents=True)
    progress = RunProgress(run, TrainConfig(steps=40, global_batch=8, log_every=2), shown.append)
    for step, loss in ((11, 9.0), (12, 1.0), (13, 2.0)):
        progress._shown = progress._written = -1e9
        progress(step, loss)
    now = read_run_progress(run)
    assert now is not None and (now["step"], now["of_steps"], now["rows"], now["of_rows"]) == (13, 40, 104, 320)
    assert now["loss"] == 1.5  # the mean of the last interval of the log
    assert now["rows_per_s"] > 0 and now["seconds_left"] is not None and shown[-1]["step"] == 13
    progress.close(13)
    assert read_run_progress(run) is None and not (tmp_path / "runs/small/progress.json").exists()


def test_a_damaged_progress_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "runs/small").mkdir(parents=True)
    for text in ("{", "[]", json.dumps({"step": 1})):
        (tmp_path / "runs/small/progress.json").write_text(text)
        assert read_run_progress(Run(str(tmp_path), "small")) is None


@pytest.mark.parametrize("recorded_first", [True, False])
def test_the_log_has_the_last_step_once(caplog: pytest.LogCaptureFixture, recorded_first: bool) -> None:
    caplog.set_level("INFO")
    view, step = TrainingView(), {"step": 40, "loss": 0.25, "samples_per_s": 8.0}
    shown = {"step": 40, "of_steps": 40, "loss": 0.5, "rows_per_s": 8.0, "seconds_left": None}
    for each in ("record", "show") if recorded_first else ("show", "record"):
        if each == "record":
            view.record(step, 40)
        else:
            view.show(shown)
    assert caplog.text.count("step 40 of 40") == 1


@pytest.mark.parametrize("columns", [40, pytest.param(80, marks=pytest.mark.slow)])
def test_train_shows_a_live_line(prepared_root: Path, tmp_path: Path, columns: int) -> None:
    shutil.copytree(prepared_root, tmp_path / "root")
    (tmp_path / "settings.toml").write_text('[train]\nsteps = 100\nglobal_batch = 8\nprecision = "fp32"\n'
                                            'image_size = 16\n[train.unet]\nmodel_channels = 32\n')
    seen = run_on_screen([sys.executable, "-m", "jobs", "train", "small", "--dataset", "drawn", "--local", "--root",
                          str(tmp_path / "root"), "--config", str(tmp_path / "settings.toml")], columns)
    assert seen.code == 0, seen.raw
    lines = [line.rstrip() for line in seen.lines if line.startswith("train ")]
    assert len(lines) == 1 and re.match(r"train .{8} 100%  step 100 of 100", lines[0]) and len(lines[0]) <= columns
    assert columns < 80 or re.search(r", loss \d\.\d{4}$", lines[0])
    assert re.search(r"\d samples/s, .* left", seen.raw)
    assert seen.raw.count("\x1b[?25l") == seen.raw.count("\x1b[?25h") == 1
