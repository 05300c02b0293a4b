"""Scratch folders. A later process removes those of a killed one."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import storage

_ALIVE = ".alive"  # locked in a scratch folder as long as its process lives


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder of this attempt alone, removed afterwards; by a later process, if this one is killed."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"rdm-{name.replace('/', '-')}-"))
    try:
        with open(folder / _ALIVE, "w") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            yield folder
    except OSError as error:
        if storage.disk_full_message(error) and error.filename is None:
            error.filename = f"{folder}/"  # what is written to a file that is open does not tell where
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shared_scratch(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of scratch that the processes of this machine have in common, filled by the first of them.

    It is there as long as one of them lives, and removed by a later process. PermissionError if others can put files
    into it.
    """
    _sweep()
    folder = Path(tempfile.gettempdir()) / f"rdm-{name.replace('/', '-')}-{os.getuid()}"
    if folder in _shared:
        return folder
    while True:
        try:
            storage.make_private_folder(folder, "TMPDIR")
            alive = open(folder / _ALIVE, "a")  # noqa: SIM115 (held until the process ends)
            fcntl.flock(alive, fcntl.LOCK_SH)
            if os.fstat(alive.fileno()).st_ino == (folder / _ALIVE).stat().st_ino:
                break
        except FileNotFoundError:  # another process removed it
            continue
    with open(folder / ".fill", "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not (folder / "filled").exists():
            # Remove what a killed process left.
            for leftover in folder.iterdir():
                if leftover.name not in {_ALIVE, ".fill"}:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            try:
                fill(folder)
            except BaseException:
                alive.close()
                raise
            (folder / "filled").touch()
    _shared[folder] = alive
    return folder


_shared: dict[Path, Any] = {}


@cache
def _sweep() -> None:
    """Remove this user's scratch folders whose processes are gone: their locks are free."""
    for path in Path(tempfile.gettempdir()).glob(f"rdm-*/{_ALIVE}"):
        with contextlib.suppress(OSError):
            # Not another user's, whose .alive may be a pipe: opening that would wait for ever.
            if path.parent.lstat().st_uid != os.geteuid():
                continue
        with contextlib.suppress(OSError), open(path) as alive:
            if time.time() - path.stat().st_mtime > 60:  # or it may not have got so far as to lock it
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
