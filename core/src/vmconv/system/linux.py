"""Linux file operations: reflink, hole punching, extent maps, inode flags, leases, mounts.

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
"""Errors of calls that kernel or filesystem do not support. 524 is the kernel's ENOTSUPP, which some NFS leaks."""

# The arguments of queries are constant, so EINVAL means that the request is unknown. seccomp or an LSM may deny it.
_UNKNOWN = NOT_SUPPORTED | {errno.EINVAL}
_DENIED = frozenset({errno.EPERM, errno.EACCES})
# man 2 fcntl: EAGAIN means open for writing; these mean that the user or the filesystem has no leases.
_NO_LEASE = _UNKNOWN | _DENIED | {errno.ENOLCK}

FICLONERANGE = 0x4020940D
_FIEMAP = 0xC020660B
_GETFLAGS = 0x80086601
_SETFLAGS = 0x40086602
_GETVERSION = 0x80087601
_GETFSUUID = 0x80111500
_BTRFS_FS_INFO = 0x8400941F
_BTRFS_SUBVOL_GETFLAGS = 0x80089419
_SUBVOL_RDONLY = 2
_RESERVE = 0x40305828
_UNRESERVE = 0x4030582B

_NOCOW = 0x00800000
_COMPRESS = 0x4

_FIEMAP_SYNC = 1
_FIEMAP_LAST = 1
# Flags of extents without a usable physical address: unknown, delayed, encoded, encrypted, not aligned, inline, tail,
# merged.
_FIEMAP_VAGUE = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
_FIEMAP_DELAYED = 0x2 | 0x4
_FIEMAP_ENCODED = 0x8
_FIEMAP_SHARED = 0x2000
_FIEMAP_UNWRITTEN = 0x800
_FIEMAP_BATCH = 4096

CLONE = struct.Struct("=qQQQ")
"""struct file_clone_range: source descriptor, source offset, length (0: to the end), destination offset."""


def clone_range(source: int, target: int, source_offset: int, length: int, target_offset: int) -> None:
    """Shares a range of one file with another (FICLONERANGE), all numbers in bytes; raises `OSError`."""
    fcntl.ioctl(target, FICLONERANGE, CLONE.pack(source, source_offset, length, target_offset))


def not_told(exc: OSError) -> bool:
    """True if FIEMAP failed because the filesystem does not support it or seccomp denies it."""
    # EBADR: the filesystem does not support the flags (Documentation/filesystems/fiemap.rst).
    return exc.errno in _UNKNOWN | _DENIED | {errno.EBADR}


def _ioctl(descriptor: int, request: int, argument: bytes | bytearray) -> bytes | int:
    """Calls `fcntl.ioctl`; errors have the name of the file."""
    try:
        return fcntl.ioctl(descriptor, request, argument)
    except OSError as exc:
        raise _named(exc, descriptor) from None


def _named(exc: OSError, descriptor: int) -> OSError:
    """Returns the error with the name of the descriptor's file."""
    return OSError(exc.errno, exc.strerror, name_of(descriptor))


def close(descriptor: int) -> None:
    """Closes the descriptor of a file that was only read, or was synced; ignores errors."""
    try:
        os.close(descriptor)
    except OSError:
        # Linux closes the descriptor even if close fails, and no write is pending.
        return


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Returns `length` bytes of a file from `offset` on; fewer only at its end.

    Raises `OSError` if nothing can be read before the end of the file.
    """
    data = os.pread(descriptor, length, offset)
    if len(data) == length:
        return data
    # A read may be short: Linux transfers at most 0x7ffff000 bytes at once (man 2 read).
    parts = [data]
    while data and length > len(data):
        length, offset = length - len(data), offset + len(data)
        data = os.pread(descriptor, length, offset)
        parts.append(data)
    if not data and os.fstat(descriptor).st_size > offset:
        raise OSError(errno.EIO, f"nothing was read at {offset:#x}", name_of(descriptor))
    return b"".join(parts)


def name_of(descriptor: int) -> str:
    """Returns the current path of an open file, for messages; the descriptor's number without /proc."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        # A message without the name is better than an error about the message.
        return f"descriptor {descriptor}"


# These ioctls do without fallocate(2), for which Python has no binding.
# struct space_resv: l_type, l_whence, l_start, l_len, l_sysid, l_pid, l_pad.
_SPACE = struct.Struct("=hhiqqiI16x")


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Zeroes a range of a file and frees its whole blocks; the file's size does not change.

    FS_IOC_UNRESVSP64, the same as fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE).
    """
    _change_space(descriptor, _UNRESERVE, offset, length)


def allocate(descriptor: int, offset: int, length: int) -> None:
    """Allocates a range of a file, unwritten (it reads as zero); the file's size does not change.

    FS_IOC_RESVSP64, the same as fallocate(FALLOC_FL_KEEP_SIZE).
    """
    _change_space(descriptor, _RESERVE, offset, length)


def _change_space(descriptor: int, request: int, offset: int, length: int) -> None:
    _ioctl(descriptor, request, _SPACE.pack(0, os.SEEK_SET, 0, offset, length, 0, 0))


_KEEP_SIZE, _PUNCH, _COLLAPSE, _ZERO, _INSERT = 0x01, 0x02, 0x08, 0x10, 0x20


def collapse_range(descriptor: int, offset: int, length: int) -> None:
    """Removes whole blocks from a file; later extents move down without a copy (FALLOC_FL_COLLAPSE_RANGE)."""
    _fallocate(descriptor, _COLLAPSE, offset, length)


def insert_range(descriptor: int, offset: int, length: int) -> None:
    """Inserts a hole of whole blocks into a file; later extents move up without a copy (FALLOC_FL_INSERT_RANGE)."""
    _fallocate(descriptor, _INSERT, offset, length)


def zero_device(descriptor: int, offset: int, length: int, *, free: bool) -> None:
    """Zeroes a range of whole blocks of a block device, and frees it in the device if `free`.

    Freeing raises `OSError` (EOPNOTSUPP) if the device does not guarantee zeros afterwards. Without it, the kernel
    writes zeros if the device cannot (block/fops.c, blkdev_fallocate).
    """
    _fallocate(descriptor, _KEEP_SIZE | (_PUNCH if free else _ZERO), offset, length)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    # os.posix_fallocate has no mode.
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while library.fallocate(descriptor, mode, offset, length):
        # ctypes does not retry interrupted calls as Python does (PEP 475).
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise _named(OSError(number, os.strerror(number)), descriptor)


_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def rename_new(old: str, new: str, directory: int = _AT_FDCWD) -> None:
    """Renames a file atomically (RENAME_NOREPLACE); raises `FileExistsError` if the new name exists.

    Both names are relative to the open directory.
    """
    # os.rename would replace an existing file, and Python has no binding for renameat2(2).
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    paths = (directory, os.fsencode(old), directory, os.fsencode(new))
    if library.renameat2(*paths, _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)


def is_open_for_writing(descriptor: int) -> bool:
    """True if the file of this read-only descriptor is open for writing elsewhere, including by a loop device.

    Takes a read lease and releases it at once. False if the filesystem has no leases, or this user may not take one.
    Raises `OSError` for any other error.
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
        # With the lease kept, a writer's open would kill this process with SIGIO.
        raise _named(exc, descriptor) from None
    return False


def is_nocow(descriptor: int) -> bool:
    """True for a file with the attribute NOCOW of Btrfs (chattr +C); False on filesystems without it."""
    answer = _attribute(descriptor, _GETFLAGS, 8)
    return answer is not None and bool(struct.unpack("=q", answer)[0] & _NOCOW)


def _attribute(descriptor: int, request: int, size: int) -> bytes | None:
    """Returns the answer of a query ioctl; None if it is not supported or denied."""
    try:
        answer = _ioctl(descriptor, request, bytes(size))
    except OSError as exc:
        if exc.errno in _UNKNOWN | _DENIED:
            return None
        raise
    return bytes(answer)


def set_nocow(descriptor: int, nocow: bool = True) -> None:
    """Sets or clears NOCOW on an empty file; setting it clears COMPRESS, which the directory may have passed on."""
    flags: int = struct.unpack("=q", bytes(_ioctl(descriptor, _GETFLAGS, bytes(8))))[0]
    if nocow and flags & _COMPRESS:
        # Btrfs does not accept both changes in one call.
        flags &= ~_COMPRESS
        _ioctl(descriptor, _SETFLAGS, struct.pack("=q", flags))
    _ioctl(descriptor, _SETFLAGS, struct.pack("=q", flags | _NOCOW if nocow else flags & ~_NOCOW))


def inode_flags(descriptor: int) -> int:
    """Returns the inode flags of a file (FS_IOC_GETFLAGS, chattr); raises `OSError` if it has none."""
    # The request number encodes a long, but the kernel writes an int.
    flags: int = struct.unpack_from("=I", fcntl.ioctl(descriptor, _GETFLAGS, bytes(8)))[0]
    return flags


def set_inode_flags(descriptor: int, flags: int) -> None:
    """Sets the inode flags of a file (FS_IOC_SETFLAGS); raises `OSError`."""
    fcntl.ioctl(descriptor, _SETFLAGS, struct.pack("=Q", flags))


def generation(descriptor: int) -> int | None:
    """Returns the inode's generation number, which changes when the inode number is reused; None without support.

    FS_IOC_GETVERSION: supported by ext4, XFS and Btrfs, not by tmpfs and NFS.
    """
    answer = _attribute(descriptor, _GETVERSION, 8)
    if answer is None:
        return None
    # The request number encodes a long, but the kernel writes an int.
    number: int = struct.unpack_from("=I", answer)[0]
    return number


class Mount(NamedTuple):
    """A mounted filesystem: its type, its mount point, the directory in it that is mounted there, and its source."""

    type: str
    point: str
    root: str = "/"
    source: str = ""


def mounts() -> list[Mount]:
    """Returns the mounts of /proc/self/mountinfo in their order; empty without /proc."""
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            lines = table.readlines()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    found = []
    for line in lines:
        # man 5 proc_pid_mountinfo: six fields, optional ones, a hyphen, type and source. Other lines are skipped.
        fields, _, rest = line.partition(b" - ")
        words, last = fields.split(b" "), rest.split(b" ")
        if len(words) < 6 or not rest:
            continue
        root, point, source = (os.fsdecode(_unescaped(field)) for field in (words[3], words[4], b"".join(last[1:2])))
        found.append(Mount(os.fsdecode(last[0]), point, root, source))
    return found


def mount_of(path: str) -> Mount:
    """Returns the mount of `path`; type "unknown filesystem" without /proc."""
    real = os.path.realpath(path)
    best = Mount("unknown filesystem", "/")
    for one in mounts():
        inside = real == one.point or real.startswith(one.point.rstrip("/") + "/")
        # Of two mounts on one point, the later line hides the earlier.
        if inside and len(one.point) >= len(best.point):
            best = one
    return best


def is_fuse(descriptor: int) -> bool:
    """True for a file of a filesystem in user space."""
    return mount_of(name_of(descriptor)).type.startswith(("fuse", "virtiofs"))


def _unescaped(field: bytes) -> bytes:
    """Returns a field of mountinfo with its octal escapes (space, tab, newline, backslash) decoded."""
    if b"\\" in field:
        for code in (b"040", b"011", b"012", b"134"):
            field = field.replace(b"\\" + code, bytes([int(code, 8)]))
    return field


def is_read_only(descriptor: int) -> bool:
    """True for a directory of a filesystem that is mounted read-only, or the root of a read-only Btrfs subvolume."""
    if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
        return True
    try:
        flags = bytes(_ioctl(descriptor, _BTRFS_SUBVOL_GETFLAGS, bytes(8)))
    except OSError as exc:
        # EINVAL: a directory of a Btrfs that is not the root of a subvolume.
        if exc.errno not in _UNKNOWN:
            raise
        return False
    return bool(int.from_bytes(flags, "little") & _SUBVOL_RDONLY)


def filesystem_id(descriptor: int) -> bytes:
    """Returns the identity of the filesystem of an open file: its device number, or the fsid of a Btrfs.

    Raises `OSError`, see `not_told`.
    """
    try:
        # Each subvolume of a Btrfs has a device number of its own, but all share blocks.
        return bytes(_ioctl(descriptor, _BTRFS_FS_INFO, bytes(1024)))[16:32]
    except OSError as exc:
        if exc.errno not in _UNKNOWN:
            raise
        return os.fstat(descriptor).st_dev.to_bytes(8, "little")


def filesystem_uuid(descriptor: int) -> bytes:
    """Returns the UUID of the filesystem of an open file, which a mount keeps; else `filesystem_id`.

    FS_IOC_GETFSUUID: Linux 6.9 and later, of filesystems with a UUID. Raises `OSError`, see `not_told`.
    """
    try:
        answer = bytes(_ioctl(descriptor, _GETFSUUID, bytes(17)))
    except OSError as exc:
        if exc.errno not in _UNKNOWN:
            raise
        return filesystem_id(descriptor)
    return answer[1 : 1 + answer[0]]


def physical_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(logical, length, physical)` in bytes, of written extents whose physical address is certain.

    Leaves out inline, compressed and delayed extents. Raises `OSError`, see `not_told`.
    """
    rows, flags = extents(descriptor)
    certain: npt.NDArray[np.int64] = rows[(flags & (_FIEMAP_VAGUE | _FIEMAP_UNWRITTEN)) == 0]
    return certain


def encoded_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(logical, length, physical)` in bytes, of encoded extents: compressed, mostly.

    `physical` is the start of the whole extent, even if the file has only a part of it. Raises `OSError`.
    """
    rows, flags = extents(descriptor)
    encoded: npt.NDArray[np.int64] = rows[flags & (_FIEMAP_VAGUE | _FIEMAP_UNWRITTEN) == _FIEMAP_ENCODED]
    return encoded


def settled_ranges(descriptor: int) -> npt.NDArray[np.int64] | None:
    """Returns rows `(logical, length, physical)` in bytes, of all extents; None if an address is uncertain."""
    rows, flags = extents(descriptor)
    return None if (flags & _FIEMAP_VAGUE).any() else rows


def shares_blocks(descriptor: int) -> bool:
    """True if other files share blocks with this one: a write then gives the file another block.

    Raises `OSError` if the filesystem cannot tell.
    """
    return bool((extents(descriptor)[1] & _FIEMAP_SHARED).any())


def written_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(start, end)` in bytes, of the written extents of a file: sorted, without overlaps.

    Unwritten extents read as zero. (SEEK_DATA reports them as data while their pages are cached.) Raises `OSError`.
    """
    rows, flags = extents(descriptor)
    # Delayed extents have data without an address yet.
    unwritten = (flags & _FIEMAP_UNWRITTEN != 0) & (flags & _FIEMAP_DELAYED == 0)
    return _apart(rows[~unwritten])


def allocated_ranges(descriptor: int) -> npt.NDArray[np.int64]:
    """Returns rows `(start, end)` in bytes, of all extents of a file, unwritten ones too; see `written_ranges`."""
    return _apart(extents(descriptor)[0])


def _apart(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns `(start, end)` of extents, with overlaps removed."""
    import numpy as np

    end = np.maximum.accumulate(rows[:, 0] + rows[:, 1])
    start = rows[:, 0]
    start = np.maximum(start, np.append(0, end[:-1])[: len(start)])
    ranges: npt.NDArray[np.int64] = np.stack([start, end], axis=1)[start < end]
    return ranges


def extents(descriptor: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns rows `(logical, length, physical)` in bytes, of all extents of a file, and the FIEMAP flags of each."""
    import numpy as np

    # struct fiemap_extent
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
        # struct fiemap: fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved.
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
