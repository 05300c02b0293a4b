"""Scratch folders are removed, also those of killed processes."""

import contextlib
import os
import signal
import tempfile

import pytest

from pipeline.stages.driver import run_stage
from pipeline.stages.scratch import _sweep, scratch_folder, shared_scratch
from pipeline.stages.types import StageFailed
from tests.pipeline import synthetic
from tests.pipeline.stages.count_stage import Count


def test_scratch_folders_are_removed(tmp_path, monkeypatch):
    import tempfile
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with contextlib.suppress(StageFailed):
        run_stage(Count(tmp_path, broken={"000001": ValueError("no")}))
    run_stage(Count(tmp_path))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_scratch_of_a_killed_process_is_removed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def die():
        with scratch_folder("one") as folder:
            (folder / "spool").write_bytes(b"much")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(synthetic.in_child(die)) == signal.SIGKILL
    with scratch_folder("other") as living:
        dead_folder = next(path for path in tmp_path.iterdir() if path != living)
        for path in (dead_folder, living):
            os.utime(path / ".alive", (0, 0))
        _sweep.cache_clear()
        with scratch_folder("third"):
            assert living.exists() and not dead_folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_shared_scratch_is_filled_again_after_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def dies(folder):
        (folder / "half").write_bytes(b"x")
        (folder / "below").mkdir()
        raise OSError("the disk is gone")

    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            shared_scratch("test-of-filling", dies)

    def fills(folder):
        assert not (folder / "half").exists() and not (folder / "below").exists()
        with open(folder / "rows", "ab") as file:
            file.write(b"row")

    for _ in range(2):
        assert (shared_scratch("test-of-filling", fills) / "rows").read_bytes() == b"row"
