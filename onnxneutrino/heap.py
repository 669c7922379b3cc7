"""The heap of glibc: give large arrays back to the system when they are freed."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Let glibc map every block from 1 MB on by itself, for the rest of the process; nothing on other systems.

    By default the limit grows with the blocks that are freed, up to 32 MB, and what lies below it returns to
    the system only from the end of the heap: after normalizing a model of 80 MB, 1150 MB were held and 480 in
    use (`mallopt(3)`, M_MMAP_THRESHOLD). Meant for a process of one's own, hence for the command line alone.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    except (OSError, AttributeError):  # another C library than glibc
        return
