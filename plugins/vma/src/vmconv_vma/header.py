"""Reads the header of an archive: its configurations and its devices."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.plugin import Structure, damaged
from vmconv_vma import structs

if TYPE_CHECKING:
    from vmconv.plugin import File, ImageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of devices and configurations. Proxmox writes `drive-scsi0` and `qemu-server.conf`."""


def is_name(text: str) -> bool:
    """True for a name that a device or a configuration can have."""
    return _NAME.fullmatch(text) is not None


MAX_DEVICE = structs.CLUSTER << 32
"""Bytes of a device: the number of a cluster has 32 bits."""


class Device(NamedTuple):
    """A disk of the archive: its number in extents, its name and its bytes."""

    number: int
    name: str
    size: int


class Blob(NamedTuple):
    """A named blob: `offset` is that of its bytes in the archive."""

    name: str
    offset: int
    data: bytes


class Header(NamedTuple):
    """The header: extents follow it at `size`."""

    size: int
    uuid: bytes
    configs: tuple[Blob, ...]
    devices: tuple[Device, ...]


def size_of(file: File, data: bytes) -> int:
    """Returns the bytes of the header whose fixed part is `data`; raises `ImageError` if it cannot be one."""
    head = Structure(file, structs.Header)
    if len(data) < head.length:
        raise head.refused(f"is cut off after {len(data)} of {head.length} bytes")
    fields = head.parse("is no VMA archive", "magic", data=data)
    if fields.version != structs.VERSION:
        raise head.damaged("version", f"{fields.version} is not supported, only {structs.VERSION}")
    head.limit("header_size", fields.header_size, structs.HEADER_SIZE + 1, structs.MAX_HEADER)
    return int(fields.header_size)


def parse(file: File, data: bytes) -> Header:
    """Returns the header whose bytes are `data`, all of them. `file` is for errors.

    Raises `ImageError` with the field and its offset if it is damaged.
    """
    head = Structure(file, structs.Header)
    fields = head.parse("is no VMA archive", "magic", data=data)
    _check_sum(head, fields.md5sum, data)
    first, length = fields.blob_buffer_offset, fields.blob_buffer_size
    head.limit("blob_buffer_offset", first, structs.HEADER_SIZE, len(data))
    head.limit("blob_buffer_size", length, 0, len(data) - first)
    blobs = _Blobs(file, data, first, first + length)
    return Header(len(data), fields.uuid, tuple(_configs(file, data, blobs)), tuple(_devices(file, data, blobs)))


def _check_sum(head: Structure, stated: bytes, data: bytes) -> None:
    found = hashlib.md5(data[:32] + bytes(16) + data[48:], usedforsecurity=False).digest()
    if found != stated:
        raise head.damaged("md5sum", f"{stated.hex()} is not the MD5 of the header, {found.hex()}")


class _Blobs(NamedTuple):
    """The buffer of blobs: bytes `begin` to `end` of the header."""

    file: File
    data: bytes
    begin: int
    end: int

    def at(self, what: str, field: int, pointer: int) -> tuple[int, bytes]:
        """Returns offset and bytes of the blob that the field at offset `field` points to."""
        start = self.begin + pointer + 2
        if start > self.end:
            raise self._refused(what, field, pointer, f"is past the end of the blobs ({self.end - self.begin:#x})")
        length = int.from_bytes(self.data[start - 2 : start], "little")
        if start + length > self.end:
            raise self._refused(what, field, pointer, f"has {length} bytes, more than the blobs have left")
        return start, self.data[start : start + length]

    def name(self, what: str, field: int, pointer: int) -> str:
        """Returns the name that the field at offset `field` points to."""
        name = self.at(what, field, pointer)[1]
        text = name[:-1].decode("ascii", "replace")
        if not name.endswith(b"\0") or not _NAME.fullmatch(text):
            raise self._refused(what, field, pointer, f"{text[:60]!r} is no name of letters, digits, '.', '_' and '-'")
        return text

    def _refused(self, what: str, field: int, pointer: int, problem: str) -> ImageError:
        return damaged(self.file, what, field, f"blob {pointer:#x} {problem}")


def _configs(file: File, data: bytes, blobs: _Blobs) -> list[Blob]:
    names = np.frombuffer(data, ">u4", structs.MAX_CONFIGS, structs.CONFIG_NAMES).tolist()
    contents = np.frombuffer(data, ">u4", structs.MAX_CONFIGS, structs.CONFIG_DATA).tolist()
    found: dict[str, Blob] = {}
    for number, (name, content) in enumerate(zip(names, contents, strict=True)):
        if not (name and content):
            continue
        field = structs.CONFIG_NAMES + 4 * number
        text = blobs.name(f"config_names[{number}]", field, name)
        if text in found:
            raise damaged(file, f"config_names[{number}]", field, f"{text!r} is there twice")
        found[text] = Blob(text, *blobs.at(f"config_data[{number}]", structs.CONFIG_DATA + 4 * number, content))
    return list(found.values())


def _devices(file: File, data: bytes, blobs: _Blobs) -> list[Device]:
    table = np.frombuffer(data, structs.DeviceInfo, structs.MAX_DEVICES, structs.DEV_INFO)
    found: dict[str, Device] = {}
    # Entries of extents with device 0 are not used, so the first device is 1.
    for number in range(1, structs.MAX_DEVICES):
        pointer, size = int(table["devname_ptr"][number]), int(table["size"][number])
        if not (pointer and size):
            continue
        field = structs.DEV_INFO + number * structs.DeviceInfo.itemsize
        name = blobs.name(f"dev_info[{number}] name", field, pointer)
        if name in found:
            raise damaged(file, f"dev_info[{number}] name", field, f"{name!r} is there twice")
        if size > MAX_DEVICE:
            raise damaged(file, f"dev_info[{number}] size", field + 8, f"{size} is more than {MAX_DEVICE}")
        found[name] = Device(number, name, size)
    return list(found.values())
