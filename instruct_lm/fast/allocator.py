"""Allocator settings."""

import ctypes
import platform

# /usr/include/malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def _is_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation instead of giving its pages back to the kernel.

    Every step of training frees and takes gigabytes in blocks that glibc maps anew each time, and each new page costs a
    fault. Call it before the first step; what was allocated earlier is freed as usual. Without glibc it does nothing.
    """
    if _is_glibc():
        ctypes.CDLL(None).mallopt(_M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Give the kernel the pages that `keep_freed_memory` kept, before another process needs them."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)
