"""A finished run that is started again with more steps."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs.cli.main import main
from jobs.inspection.status import read_status
from jobs.runs.metrics import read_metrics
from jobs.runs.newest_run import find_newest_run
from jobs.runs.run import Run


def _wait_for_step(run: Run, step: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_run_that_goes_on_is_not_finished(prepared_root: Path, tmp_path: Path) -> None:
    def state() -> dict[str, Any]:
        return next(state for state in read_status(str(root)) if state["path"] == "runs/longer")

    root, settings = tmp_path / "root", tmp_path / "settings.toml"
    shutil.copytree(prepared_root, root)
    settings.write_text('[train]\nglobal_batch = 8\nlog_every = 1\ncheckpoint_every = 100000\nprecision = "fp32"\n'
                        "image_size = 16\n[train.unet]\nmodel_channels = 32\n")
    run = Run.parse(str(root), "longer")
    command = ["train", "longer", "--dataset", "drawn", "--local", "--root", str(root), "--config", str(settings)]
    assert main([*command, "--steps", "3"]) == 0
    assert run.is_finished() and state()["state"] == "sealed"
    process = subprocess.Popen([sys.executable, "-m", "jobs", *command, "--steps", "5000"])
    try:
        _wait_for_step(run, 10, process)
        during = state()
        assert re.fullmatch(r"at step \d+", during["state"]) and during["progress"]["of_steps"] == 5000
        assert main(["verify", "--root", str(root)]) == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
    *_, step = run.steps()
    assert state()["state"] == f"at step {step}" and state()["of_steps"] == 5000 and not run.is_finished()
    assert find_newest_run(str(root)) is None
    assert main(["verify", "--root", str(root)]) == 0
    assert main([*command, "--steps", str(step + 1)]) == 0
    assert run.is_finished() and state()["state"] == "sealed" and main(["verify", "--root", str(root)]) == 0
