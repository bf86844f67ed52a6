"""Options of new domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option


@dataclass(frozen=True)
class Options:
    directory: str = option("", "directory of the disks, for their absolute paths; the target directory by default")
    type: Literal["kvm", "qemu"] = option("kvm", "kvm, or qemu for hosts without KVM")
    bus: Literal["virtio", "virtio-scsi", "sata", "ide"] | None = option(
        None, "bus of all disks; the source's bus by default, where QEMU has it. The guest needs its driver"
    )
    network: str | None = option(None, "libvirt network for all network cards")
    bridge: str | None = option(None, "bridge of the host for all network cards")

    def __post_init__(self) -> None:
        if self.directory and not self.directory.startswith("/"):
            raise ValueError("directory is not an absolute path")
        if self.network is not None and self.bridge is not None:
            raise ValueError("network and bridge exclude each other")
