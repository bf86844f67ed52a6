"""VMware's hardware families, and what a guest sees of a UUID in them."""

from __future__ import annotations

import re
from uuid import UUID

_LITTLE_ENDIAN_SINCE = 13
"""Guests of newer families see the first three fields of the configured UUID in reverse byte order."""


def family(hardware_version: str | None) -> int | None:
    """Returns the number of the newest VMware family in a list such as `vmx-10, vmx-11`; None without one."""
    found = re.findall(r"\bvmx-(\d{1,2})\b", hardware_version or "")
    return max(map(int, found), default=None)


def serial_of(stated: UUID) -> str:
    """Returns the serial number in SMBIOS, which VMware forms of the configured UUID."""
    return f"VMware-{stated.bytes[:8].hex(' ')}-{stated.bytes[8:].hex(' ')}"


def uuid_seen(stated: UUID, number: int | None) -> UUID:
    """Returns the UUID that the guest reads in SMBIOS for a configured one; its own inverse."""
    swapped = number is not None and number >= _LITTLE_ENDIAN_SINCE
    return UUID(bytes_le=stated.bytes) if swapped else stated
