"""A finished run that is started again with more steps."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

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


def test_samples_stay_whole_when_their_checkpoint_is_removed_for_newer_ones(prepared_root: Path, tmp_path: Path,
                                                                            capsys: pytest.CaptureFixture[str]) -> None:
    def find_state(path: str) -> dict[str, Any]:
        return next(state for state in read_status(str(root)) if state["path"].startswith(path))

    root, settings = tmp_path / "root", tmp_path / "settings.toml"
    shutil.copytree(prepared_root, root)
    settings.write_text('[train]\nglobal_batch = 8\ncheckpoint_every = 1\nprecision = "fp32"\n'
                        "image_size = 16\n[train.unet]\nmodel_channels = 32\n")
    place = ["--local", "--root", str(root)]
    command = ["train", "longer", "--dataset", "drawn", "--config", str(settings), *place]
    run = Run.parse(str(root), "longer")
    assert main([*command, "--steps", "2"]) == 0
    assert main(["sample", "longer", "--database", "drawn", "--prompt", "a circle", "--steps", "2", *place]) == 0
    capsys.readouterr()
    assert main([*command, "--steps", "5", "--json"]) == 0
    assert run.steps() == [3, 4, 5]
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == run.checkpoint_bytes() == find_state("runs/longer")["bytes"] > 100_000
    assert find_state("runs/longer/samples/")["state"] == "sealed"
    assert main(["verify", "--root", str(root)]) == 0
    assert main(["sample", "longer", "--database", "drawn", "--prompt", "a circle", "--steps", "2", "--checkpoint", "4",
                 "--name", "kept", *place]) == 0
    shutil.rmtree(root / "runs/longer/checkpoints/0000004")  # the run would have kept it
    assert find_state("runs/longer/samples/kept")["state"] == "stale"
    assert main(["verify", "--root", str(root)]) == 1
    capsys.readouterr()
    assert main(["sample", "longer", "--database", "drawn", "--prompt", "a circle", "--checkpoint", "2", *place]) == 2
    assert "the run longer has no checkpoint 2\nhint: it has 3, 5" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [(5,), (3, 4, 5)], ids=["the last one", "all"])
def test_a_finished_run_that_loses_its_last_checkpoint_is_damaged_and_makes_it_again(
        prepared_root: Path, tmp_path: Path, lost: tuple[int, ...], caplog: pytest.LogCaptureFixture,
        capsys: pytest.CaptureFixture[str]) -> None:
    root, settings = tmp_path / "root", tmp_path / "settings.toml"
    shutil.copytree(prepared_root, root)
    settings.write_text('[train]\nglobal_batch = 8\ncheckpoint_every = 1\nprecision = "fp32"\nimage_size = 16\n'
                        "[train.unet]\nmodel_channels = 32\n")
    place = ["--local", "--root", str(root)]
    train = ["train", "lossy", "--dataset", "drawn", "--config", str(settings), "--steps", "5", *place]
    sample = ["sample", "lossy", "--database", "drawn", "--prompt", "a circle", "--steps", "2", *place]
    run = Run.parse(str(root), "lossy")
    assert main(train) == 0
    for step in lost:
        shutil.rmtree(root / f"runs/lossy/checkpoints/{step:07d}")
    state = next(state for state in read_status(str(root)) if state["path"] == "runs/lossy")
    assert state["state"] == "damaged" and state["error"] == "its last checkpoint, of step 5, is missing"
    assert not run.is_finished()
    for quick in ([], ["--quick"]):
        capsys.readouterr()
        assert main(["verify", "--root", str(root), *quick]) == 1
        said = capsys.readouterr()
        assert said.out.count("runs/lossy") == 1 and "repeat the command that made it" in said.err
    if run.steps():
        assert main(sample) == 0 and "that of step 4 is used" in caplog.text
    else:
        assert main(sample) == 2
    assert main(train) == 0
    assert "the last checkpoint of the run lossy, of step 5, is missing; its steps are made again" in caplog.text
    assert run.is_finished() and [line["step"] for line in read_metrics(run)][-1] == 5
    shutil.rmtree(root / "runs/lossy/samples", ignore_errors=True)  # of a checkpoint that was made again
    assert main(["verify", "--root", str(root)]) == 0
