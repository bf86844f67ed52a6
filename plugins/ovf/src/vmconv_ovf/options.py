"""Options of the writers of OVF and OVA packages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option


@dataclass(frozen=True)
class Options:
    """How an OVF descriptor is written; raises `ValueError` for an invalid hardware family."""

    hardware: str | None = option(
        None, "VMware hardware family such as vmx-19; by default the source's, or vmx-13 (vmx-14 with a TPM)"
    )
    disk_format: Literal["sparse", "streamOptimized"] = option(
        "sparse", "kind of the VMDK disks: sparse shares blocks; vSphere's importer may need streamOptimized"
    )

    def __post_init__(self) -> None:
        if self.hardware is not None and not re.fullmatch(r"vmx-\d{2}", self.hardware):
            raise ValueError("hardware is a family such as vmx-13 or vmx-19")


@dataclass(frozen=True)
class PackageOptions(Options):
    """How an OVA is written."""

    manifest: Literal["none", "sha256"] = option(
        "none", "sha256: digests of all files in a .mf member, for which all payload is read"
    )
