"""Memory that is used again instead of being given back."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT, _LARGEST = 128 << 20, 32 << 20  # bytes of each arena; the latter is the largest that glibc takes
_USUAL = 128 << 10  # glibc's own, of both


def keep_freed_memory() -> None:
    """Have glibc keep the memory of one large array for the next.

    By default it returns the pages of each array to the kernel, which fills them with zeros again. That makes four
    times as many page faults, and page faults of threads wait for each other.
    """
    _set(_KEPT, _LARGEST)


def release_freed_memory() -> None:
    """Let glibc return unused memory, and keep nothing from now on.

    Large arrays among small objects leave holes that fit no other: a worker grew by 60 MB with each search.
    """
    _set(_USUAL, _USUAL)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(kept: int, largest: int) -> None:
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, kept)
        libc.mallopt(_MMAP_THRESHOLD, largest)
