"""The memory of a node: bounds of the C library's heaps, and the release of what only a start needed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_M_ARENA_MAX, _HEAPS = -8, 2
"""From malloc.h. With 2, a node had 112 MB instead of 131 after five minutes of faults (glibc 2.36, two processors)."""
_MADV_DONTNEED = 4
"""From mman.h; the `mmap` module has it only for mappings of its own."""


def bound_heaps() -> None:
    """Limits the heaps of glibc: by default each thread of a busy node has one, of the largest size it ever needed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def release() -> None:
    """Gives memory back to the system: freed heap, and the code of libraries that is not being executed.

    The start of a node runs code of Zenoh and OpenSSL that no later work runs. The kernel reads each page again when it
    is executed, in general from its cache.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(ctypes.c_size_t(0))
        for start, size in _code():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)


def _code() -> Iterator[tuple[int, int]]:
    """Yields address and size of each mapping of a file's code.

    Only code is never written. Constants may have been, by the loader, and would be lost.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            place, rights, _offset, _device, inode, *_path = line.split()
            if rights == "r-xp" and inode != "0":
                start, end = (int(text, 16) for text in place.split("-"))
                yield start, end - start
