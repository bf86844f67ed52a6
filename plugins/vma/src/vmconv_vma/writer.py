"""The configuration of a machine as it lies in a backup, and the archive of it and its disks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vmconv.machine import Changes
from vmconv.plugin import Adapted, Blob, ConfigFile, Extents, Kind, PlanError
from vmconv_proxmox import Proxmox
from vmconv_proxmox.backup import drive_key
from vmconv_vma import structs
from vmconv_vma.header import MAX_DEVICE, is_name
from vmconv_vma.placing import Archive

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import Member

FIREWALL = "qemu-server.fw"
EFI_DISK = "drive-efidisk0"
TPM_STATE = "drive-tpmstate0-backup"
_MAX_BLOB = 65535


def adapt(machine: Machine, options: Any) -> Adapted:
    """Returns the machine in Proxmox's terms; raises `PlanError` if it has no disk, which no backup can be without."""
    if not any(disk.device is None for disk in machine.disks):
        raise PlanError("a backup has at least one disk, and the machine has none")
    adapted = Proxmox().adapt(machine, options)
    own = adapted.machine.extra.get("vma", {})
    kept = {name: text for name, text in own.items() if name == FIREWALL and len(text.encode()) < _MAX_BLOB}
    if kept == own:
        return adapted
    changes = Changes()
    for name in own.keys() - kept.keys():
        changes.add("extra.vma", f"{name}={own[name]}"[:80].replace("\n", " "), None, "belongs to the source's archive")
    others = {name: values for name, values in adapted.machine.extra.items() if name != "vma"}
    extra = {**others, **({"vma": kept} if kept else {})}
    found = adapted.machine.model_copy(update={"extra": extra})
    return Adapted(found, (*adapted.substitutions, *changes.found))


def write(machine: Machine, options: Any) -> tuple[ConfigFile, ...]:
    """Returns the configuration with the comments that `qmrestore` finds disks by, behind the other small files."""
    files = {
        disk.file: f"vm-{options.vmid}-disk-{number}.raw" for number, disk in enumerate(machine.disks) if disk.file
    }
    devices = [(drive_key(disk, machine), disk.file) for disk in machine.disks if disk.file]
    firmware = machine.firmware
    if firmware.nvram is not None:
        files[firmware.nvram.file] = f"vm-{options.vmid}-disk-{len(machine.disks)}.raw"
        devices.append(("efidisk0", firmware.nvram.file))
        nvram = firmware.nvram.model_copy(update={"file": files[firmware.nvram.file]})
        firmware = firmware.model_copy(update={"nvram": nvram})
    disks = tuple(disk.model_copy(update={"file": files.get(disk.file or "")}) for disk in machine.disks)
    on_host = machine.model_copy(update={"disks": disks, "firmware": firmware})
    *states, config = Proxmox().write(on_host, options)
    if machine.tpm is not None:
        devices.append(("tpmstate0", TPM_STATE))
    lines = (f"#qmdump#map:{key}:{_name(name)}:{options.storage}:raw:\n" for key, name in devices)
    content = config.content + "".join(lines).encode()
    if len(content) > _MAX_BLOB:
        raise PlanError(f"the configuration has {len(content)} bytes, at most {_MAX_BLOB} fit into a backup")
    firewall = machine.extra.get("vma", {}).get(FIREWALL)
    return (
        *([ConfigFile(FIREWALL, f"{firewall}\n".encode())] if firewall else []),
        *(state._replace(name=TPM_STATE) for state in states),
        config._replace(content=content),
    )


def _name(name: str) -> str:
    if not is_name(name):
        raise PlanError(f"{name!r} cannot be the name of a device in a backup")
    return name


def pack(configs: Sequence[ConfigFile], disks: Sequence[Member], modulus: int) -> Extents:
    """Returns the table of an archive: the last of `configs`, and the other files and disks as its devices.

    If blocks can be shared (`modulus` above 1), blocks lie at multiples of their size.
    """
    *others, config = configs
    if config.name.lower().endswith(".lzo"):
        hint = "end the name in .vma.zst or .vma.gz"
        raise PlanError(f"{config.name}: vmconv compresses archives by Zstandard or gzip", hint=hint)
    blobs = [("qemu-server.conf", config.content)]
    blobs += [(each.name, each.content) for each in others if each.name == FIREWALL]
    # Small devices first: what decodes an archive for the firmware's variables finds them in its beginning.
    devices = [(each.name, _without_zeros(each)) for each in others if each.name != FIREWALL]
    devices += [(each.name, each.table) for each in disks]
    for name, table in devices:
        if table.size % 512 or not table.size:
            raise PlanError(f"{name}: has {table.size} bytes, disks of a backup have whole sectors")
        if table.size > MAX_DEVICE:
            raise PlanError(f"{name}: has {table.size} bytes, disks of a backup have {MAX_DEVICE} at most")
    if len(devices) >= structs.MAX_DEVICES - 1:
        raise PlanError(f"{len(devices)} disks are more than a backup can have")
    header, uuid = _header(blobs, [(_name(name), table.size) for name, table in devices])
    return Archive(header, uuid, [table for _, table in devices], aligned=modulus > 1).table()


def _without_zeros(config: ConfigFile) -> Extents:
    """Returns a small file as a table whose blocks of zeros are none."""
    blob, size = Blob(config.name, config.content), len(config.content)
    starts = range(0, size, structs.BLOCK)
    used = [any(config.content[at : at + structs.BLOCK]) for at in starts]
    rows = (
        (at, Kind.DATA, blob, at) if there else (at, Kind.ZERO, None, 0) for at, there in zip(starts, used, strict=True)
    )
    return Extents.of(rows, size)


def _header(configs: Sequence[tuple[str, bytes]], devices: Sequence[tuple[str, int]]) -> tuple[bytes, bytes]:
    """Returns the header, and the archive's UUID, which depends on nothing but what is in the header."""
    blobs = bytearray(b"\0")

    def add(data: bytes) -> int:
        at = len(blobs)
        blobs.extend(struct.pack("<H", len(data)) + data)
        return at

    names, contents = np.zeros((2, structs.MAX_CONFIGS), dtype=">u4")
    for number, (name, data) in enumerate(configs):
        names[number], contents[number] = add(name.encode() + b"\0"), add(data)
    table = np.zeros(structs.MAX_DEVICES, dtype=structs.DeviceInfo)
    for number, (name, size) in enumerate(devices, start=1):
        table["devname_ptr"][number], table["size"][number] = add(name.encode() + b"\0"), size
    blobs.extend(bytes(-len(blobs) % 512))
    back = names.tobytes() + contents.tobytes() + bytes(4) + table.tobytes() + bytes(blobs)
    uuid = hashlib.md5(back, usedforsecurity=False).digest()
    head = {
        "magic": structs.MAGIC,
        "version": structs.VERSION,
        "uuid": uuid,
        "ctime": 0,
        "blob_buffer_offset": structs.HEADER_SIZE,
        "blob_buffer_size": len(blobs),
        "header_size": structs.HEADER_SIZE + len(blobs),
    }
    blank = structs.Header.build({**head, "md5sum": bytes(16)}).ljust(structs.CONFIG_NAMES, b"\0") + back
    md5sum = hashlib.md5(blank, usedforsecurity=False).digest()
    return structs.Header.build({**head, "md5sum": md5sum}).ljust(structs.CONFIG_NAMES, b"\0") + back, uuid
