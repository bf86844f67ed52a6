"""The content of a partition by its first bytes: filesystem, encryption, or a part of a volume group."""

from __future__ import annotations

from typing import Protocol


class Disk(Protocol):
    """Bytes that can be read: a disk, or a logical volume."""

    @property
    def size(self) -> int:
        """Returns the number of bytes."""

    def read(self, offset: int, length: int, /) -> bytes:
        """Returns bytes."""


_MAGIC = (
    ("bitlocker", 3, b"-FVE-FS-"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("ntfs", 3, b"NTFS    "),
    ("xfs", 0, b"XFSB"),
    ("ext", 0x438, b"\x53\xef"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("lvm", 0x200, b"LABELONE"),
    ("fat", 0x52, b"FAT32   "),
    ("fat", 0x36, b"FAT1"),
)


def content_of(disk: Disk, start: int) -> str | None:
    """Returns the kind of content at a byte of the disk; None if it is not known."""
    for kind, offset, magic in _MAGIC:
        at = start + offset
        if at + len(magic) <= disk.size and disk.read(at, len(magic)) == magic:
            return kind
    return None
