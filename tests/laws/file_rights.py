"""Root reads all files. Here it may only what their modes say, as any other user."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_VERSION_3 = 0x20080522
_READ_ALL = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def closed(path: Path) -> Iterator[None]:
    """Close a file or folder to its owner, and take the right to read all files from this thread and its children."""
    mode = path.stat().st_mode
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
    assert libc.capget(header, before) == 0
    path.chmod(0)
    try:
        assert libc.capset(header, (ctypes.c_uint32 * 6)(before[0] & ~_READ_ALL, *before[1:])) == 0
        assert not os.access(path, os.R_OK, effective_ids=True)
        yield
    finally:
        libc.capset(header, before)
        path.chmod(mode)
