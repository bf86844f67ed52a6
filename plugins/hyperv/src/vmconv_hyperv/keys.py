"""Names in Hyper-V's configurations: ids of device types, words for values, names of files.

The ids are the same in the XML of Windows Server 2012 and in `.vmcx`.
"""

from __future__ import annotations

BIOS = "ac6b8dc1-3257-4a70-b1b2-a9c9215659ad"
IDE = "83f8638b-8dca-4152-9eda-2ca8b33039b4"
SCSI = "d422512d-2bf2-4752-809d-7b82b5fcb1b4"
SERIAL = "8e3a359f-559a-4b6a-98a9-1690a6100ed7"
FLOPPY = "8f0d2762-0b00-4e04-af4f-19010527cb93"
ETHERNET = "2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778"
TPM = "736e6aa9-a3f8-49c0-9550-a963214d259a"

LEGACY_ETHERNET = "emulated ethernet port"
"""In the name of a legacy network adapter's device."""

BOOT_CLASSES = {"Floppy": "floppy", "Optical": "cdrom", "HardDrive": "disk", "Network": "network"}
"""Devices of a generation 1 machine's boot order."""

STARTUP = {"floppy": "Floppy", "cdrom": "CD", "disk": "IDE", "network": "LegacyNetworkAdapter"}
"""The same in the words of Set-VMBios."""

_UNSUITABLE = str.maketrans(dict.fromkeys('<>:"/\\|?*', "_"))


def file_name(name: str | None) -> str:
    """Returns a machine's name without the characters that no file name of Windows has."""
    return (name or "machine").translate(_UNSUITABLE).strip(". ") or "machine"
