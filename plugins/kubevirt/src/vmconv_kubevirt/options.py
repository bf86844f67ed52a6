"""Options of new VirtualMachine objects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A label of RFC 1123: the name of a namespace."""

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
"""A subdomain of RFC 1123: the name of most other objects."""


@dataclass(frozen=True)
class Options:
    namespace: str | None = option(None, "namespace of all objects; kubectl's by default")
    storage_class: str | None = option(None, "storage class of the disks; the cluster's default otherwise")
    bus: Literal["virtio", "sata", "scsi"] | None = option(
        None, "bus of all disks. The guest needs its driver; scsi is virtio-scsi"
    )
    network: str | None = option(None, "NetworkAttachmentDefinition, NAME or NAMESPACE/NAME, for all network cards")
    running: bool = option(False, "start the machine as soon as it exists, before its disks are uploaded")

    def __post_init__(self) -> None:
        if self.namespace is not None and not _LABEL.fullmatch(self.namespace):
            raise ValueError("namespace is a name of at most 63 lower-case letters, digits and hyphens")
        if self.storage_class is not None and not _NAME.fullmatch(self.storage_class):
            raise ValueError("storage_class is a name of lower-case letters, digits, dots and hyphens")
        if self.network is not None:
            namespace, slash, name = self.network.rpartition("/")
            if not _NAME.fullmatch(name) or (slash and not _LABEL.fullmatch(namespace)):
                raise ValueError("network is NAME or NAMESPACE/NAME, of lower-case letters, digits, dots and hyphens")
