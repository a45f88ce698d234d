"""Keeps memory that a training step has freed for the next step."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h; mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def reuse_freed_memory() -> bool:
    """Let the C library hold on to freed memory for the rest of the process.

    A step allocates and frees the same hundreds of megabytes again and again. By default glibc
    gives large pieces back to the system at once, and each page of the next one costs a fault.
    For programs that train and end: the process keeps the most it has ever used.

    Returns:
        Whether it was done; only glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no libc by this name (Windows), or another one
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(*setting) == 1 for setting in settings])
