"""The partitions of a disk as files: each by its number and the type of its content, as `blkid` names it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmconv.errors import ImageError
from vmconv.guest.contents import content_of
from vmconv.machine.boot import partitions
from vmconv.model.view import View

if TYPE_CHECKING:
    from vmconv.model.extents import Extents
    from vmconv.model.image import Image

_TYPES = {"bitlocker": "BitLocker", "luks": "crypto_LUKS", "lvm": "LVM2_member", "fat": "vfat"}
_UNKNOWN = "raw"

_MORE = (
    (b"SWAPSPACE2", 4086, "swap"),
    (b"EXFAT   ", 3, "exfat"),
    (b"CD001", 0x8001, "iso9660"),
    (b"hsqs", 0, "squashfs"),
    (b"\x10\x20\xf5\xf2", 1024, "f2fs"),
)

# linux/fs/ext4/ext4.h: s_feature_compat, s_feature_incompat and s_feature_ro_compat of the superblock.
_EXT_FEATURES = 1024 + 0x5C
_EXT_HAS_JOURNAL = 0x4
_EXT3_INCOMPAT = 0x2 | 0x4 | 0x10
_EXT3_RO_COMPAT = 0x1 | 0x2 | 0x4


def volumes(image: Image) -> Mapping[str, View]:
    """Returns the partitions of a disk by name, such as "p1.ext4"; none if it has no partition table.

    Raises `ImageError` if the table is damaged: its partitions are not inside the disk, overlap, or loop.
    """
    table = partitions.read(image.flat)
    if table.problem:
        raise ImageError(f"{image.file.name}: {table.problem}")
    found = sorted(table.partitions)
    return {
        f"p{one.number}.{type_of(part)}": View(part)
        for one in found
        for part in [image.flat.window(one.start, one.length)]
    }


def type_of(disk: Extents) -> str:
    """Returns the type of the content of a partition; "raw" if it is not known."""
    kind = content_of(disk, 0)
    if kind == "ext":
        return _ext(disk)
    if kind:
        return _TYPES.get(kind, kind)
    for magic, at, name in _MORE:
        if at + len(magic) <= disk.size and disk.read(at, len(magic)) == magic:
            return name
    return _UNKNOWN


def _ext(disk: Extents) -> str:
    if disk.size < _EXT_FEATURES + 12:
        return _UNKNOWN
    compatible, incompatible, read_only = struct.unpack("<III", disk.read(_EXT_FEATURES, 12))
    if incompatible & ~_EXT3_INCOMPAT or read_only & ~_EXT3_RO_COMPAT:
        return "ext4"
    return "ext3" if compatible & _EXT_HAS_JOURNAL else "ext2"
