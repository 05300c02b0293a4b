"""A stage that is killed at any point and run again gives the same folder."""

import contextlib
import itertools
import os
import signal
import threading

import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import read_manifest
from pipeline.stages.stage import Stage
from tests.pipeline import synthetic
from tests.pipeline.stages.count_stage import Count, CountConfig, lasting_files, stage_folder

pytestmark = pytest.mark.usefixtures("private_cache")


class KilledAt:
    """The process kills itself right before or after its nth change of a final name."""

    def __init__(self, point: int) -> None:
        self.remaining = point

    def wrap(self, change):
        def tracked_change(*arguments, **options):
            self.tick()
            result = change(*arguments, **options)
            self.tick()
            return result
        return tracked_change

    def tick(self) -> None:
        if self.remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.remaining -= 1

    def run(self, stage: Stage) -> None:
        os.replace, os.link = self.wrap(os.replace), self.wrap(os.link)
        run_stage(stage)


def killed_at_every_point(make, root) -> int:
    """Kill `make(folder)` at every possible point and run it again to its end. The number of points."""
    run_stage(undisturbed := make(root / "undisturbed"))
    expected = lasting_files(undisturbed.folder)
    for point in itertools.count():
        stage = make(root / f"killed-{point}")
        status = synthetic.in_child(lambda: KilledAt(point).run(stage))  # noqa: B023
        if status == 0:
            return point
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not (sealed := storage.exists(storage.join(stage.folder, "manifest.json"))):
            with pytest.raises(ValueError, match="is not sealed"):
                read_manifest(stage.folder, stage.command)
        again = make(root / f"killed-{point}")
        run_stage(again)
        assert lasting_files(stage.folder) == expected, f"killed at {point}, sealed {sealed}"


def test_a_stage_killed_anywhere_resumes_to_the_same_folder(tmp_path):
    # Two writes of the lease, 6 lists, the plan, 13 files of items, 6 records, the file of all and the manifest,
    # before and after. Files of items come from scratch by a name that is hidden at first.
    assert killed_at_every_point(Count, tmp_path) == 2 * (2 + 6 + 1 + 2 * 13 + 6 + 1 + 1)


@pytest.mark.slow
def test_sharding_killed_anywhere_resumes_to_the_same_folder(tmp_path):
    from pipeline.shards.shard import Shard
    from pipeline.sources.config import ShardConfig
    source = synthetic.drawings(tmp_path / "pictures", subjects=2, size=8)
    (source / "broken.png").write_bytes(b"no picture")

    def make(root):
        return Shard(Dataset.parse(str(root), "x"), ShardConfig(source=str(source), samples_per_shard=6, image_size=8))
    assert killed_at_every_point(make, tmp_path) > 20


def test_a_stage_killed_at_any_time_resumes_to_the_same_folder(tmp_path):
    """The kill comes in the middle of a step, not between two steps."""
    expected = lasting_files(stage_folder(Count(tmp_path / "undisturbed")))
    for number in range(12):
        stage = Count(tmp_path / f"{number}")
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                run_stage(stage)
            os._exit(0)
        threading.Event().wait(0.004 * number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert lasting_files(stage_folder(stage)) == expected


def test_an_overwrite_killed_anywhere_leaves_nothing_of_the_old_folder(tmp_path, monkeypatch):
    """The removal may end after any file. Remaining files must not count as part of the new folder."""
    run_stage(Count(tmp_path / "alone", CountConfig(step=2)))
    expected = lasting_files(tmp_path / "alone" / "count")
    removals = 0
    unlink, rmdir = os.unlink, os.rmdir

    def stop_at_limit(change):
        def change_or_stop(path, *arguments, **options):
            nonlocal removals
            if removals == limit:
                raise KeyboardInterrupt
            removals += 1
            return change(path, *arguments, **options)
        return change_or_stop

    for limit in range(0, 40, 3):
        removals = 0
        root = tmp_path / f"{limit}"
        run_stage(Count(root))
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", stop_at_limit(unlink))
            patch.setattr(os, "rmdir", stop_at_limit(rmdir))
            with contextlib.suppress(KeyboardInterrupt):
                run_stage(Count(root, CountConfig(step=2)), overwrite=True)
        with contextlib.suppress(ValueError):  # it may be refused: the old plan is still there
            run_stage(Count(root, CountConfig(step=2)))
            assert lasting_files(root / "count") == expected, f"cut off after {limit} removals"
