"""The memory of a node: bounds of the C library's heaps, and the release of what only a start needed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import lru_cache

_M_ARENA_MAX, _HEAPS = -8, 2
"""From malloc.h. With 2, a node had 112 MB instead of 131 after five minutes of faults (glibc 2.36, two processors)."""
_OWN = ("Anonymous:", "Swap:")
_MADV_DONTNEED = 4
"""From mman.h; the `mmap` module has it only for mappings of its own."""


def bound_heaps() -> None:
    """Limits the heaps of glibc: by default each thread of a busy node has one, of the largest size it ever needed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def release() -> None:
    """Gives memory back to the system: freed heap, and pages of libraries that are not being used.

    The start of a node runs code of Zenoh and OpenSSL that no later work runs. The kernel reads each page again when it
    is used, in general from its cache.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(ctypes.c_size_t(0))
        for start, end in _unwritten(frozenset(_files())):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _files() -> Iterator[str]:
    """Yields the addresses of each read-only mapping of a file."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, rights, _offset, _device, inode, *_path = line.split()
            if inode != "0" and rights[1] != "w":
                yield addresses


@lru_cache(maxsize=1)
def _unwritten(mappings: frozenset[str]) -> list[tuple[int, int]]:
    """Returns start and end of those that have no page of the process's own.

    The loader has written into some, before they became read-only: such pages would be lost. This reads a large file,
    so the answer is kept until a library is loaded.
    """
    found = set(mappings)
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as file:
        addresses = ""
        for line in file:
            name, value, *_ = line.split()
            if "-" in name:
                addresses = name
            elif name in _OWN and value != "0":
                found.discard(addresses)
    return [(int(start, 16), int(end, 16)) for start, _, end in (one.partition("-") for one in found)]
