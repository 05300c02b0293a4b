"""Memory that is used again instead of being given back."""

import ctypes
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT, _LARGEST = 128 << 20, 32 << 20  # bytes of each arena; the latter is the largest that glibc takes


@cache
def keep() -> None:
    """Have glibc keep the memory of one large array for the next.

    Its default gives the pages of every one back at once, for the kernel to fill them with zeros anew: four times the
    page faults, and those of threads wait for each other.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
