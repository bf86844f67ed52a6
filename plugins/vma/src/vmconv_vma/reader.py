"""The machine in an archive: its qemu-server.conf, with the archive's devices as its disks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmconv.machine import refused
from vmconv.plugin import ImageError
from vmconv_proxmox.backup import read_backup

if TYPE_CHECKING:
    from vmconv.machine import Disk, Machine
    from vmconv.plugin import File
    from vmconv_vma.header import Header

CONFIG = "qemu-server.conf"
_MAP = re.compile(r"#qmdump#map:([a-z]{2,10}\d{1,5}):([^:]{1,128}):[^:]*:[^:]*:\s*")
_COMMENTS = (b"#qmdump#", b"#vzdump#")
"""Lines that Proxmox adds to the configuration in a backup."""


def machine_of(file: File, header: Header) -> Machine:
    """Returns the machine of an archive with this header.

    Raises `ImageError` if it has no configuration, or the configuration is damaged.
    """
    texts = {blob.name: blob.data for blob in header.configs}
    if CONFIG not in texts:
        names = ", ".join(sorted(texts)[:8]) or "none"
        raise ImageError(f"{file.name}: has no {CONFIG}, its configurations are: {names}")
    sizes = {device.name: device.size for device in header.devices}
    lines = texts[CONFIG].split(b"\n")
    volumes = dict(_volumes(file, [line for line in lines if line.startswith(_COMMENTS)], sizes))
    machine = read_backup(file, b"\n".join(line for line in lines if not line.startswith(_COMMENTS)), volumes)
    others = {name: data.decode("utf-8", "replace") for name, data in texts.items() if name != CONFIG}
    used = {disk.file for disk in machine.disks} | set(volumes.values())
    others |= {f"device.{name}": f"{size} bytes" for name, size in sizes.items() if name not in used}
    extra = {**machine.extra, **({"vma": _plain(others)} if others else {})}
    changes = {"disks": tuple(_disk(disk, sizes) for disk in machine.disks), "extra": extra}
    return machine.model_copy(update=changes)


def _volumes(file: File, comments: list[bytes], sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yields keys of drives and the names of their devices: as comments state them, or as Proxmox names them."""
    for name in sizes:
        key = name.removeprefix("drive-").removesuffix("-backup")
        if name.startswith("drive-") and re.fullmatch(r"[a-z]{2,10}\d{1,5}", key):
            yield key, name
    for line in comments:
        found = _MAP.fullmatch(line.decode("utf-8", "replace"))
        if found is None:
            continue
        if found[2] not in sizes:
            raise refused(file, f"{CONFIG} map of {found[1]}", f"the archive has no device {found[2][:60]!r}")
        yield found[1], found[2]


def _disk(disk: Disk, sizes: dict[str, int]) -> Disk:
    """Returns a disk with its device; a disk that was excluded from the backup is only named."""
    if disk.file in sizes:
        return disk.model_copy(update={"format": "raw", "capacity": sizes[disk.file]})
    return disk.model_copy(update={"file": None, "format": None, "device": disk.device or disk.file})


def _plain(values: dict[str, str]) -> dict[str, str]:
    """Returns texts without control characters, which the model refuses."""
    return {
        name: re.sub(r"[^\n -~\xa0-\ud7ff]", " ", text.replace("\r\n", "\n")).strip() for name, text in values.items()
    }
