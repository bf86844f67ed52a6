"""What Linux offers a file besides reading and writing: cloning ranges, freeing them, their places, attribute flags.

Request numbers and structures: linux/fs.h, linux/falloc.h, linux/fiemap.h, linux/btrfs.h; man 2 ioctl_ficlonerange,
man 2 renameat2, man 2 fallocate.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, 524})
"""What filesystems and kernels without a call answer. 524, ENOTSUPP, is the kernel's own, and some NFS leaks it."""

# Questions are asked with arguments that never change: what is invalid about them is that they are not known. A filter
# of system calls, or a security module, denies them.
_UNKNOWN = NOT_SUPPORTED | {errno.EINVAL}
_DENIED = frozenset({errno.EPERM, errno.EACCES})
# man 2 fcntl: what is open for writing is busy; the rest says that this user, or this filesystem, has no leases.
_NO_LEASE = _UNKNOWN | _DENIED | {errno.ENOLCK}

FICLONERANGE = 0x4020940D
_FIEMAP = 0xC020660B
_GETFLAGS = 0x80086601
_SETFLAGS = 0x40086602
_GETVERSION = 0x80087601
_BTRFS_FS_INFO = 0x8400941F
_RESERVE = 0x40305828
_UNRESERVE = 0x4030582B

_NOCOW = 0x00800000
_COMPRESS = 0x4

_FIEMAP_SYNC = 1
_FIEMAP_LAST = 1
# Addresses of such extents say nothing about where the bytes are: unknown, delayed, encoded, encrypted, not aligned,
# inline, packed with others, merged.
_FIEMAP_VAGUE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
_FIEMAP_DELAYED = 0x2 | 0x4
_FIEMAP_ENCODED = 0x8
_FIEMAP_SHARED = 0x2000
_FIEMAP_UNWRITTEN = 0x800
_FIEMAP_BATCH = 4096

CLONE = struct.Struct("=qQQQ")
"""struct file_clone_range: source descriptor, source offset, length (0: to the end), destination offset."""


def clone_range(source: int, target: int, source_offset: int, length: int, target_offset: int) -> None:
    """Shares a range of one file with another; raises `OSError` when the filesystem will not."""
    fcntl.ioctl(target, FICLONERANGE, CLONE.pack(source, source_offset, length, target_offset))


def not_told(exc: OSError) -> bool:
    """True when FIEMAP failed because the filesystem, or a filter of system calls, does not tell where bytes lie.

    EBADR is the answer to flags that a filesystem does not know (Documentation/filesystems/fiemap.rst).
    """
    return exc.errno in _UNKNOWN | _DENIED | {errno.EBADR}


def _ioctl(descriptor: int, request: int, argument: bytes | bytearray) -> bytes | int:
    """Calls `fcntl.ioctl`; errors name the file."""
    try:
        return fcntl.ioctl(descriptor, request, argument)
    except OSError as exc:
        raise _named(exc, descriptor) from None


def _named(exc: OSError, descriptor: int) -> OSError:
    """Returns the error with the name of the descriptor's file."""
    return OSError(exc.errno, exc.strerror, name_of(descriptor))


def close(descriptor: int) -> None:
    """Closes a descriptor of what was only read, or was synced: it is closed whatever is said, and nothing is lost."""
    try:
        os.close(descriptor)
    except OSError:
        return


def name_of(descriptor: int) -> str:
    """Returns the name that the file of a descriptor has now, for messages; its number where /proc does not tell."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        # A message without the name is better than an error about the message.
        return f"descriptor {descriptor}"


# struct space_resv: l_type, l_whence, l_start, l_len, l_sysid, l_pid, l_pad.
_SPACE = struct.Struct("=hhiqqiI16x")


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Makes a range of a file read as zero, and frees its whole blocks; the file's size stays.

    FS_IOC_UNRESVSP64, which is fallocate(FALLOC_FL_PUNCH_HOLE) on all filesystems that have it.
    """
    _change_space(descriptor, _UNRESERVE, offset, length)


def allocate(descriptor: int, offset: int, length: int) -> None:
    """Finds room for a range of a file, which reads as zero until it is written; the file's size stays.

    FS_IOC_RESVSP64, which is fallocate(FALLOC_FL_KEEP_SIZE) on all filesystems that have it.
    """
    _change_space(descriptor, _RESERVE, offset, length)


def _change_space(descriptor: int, request: int, offset: int, length: int) -> None:
    _ioctl(descriptor, request, _SPACE.pack(0, os.SEEK_SET, 0, offset, length, 0, 0))


_COLLAPSE, _INSERT = 0x08, 0x20


def collapse_range(descriptor: int, offset: int, length: int) -> None:
    """Takes whole blocks out of a file: what lies behind them moves forward, without being copied."""
    _fallocate(descriptor, _COLLAPSE, offset, length)


def insert_range(descriptor: int, offset: int, length: int) -> None:
    """Puts a hole of whole blocks into a file: what lies behind its place moves back, without being copied."""
    _fallocate(descriptor, _INSERT, offset, length)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while library.fallocate(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise _named(OSError(number, os.strerror(number)), descriptor)


_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def rename_new(old: str, new: str, directory: int = _AT_FDCWD) -> None:
    """Gives a file another name in one step; raises `FileExistsError` when there is such a file.

    Both names are relative to an open directory.
    """
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    paths = (directory, os.fsencode(old), directory, os.fsencode(new))
    if library.renameat2(*paths, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)


def is_open_for_writing(descriptor: int) -> bool:
    """True when somebody has the file of this read-only descriptor open for writing, the kernel's loop device too.

    Asked by a lease, which is given back at once; False where the filesystem has none, or this user may not. Any other
    error says nothing, and is raised.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as exc:
        if exc.errno == errno.EAGAIN:
            return True
        if exc.errno not in _NO_LEASE:
            raise _named(exc, descriptor) from None
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        # With a lease that stays, opening the file for writing would end this process with a signal.
        raise _named(exc, descriptor) from None
    return False


def is_nocow(descriptor: int) -> bool:
    """True for a file that Btrfs does not copy on write (chattr +C); False where there is no such thing."""
    answer = _attribute(descriptor, _GETFLAGS, 8)
    return answer is not None and bool(struct.unpack("=q", answer)[0] & _NOCOW)


def _attribute(descriptor: int, request: int, size: int) -> bytes | None:
    """Returns what a file is asked for by an ioctl; None where the filesystem does not know, or may not say."""
    try:
        answer = _ioctl(descriptor, request, bytes(size))
    except OSError as exc:
        if exc.errno in _UNKNOWN | _DENIED:
            return None
        raise
    return bytes(answer)


def set_nocow(descriptor: int, nocow: bool = True) -> None:
    """Makes an empty file one that Btrfs does not copy on write, or one that it does.

    What is not copied on write is never compressed: the flag that a directory gives to new files for that goes.
    """
    flags: int = struct.unpack("=q", bytes(_ioctl(descriptor, _GETFLAGS, bytes(8))))[0]
    if nocow and flags & _COMPRESS:
        # Not both in one call.
        flags &= ~_COMPRESS
        _ioctl(descriptor, _SETFLAGS, struct.pack("=q", flags))
    _ioctl(descriptor, _SETFLAGS, struct.pack("=q", flags | _NOCOW if nocow else flags & ~_NOCOW))


def inode_flags(descriptor: int) -> int:
    """Returns the flags of a file (FS_IOC_GETFLAGS, chattr); raises `OSError` where there are none."""
    # The request's number says long, and the kernel fills in an int.
    flags: int = struct.unpack_from("=I", fcntl.ioctl(descriptor, _GETFLAGS, bytes(8)))[0]
    return flags


def set_inode_flags(descriptor: int, flags: int) -> None:
    """Sets the flags of a file; raises `OSError` where they cannot be set."""
    fcntl.ioctl(descriptor, _SETFLAGS, struct.pack("=Q", flags))


def generation(descriptor: int) -> int | None:
    """Returns what tells a file from the next one that gets its inode's number; None where the filesystem does not say.

    FS_IOC_GETVERSION: ext4, XFS and Btrfs have it, tmpfs and NFS do not.
    """
    answer = _attribute(descriptor, _GETVERSION, 8)
    if answer is None:
        return None
    # The request's number says long, and the kernel fills in an int.
    number: int = struct.unpack_from("=I", answer)[0]
    return number


class Mount(NamedTuple):
    """The filesystem that holds a path: its type and where it is mounted."""

    type: str
    point: str


def mount_of(path: str) -> Mount:
    """Returns the filesystem that holds `path`, from the kernel's table of mounts; it is unknown where /proc is not."""
    real = os.path.realpath(path)
    best = Mount("unknown filesystem", "/")
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            lines = table.readlines()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return best
    for line in lines:
        # man 5 proc: six fields and optional ones, a hyphen, the type; who reads it may be sent anything else.
        fields, _, rest = line.partition(b" - ")
        words = fields.split(b" ")
        if len(words) < 6 or not rest:
            continue
        point = os.fsdecode(_unescaped(words[4]))
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point, the later line is the one that is seen.
        if inside and len(point) >= len(best.point):
            best = Mount(os.fsdecode(rest.split(b" ", 1)[0]), point)
    return best


def _unescaped(field: bytes) -> bytes:
    """Returns a field of mountinfo, in which space, tab, newline and backslash are octal."""
    for code in (b"040", b"011", b"012", b"134"):
        field = field.replace(b"\\" + code, bytes([int(code, 8)]))
    return field


def filesystem_id(descriptor: int) -> bytes:
    """Returns what tells one filesystem's blocks from another's.

    The device number is not it on Btrfs, where each subvolume has its own. Raises `OSError`, see `not_told`.
    """
    try:
        return bytes(_ioctl(descriptor, _BTRFS_FS_INFO, bytes(1024)))[16:32]
    except OSError as exc:
        if exc.errno not in _UNKNOWN:
            raise
        return os.fstat(descriptor).st_dev.to_bytes(8, "little")


def physical_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(logical, length, physical)` in bytes for the written extents of a file whose place is certain.

    What is missing from the rows has no bytes of its own on storage, or none whose place says which they are (inline,
    compressed, delayed). Raises `OSError`, see `not_told`, where the filesystem cannot tell.
    """
    rows, flags = extents(descriptor)
    certain: npt.NDArray[np.int64] = rows[(flags & (_FIEMAP_VAGUE | _FIEMAP_UNWRITTEN)) == 0]
    return certain


def encoded_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(logical, length, physical)` for the extents that are stored encoded: compressed, mostly.

    `physical` is where the whole extent begins, even where the file has only a part of it. Raises `OSError`, as above.
    """
    rows, flags = extents(descriptor)
    encoded: npt.NDArray[np.int64] = rows[flags & (_FIEMAP_VAGUE | _FIEMAP_UNWRITTEN) == _FIEMAP_ENCODED]
    return encoded


def settled_ranges(descriptor: int) -> npt.NDArray[np.int64] | None:
    """Returns rows `(logical, length, physical)` for all extents, unwritten ones too; None where one is uncertain."""
    rows, flags = extents(descriptor)
    return None if (flags & _FIEMAP_VAGUE).any() else rows


def shares_blocks(descriptor: int) -> bool:
    """True if other files share blocks with this one: a write then gives the file another block.

    Raises `OSError` if the filesystem cannot tell.
    """
    return bool((extents(descriptor)[1] & _FIEMAP_SHARED).any())


def written_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(start, end)` in bytes for the extents of a file that are written, in order and apart.

    An unwritten extent reads as zero, whether or not its pages are cached: SEEK_DATA takes it for data where they are.
    Raises `OSError` where the filesystem cannot tell.
    """
    rows, flags = extents(descriptor)
    # What is delayed has bytes whose place is not known yet.
    unwritten = (flags & _FIEMAP_UNWRITTEN != 0) & (flags & _FIEMAP_DELAYED == 0)
    return _apart(rows[~unwritten])


def allocated_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(start, end)` in bytes for all extents of a file, unwritten ones too; see `written_ranges`."""
    return _apart(extents(descriptor)[0])


def _apart(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns `(start, end)` of extents, of which none overlaps the one before."""
    import numpy as np

    end = np.maximum.accumulate(rows[:, 0] + rows[:, 1])
    start = rows[:, 0]
    start = np.maximum(start, np.append(0, end[:-1])[: len(start)])
    ranges: npt.NDArray[np.int64] = np.stack([start, end], axis=1)[start < end]
    return ranges


def extents(descriptor: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns rows `(logical, length, physical)` for all extents of a file, in order, and the flags of each."""
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
    flags = [np.empty(0, dtype=np.int64)]
    start = 0
    while True:
        request = bytearray(32 + _FIEMAP_BATCH * extent.itemsize)
        struct.pack_into("=QQIIII", request, 0, start, (1 << 63) - start, _FIEMAP_SYNC, 0, _FIEMAP_BATCH, 0)
        _ioctl(descriptor, _FIEMAP, request)
        count: int = struct.unpack_from("=I", request, 20)[0]
        if not count:
            break
        rows = np.frombuffer(request, dtype=extent, count=count, offset=32)
        parts.append(np.stack([rows["logical"], rows["length"], rows["physical"]], axis=1).astype(np.int64))
        flags.append(rows["flags"].astype(np.int64))
        last = rows[-1]
        start = int(last["logical"] + last["length"])
        if last["flags"] & _FIEMAP_LAST:
            break
    return np.concatenate(parts), np.concatenate(flags)
