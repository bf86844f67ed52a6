"""What Linux offers a file besides reading and writing: cloning ranges, physical addresses, attribute flags.

Request numbers and structures: linux/fs.h, linux/fiemap.h, linux/btrfs.h; man 2 ioctl_ficlonerange.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FICLONERANGE = 0x4020940D
_FIEMAP = 0xC020660B
_GETFLAGS = 0x80086601
_SETFLAGS = 0x40086602
_BTRFS_FS_INFO = 0x8400941F

_NOCOW = 0x00800000

_FIEMAP_SYNC = 1
_FIEMAP_LAST = 1
# Addresses of such extents say nothing about where the bytes are: unknown, delayed, encoded, encrypted, not aligned,
# inline, packed with others, merged.
_FIEMAP_VAGUE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
_FIEMAP_UNWRITTEN = 0x800
_FIEMAP_BATCH = 4096

CLONE = struct.Struct("=qQQQ")
"""struct file_clone_range: source descriptor, source offset, length (0: to the end), destination offset."""


def clone_range(source: int, target: int, source_offset: int, length: int, target_offset: int) -> None:
    """Shares a range of one file with another; raises `OSError` when the filesystem will not."""
    fcntl.ioctl(target, FICLONERANGE, CLONE.pack(source, source_offset, length, target_offset))


def is_nocow(descriptor: int) -> bool:
    """True for a file that Btrfs does not copy on write (chattr +C); False where there is no such thing."""
    try:
        answer = fcntl.ioctl(descriptor, _GETFLAGS, bytes(8))
    except OSError:
        return False
    return bool(struct.unpack("=q", answer)[0] & _NOCOW)


def set_nocow(descriptor: int) -> None:
    """Makes an empty file one that Btrfs does not copy on write."""
    flags: int = struct.unpack("=q", fcntl.ioctl(descriptor, _GETFLAGS, bytes(8)))[0]
    fcntl.ioctl(descriptor, _SETFLAGS, struct.pack("=q", flags | _NOCOW))


class Mount(NamedTuple):
    """The filesystem that holds a path: its type and where it is mounted."""

    type: str
    point: str


def mount_of(path: str) -> Mount:
    """Returns the filesystem that holds `path`, from the kernel's table of mounts."""
    real = os.path.realpath(path)
    best = Mount("unknown filesystem", "/")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            point = fields.split(" ")[4].replace("\\040", " ")
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            # Of two mounts on one point, the later line is the one that is seen.
            if inside and len(point) >= len(best.point):
                best = Mount(rest.split(" ", 1)[0], point)
    return best


def filesystem_id(descriptor: int) -> bytes:
    """Returns what tells one filesystem's blocks from another's.

    The device number is not it on Btrfs, where each subvolume has its own.
    """
    try:
        answer = fcntl.ioctl(descriptor, _BTRFS_FS_INFO, bytes(1024))
    except OSError:
        return os.fstat(descriptor).st_dev.to_bytes(8, "little")
    return answer[16:32]


def physical_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(logical, length, physical)` in bytes for the written extents of a file whose place is certain.

    What is missing from the rows has no bytes of its own on storage, or none whose place says which they are (inline,
    compressed, delayed). Raises `OSError` where the filesystem cannot tell.
    """
    import numpy as np

    extent = np.dtype(
        [
            ("logical", "<u8"),
            ("physical", "<u8"),
            ("length", "<u8"),
            ("_a", "<u8", 2),
            ("flags", "<u4"),
            ("_b", "<u4", 3),
        ]
    )
    parts = [np.empty((0, 3), dtype=np.int64)]
    start = 0
    while True:
        request = bytearray(32 + _FIEMAP_BATCH * extent.itemsize)
        struct.pack_into("=QQIIII", request, 0, start, (1 << 63) - start, _FIEMAP_SYNC, 0, _FIEMAP_BATCH, 0)
        fcntl.ioctl(descriptor, _FIEMAP, request)
        count: int = struct.unpack_from("=I", request, 20)[0]
        if not count:
            break
        rows = np.frombuffer(request, dtype=extent, count=count, offset=32)
        certain = rows[(rows["flags"] & (_FIEMAP_VAGUE | _FIEMAP_UNWRITTEN)) == 0]
        columns = (certain["logical"], certain["length"], certain["physical"])
        parts.append(np.stack(columns, axis=1).astype(np.int64))
        last = rows[-1]
        start = int(last["logical"] + last["length"])
        if last["flags"] & _FIEMAP_LAST:
            break
    return np.concatenate(parts)
