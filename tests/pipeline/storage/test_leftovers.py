"""Unfinished files of killed processes."""

import os
import time
from pathlib import Path

import pytest

from pipeline import storage


def _leave(path: Path, hours: float) -> Path:
    """Leave an unfinished file of `put_bytes`, whose process was killed some hours ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda temporary, _: names.append(temporary))
        patch.setattr(os, "unlink", lambda _: None)
        storage.put_bytes(b"x", str(path))
    os.utime(names[0], (time.time() - 3600 * hours,) * 2)
    return Path(names[0])


def test_abandoned_files_are_removed_and_no_others(tmp_path: Path) -> None:
    old, below = _leave(tmp_path / "a.json", 2), _leave(tmp_path / "records" / "000000.json", 2)
    kept = [_leave(tmp_path / "b.json", 0.5), tmp_path / "c.json", tmp_path / ".swap"]
    for path in kept[1:]:
        path.write_text("x")
        os.utime(path, (0, 0))
    now = time.time()
    assert storage.remove_unfinished(str(tmp_path), now) == 1
    assert not old.exists() and below.exists()
    assert storage.remove_unfinished(str(tmp_path), now, below=True) == 1
    assert not below.exists() and all(path.exists() for path in kept)
    assert storage.remove_unfinished(str(tmp_path / "absent"), now, below=True) == 0


def test_leases_of_killed_commands_are_removed(tmp_path: Path) -> None:
    with storage.hold_lease(str(tmp_path), "datasets/x") as lease:
        living, ended = next((tmp_path / "leases").iterdir()), tmp_path / "leases" / "datasets+y.0123456789abcdef.json"
        ended.write_bytes(living.read_bytes())
        os.utime(ended, (time.time() - 100,) * 2)
        abandoned = _leave(tmp_path / "leases" / "z.json", 2)
        storage.remove_ended_leases(str(tmp_path), lease.now())
        assert living.exists() and not ended.exists() and not abandoned.exists()


def test_a_file_from_scratch_is_not_taken_for_an_abandoned_one(tmp_path: Path) -> None:
    waited = tmp_path / "scratch"
    waited.write_text("x")
    os.utime(waited, (0, 0))
    storage.put_file(waited, str(tmp_path / "put"), give=True)
    assert (tmp_path / "put").stat().st_mtime > time.time() - 60


def test_on_an_object_store(s3: str) -> None:
    for name in ("probe-0123456789abcdef", "current.json"):
        storage.put_bytes(b"x", f"{s3}/datasets/x/{name}")
    now = storage.modified_time(f"{s3}/datasets/x/current.json")
    assert storage.remove_unfinished(f"{s3}/datasets/x", now, below=True) == 0
    assert storage.remove_unfinished(f"{s3}/datasets/x", now + 4000, below=True) == 1
    assert storage.list_files(f"{s3}/datasets/x") == ["current.json"]
