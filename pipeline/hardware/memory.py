"""The memory of this machine or container."""

import contextlib
import os
from functools import cache
from pathlib import Path


@cache
def machine_memory() -> int:
    """Bytes of memory that this machine or container has."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max"
            limits.append(int(Path(name).read_text()))
    return min(limits)
