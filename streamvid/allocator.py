"""What the C library does with freed memory.

glibc gives it back to the system whenever some megabytes at the end of the heap are free. A stream's tensors are of that
size: every block's memory comes back page by page, by thousands of faults (tests/test_allocator.py).
"""

from __future__ import annotations

import ctypes
import os
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
OWN_MAPPING = 32 << 20  # bytes from which an allocation is a mapping of its own: the most that glibc takes
KEPT = 32 << 20  # bytes that may stay free at the end of a heap
CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process keep up to 32 MB of freed memory per heap; for programs, not for libraries.

    Returns whether it will: not with another C library or allocator, nor where the environment says what to keep.
    """
    if sys.platform != "linux" or any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # both: one alone would end the adaption of the other, which starts low
    return mallopt is not None and bool(
        mallopt(MMAP_THRESHOLD, OWN_MAPPING) and mallopt(TRIM_THRESHOLD, KEPT)
    )
