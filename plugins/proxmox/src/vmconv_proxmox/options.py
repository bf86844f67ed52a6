"""Options of the writer: what the storage and the network of the target's host are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option

ScsiHw = Literal["virtio-scsi-single", "virtio-scsi-pci", "pvscsi", "megasas", "lsi", "lsi53c810"]

_STORAGE = re.compile(r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]")
_BRIDGE = re.compile(r"[A-Za-z0-9._-]{1,15}")
_CPU = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@dataclass(frozen=True)
class Options:
    """Where a machine goes; raises `ValueError` for names that Proxmox refuses."""

    vmid: int = option(100, "id of the machine, from 100; it names the directory and the disks")
    storage: str = option("local", "storage that holds the disks, of type directory, NFS or CIFS")
    bridge: str = option("vmbr0", "bridge of the network cards; a card at another vmbrN keeps that one")
    scsihw: ScsiHw | None = option(None, "model of the SCSI controller; by default the source's, or virtio-scsi-single")
    cpu: str = option("x86-64-v2-AES", "CPU type, unless the source names one that Proxmox knows")

    def __post_init__(self) -> None:
        if not 100 <= self.vmid <= 999_999_999:
            raise ValueError("vmid is a number from 100 to 999999999")
        if not _STORAGE.fullmatch(self.storage):
            raise ValueError("storage is a name of letters, digits, dots, hyphens and underscores")
        if not _BRIDGE.fullmatch(self.bridge):
            raise ValueError("bridge is the name of a network interface")
        if not _CPU.fullmatch(self.cpu):
            raise ValueError("cpu is a type such as host or x86-64-v3")
