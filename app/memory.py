"""Memory that a stream leaves behind goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect what is unreachable and have the C library return its free pages.

    glibc keeps freed blocks for every thread that allocated them: without this a server's resident memory stays at what its
    busiest moment needed. Elsewhere only Python's part is done.
    """
    gc.collect()  # the caches of a stream are large, and something may still point at them in a circle
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)
