"""Trees of settings of Hyper-V's machines, as its configurations have them."""

from __future__ import annotations

from typing import Any

from support.hyperv_storage import Unsigned

BIOS = "ac6b8dc1-3257-4a70-b1b2-a9c9215659ad"
IDE = "83f8638b-8dca-4152-9eda-2ca8b33039b4"
SCSI = "d422512d-2bf2-4752-809d-7b82b5fcb1b4"
ETHERNET = "2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778"
TPM = "736e6aa9-a3f8-49c0-9550-a963214d259a"
SERIAL = "8e3a359f-559a-4b6a-98a9-1690a6100ed7"
FLOPPY = "8f0d2762-0b00-4e04-af4f-19010527cb93"
LEGACY = "11111111-0000-0000-0000-000000000001"
FIRST, SECOND, NIC = (f"{digit * 8}-0000-0000-0000-000000000000" for digit in "ABC")


def manifest(*devices: tuple[str, str, str]) -> dict[str, Any]:
    """Returns a manifest of devices: type, instance, name."""
    entries = {
        f"vdev{number:03}": {"device": kind, "flags": 1, "instance": instance.upper(), "name": name}
        for number, (kind, instance, name) in enumerate(devices, start=1)
    }
    return {"size": len(devices), "version": 260} | entries


def drive(kind: str, path: str = "") -> dict[str, Any]:
    return {"type": kind, "pathname": path, "iops_limit": 0, "weight": 100}


SECOND_GENERATION: dict[str, Any] = {
    "properties": {
        "name": "web & <co>",
        "notes": "first\nsecond",
        "subtype": 1,
        "global_id": "0AA394FA-7C4A-4070-BA32-773D43B28A68",
        "version": 2304,
    },
    "settings": {
        "memory": {"bank": {"size": 2048, "dynamic_memory_enabled": True, "reservation": 512, "limit": 4096}},
        "processors": {"count": Unsigned(4)},
    },
    "manifest": manifest(
        (SCSI, FIRST, "Synthetic SCSI Controller"),
        (ETHERNET, NIC, "Synthetic Ethernet Port"),
        (SCSI, SECOND, "Synthetic SCSI Controller"),
        (TPM, TPM, "Microsoft Virtual TPM Device"),
    ),
    f"_{FIRST.lower()}_": {
        "VDEVVersion": 512,
        "controller0": {
            "drive0": drive("VHD", r"C:\VMs\web\web.vhdx"),
            "drive1": drive("ISO", r"C:\iso\debian.iso"),
            "drive2": drive("NONE"),
            "drive63": drive("VHD", r"\\server\share\data.vhdx"),
        },
    },
    f"_{SECOND.lower()}_": {"controller0": {"drive5": drive("VHD", r"\\.\PHYSICALDRIVE2")}},
    f"_{NIC.lower()}_": {
        "MacAddress": "00-15-5D-01-07-DC",
        "MacAddressIsStatic": True,
        "IsConnected": True,
        "Connection": {"AltSwitchName": "Virtual External Switch"},
    },
    f"_{BIOS}_": {
        "bios_guid": "{7FFEE066-9755-4950-9A16-4C94AC67AD00}",
        "bios_serial_number": "1981-9952-3234-1295-3674-7651-98",
        "base_board": {"serial_number": "board"},
        "chassis": {"serial_number": "chassis", "asset_tag": "tag"},
        "secure_boot_enabled": True,
    },
    "global_settings": {
        "devices": {"generation_id": "805a287a250989e4fe6f6992be334a43"},
        "guest": {"file": r"C:\VMs\web\0AA394FA.vmgs"},
    },
}

FIRST_GENERATION: dict[str, Any] = {
    "properties": {"name": "old", "subtype": 0},
    "settings": {"memory": {"bank": {"size": 512}}, "processors": {"count": 1}},
    "manifest": manifest(
        (IDE, IDE, "Microsoft Emulated IDE Controller"),
        (SERIAL, SERIAL, "Microsoft Emulated Serial Controller"),
        (FLOPPY, FLOPPY, "Microsoft Emulated Floppy Controller"),
        (LEGACY, LEGACY, "Emulated Ethernet Port"),
        (SCSI, FIRST, "Synthetic SCSI Controller"),
    ),
    f"_{IDE}_": {
        "controller0": {"drive0": drive("VHD", r"D:\old.vhd"), "drive1": drive("NONE")},
        "controller1": {"drive0": drive("ISO"), "drive1": drive("NONE")},
    },
    f"_{SERIAL}_": {"port0": {"connection": r"\\.\pipe\com1"}, "port1": {"connection": ""}},
    f"_{FLOPPY}_": {"controller0": {"drive0": drive("VFD", r"D:\boot.vfd")}},
    f"_{LEGACY}_": {"MacAddress": "00-00-00-00-00-00", "MacAddressIsStatic": False, "IsConnected": False},
    f"_{FIRST.lower()}_": {"VDEVVersion": 512},
    f"_{BIOS}_": {
        "boot": {"device0": "Optical", "device1": "HardDrive", "device2": "Network", "device3": "Floppy"},
        "secure_boot_enabled": False,
    },
}
