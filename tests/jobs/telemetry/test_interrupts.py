"""A signal that native code turns into an error of its own still ends a command as Ctrl-C does."""

import os
import signal
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.report import report
from jobs.telemetry import interrupts
from tests.pipeline.shards.test_shard import write_images


def test_a_signal_that_native_code_replaces_by_an_error_stops_the_command(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "source")
    root = ["--root", str(tmp_path / "root")]
    assert main(["shard", "art", "--source", str(tmp_path / "source"), "--image-size", "16", "--local", *root]) == 0

    def draw(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("Invalid affine transformation matrix") from None  # as matplotlib does

    capsys.readouterr()
    before = signal.signal(signal.SIGINT, interrupts._interrupt)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(report, "write_report", draw)
            assert main(["report", *root]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1].endswith("stopped")  # nothing to continue
    assert main(["report", *root]) == 0
