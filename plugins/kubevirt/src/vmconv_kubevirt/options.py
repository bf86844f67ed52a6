"""Options of new VirtualMachine objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option


@dataclass(frozen=True)
class Options:
    namespace: str | None = option(None, "namespace of all objects; kubectl's by default")
    storage_class: str | None = option(None, "storage class of the disks; the cluster's default otherwise")
    bus: Literal["virtio", "sata", "scsi"] | None = option(
        None, "bus of all disks. The guest needs its driver; scsi is virtio-scsi"
    )
    network: str | None = option(None, "NetworkAttachmentDefinition, NAME or NAMESPACE/NAME, for all network cards")
    running: bool = option(False, "start the machine as soon as it exists, before its disks are uploaded")
