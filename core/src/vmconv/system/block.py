"""Block devices: their block size, and what they lie on.

Request numbers and structures: linux/fs.h, linux/loop.h; man 4 loop, man 5 sysfs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vmconv.system import linux

_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64: lo_device, lo_inode, lo_rdevice, and 208 bytes more.
_LOOP_INFO = struct.Struct("=QQQ208x")
_SYSFS = "/sys/dev/block"


class Place(NamedTuple):
    """A block device by its number, or a file by the number of its filesystem and its inode."""

    device: int
    inode: int = 0


def place_of(status: os.stat_result) -> Place:
    """Returns the place of a block device or file."""
    return Place(status.st_rdev) if stat.S_ISBLK(status.st_mode) else Place(status.st_dev, status.st_ino)


def logical_block(descriptor: int) -> int:
    """Returns the bytes of the smallest block that a device writes. Raises `OSError`."""
    return _number(descriptor, _BLKSSZGET)


def is_read_only(descriptor: int) -> bool:
    """True if the kernel refuses to write to a device. Raises `OSError`."""
    return bool(_number(descriptor, _BLKROGET))


def _number(descriptor: int, request: int) -> int:
    number: int = struct.unpack("=i", fcntl.ioctl(descriptor, request, bytes(4)))[0]
    return number


def below(device: Place) -> set[Place]:
    """Returns the device and all that it lies on: disks, slaves (LVM, md), and the files of loop devices.

    Raises `OSError` if the kernel does not say it.
    """
    found: set[Place] = set()
    waiting = [device]
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            # A file of a loop device lies on a mounted device, which cannot be claimed.
            waiting += () if place.inode else directly_below(place)
    return found


def directly_below(device: Place) -> Iterator[Place]:
    """Yields the devices and the file that a device lies on. Raises `OSError`."""
    home = os.path.realpath(f"{_SYSFS}/{os.major(device.device)}:{os.minor(device.device)}")
    if os.path.exists(f"{home}/partition"):
        yield _numbered(os.path.dirname(home))
        return
    slaves = f"{home}/slaves"
    for name in os.listdir(slaves) if os.path.isdir(slaves) else ():
        yield _numbered(f"{slaves}/{name}")
    if os.path.exists(f"{home}/loop/backing_file"):
        yield _backing(os.path.basename(home), device)


def _numbered(home: str) -> Place:
    """Returns the device of a directory in sysfs."""
    with open(f"{home}/dev", encoding="ascii") as file:
        major, minor = file.read().split(":")
    return Place(os.makedev(int(major), int(minor)))


def _backing(name: str, device: Place) -> Place:
    """Returns the file or device of a loop device. sysfs has its path, which other mounts may hide."""
    descriptor = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if place_of(os.fstat(descriptor)) != device:
            raise OSError(errno.ENXIO, "is another device", f"/dev/{name}")
        answer = fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    finally:
        linux.close(descriptor)
    filesystem, inode, number = _LOOP_INFO.unpack(answer)
    return Place(number) if number else Place(filesystem, inode)


def loops() -> Iterator[tuple[str, Place]]:
    """Yields the name and the number of each loop device with a file."""
    for name in os.listdir("/sys/block"):
        if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file"):
            yield f"/dev/{name}", _numbered(f"/sys/block/{name}")
