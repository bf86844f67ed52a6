"""Options of the VMX writer."""

from __future__ import annotations

from dataclasses import dataclass

from vmconv.plugin import option


@dataclass(frozen=True)
class Options:
    """How a VMX is written; raises `ValueError` for a hardware version that VMware does not have."""

    hardware_version: int | None = option(
        None, "virtual hardware version; by default that of the source, or else 19 (ESXi 7.0 U2, Workstation 16)"
    )
    nvram_template: str | None = option(
        None, "an .nvram file of VMware, for UEFI machines: the new machine gets a copy with the source's variables"
    )

    def __post_init__(self) -> None:
        if self.hardware_version is not None and not 4 <= self.hardware_version <= 99:
            raise ValueError("hardware_version is a number from 4 to 99")
