"""What a mount of JuiceFS says of itself, in files at its root that are in no listing (pkg/vfs/internal.go of JuiceFS).

They are known by their inode numbers, which no file of a volume has. Their names alone prove nothing: mounted with
--prefix-internal, a volume has them under other names, and anybody may make a file `.stats`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from vmconv.system import linux

TYPE = "fuse.juicefs"
STATISTICS = "stats"
_CONFIGURATION = "config"
_INODES = {STATISTICS: 0x7FFFFFFF00000003, _CONFIGURATION: 0x7FFFFFFF00000004}
_PREFIXES = (".", ".jfs.")
_MOST = 1 << 20
"""Bytes that are read of such a file."""
_SENT = (b"juicefs_object_request_data_bytes_PUT", b"juicefs_fuse_written_size_bytes_sum")
"""What was uploaded, and what the kernel has written: a mount with --writeback uploads later."""
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Volume(NamedTuple):
    """A mounted volume; `directory` is what of it is mounted, empty for all of it."""

    uuid: str
    directory: str


def bytes_sent(mount: linux.Mount) -> tuple[int, ...] | None:
    """Returns the bytes that a mount has uploaded, and that it was given to write, since it began.

    None if it does not tell, or is no JuiceFS. Raises `OSError`.
    """
    text = _content(mount, STATISTICS)
    if text is None or b"juicefs_" not in text:
        return None
    # A counter is missing until it counts something.
    found = dict.fromkeys(_SENT, 0)
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if name in found and value.isdigit():
            found[name] = int(value)
    return tuple(found.values())


def volume_of(mount: linux.Mount) -> Volume | None:
    """Returns the mounted volume; None if the mount does not tell this user, or is no JuiceFS. Raises `OSError`."""
    text = _content(mount, _CONFIGURATION)
    if text is None:
        return None
    import json

    try:
        said = json.loads(text)
        uuid, directory = said["Format"]["UUID"], said["Meta"]["Subdir"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not (isinstance(uuid, str) and _UUID.fullmatch(uuid) and isinstance(directory, str)):
        return None
    return Volume(uuid, directory.strip("/"))


def _content(mount: linux.Mount, name: str) -> bytes | None:
    if mount.type != TYPE:
        return None
    for prefix in _PREFIXES:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(os.path.join(mount.point, prefix + name), flags)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            status = os.fstat(descriptor)
            if status.st_ino == _INODES[name] and status.st_dev == os.stat(mount.point).st_dev:
                # The size of the statistics is 0, and each opened file is one snapshot.
                return linux.read_at(descriptor, _MOST, 0)
        finally:
            linux.close(descriptor)
    return None
