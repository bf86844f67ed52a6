"""Logical volumes of LVM 2, for volume groups on one partition."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vmconv.guest.facts import cut
from vmconv.guest.filesystems import LIBRARIES
from vmconv.guest.volumes import Read, Stream

MAX_VOLUMES = 64


class SpanningError(Exception):
    """The volume group has several physical volumes."""


class LogicalVolume:
    """A logical volume; `name` is the group's name and its own."""

    def __init__(self, group: str, volume: Any) -> None:
        self.name = cut(f"{group}/{volume.name}")
        self.size = int(volume.size)
        self._volume = volume

    def read(self, offset: int, length: int) -> bytes:
        """Returns bytes of the volume; fewer at its end."""
        length = max(0, min(length, self.size - offset))
        return bytes(self._volume.read_buffer_at_offset(length, offset)) if length else b""


def open_group(read: Read, size: int) -> Any:
    """Returns the library's handle for the volume group on a partition."""
    handle = import_module(LIBRARIES["lvm"]).handle()
    handle.open_file_object(Stream(read, size))
    handle.open_physical_volume_files_as_file_objects([Stream(read, size)])
    return handle


def logical_volumes(handle: Any) -> list[LogicalVolume]:
    """Returns the volumes of a group, at most `MAX_VOLUMES`; raises `SpanningError`."""
    group = handle.get_volume_group()
    if group.number_of_physical_volumes != 1:
        raise SpanningError(f"its volume group has {group.number_of_physical_volumes} physical volumes, not 1")
    count = min(group.number_of_logical_volumes, MAX_VOLUMES)
    return [LogicalVolume(str(group.name), group.get_logical_volume(number)) for number in range(count)]
