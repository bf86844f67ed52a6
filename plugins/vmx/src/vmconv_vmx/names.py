"""Words of VMX and their neutral words."""

from __future__ import annotations

SCSI_MODELS = ("buslogic", "lsilogic", "lsisas1068", "pvscsi")
"""`scsiN.virtualDev`; VMX and the neutral model have the same words."""

NICS = {"vlance": "pcnet32", "e1000": "e1000", "e1000e": "e1000e", "vmxnet3": "vmxnet3"}
"""`ethernetN.virtualDev`. vmxnet2 is `vmxnet` with `features = "15"`, as VMware's Upgraded VMXNET writes it."""

NETWORKS = {"bridged": "bridged", "nat": "nat", "hostonly": "host-only"}
"""`ethernetN.connectionType`."""

BOOT = {"hdd": "disk", "cdrom": "cdrom", "floppy": "floppy", "net": "network", "ethernet": "network"}
"""Words of `bios.bootOrder`; ethernet0 to ethernet9 are words too."""

SOUND = {"hdaudio": "hda", "sb16": "sb16", "es1371": "es1371"}
"""`sound.virtualDev`."""

SERIAL = {"file": "file", "pipe": "pipe", "network": "network", "device": "device"}
"""`serialN.fileType`."""

MODES = ("persistent", "independent-persistent", "independent-nonpersistent")

CD_IMAGE = "cdrom-image"
CD_EMULATED = "atapi-cdrom"
CD_DEVICES = ("cdrom-raw", CD_EMULATED)
DISKS = ("scsi-harddisk", "ata-harddisk", "harddisk", "disk", "plaindisk")
RAW_DISKS = ("rawdisk", "scsi-passthru-rdm", "scsi-nonpassthru-rdm", "scsi-passthrough", "genericscsi")
"""`deviceType` of disks, and of physical disks and LUNs of the host."""

AUTO = "auto detect"
"""`fileName` of a drive that is whichever the host has."""

EMPTY = ("", "emptybackingstring", "vmware-null-remote-floppy", "vmware-null-remote-cdrom")
"""`fileName` of a drive without a medium, in lower case."""

GENERATED = "00:0c:29:"
"""Addresses that VMware generates; vCenter generates 00:50:56:80 to 00:50:56:bf."""

SWAPPED_SINCE = 13
"""The hardware version from which the guest reads the first three fields of `uuid.bios` in little-endian order.

Seen with ESXi 6.5 and later: its SMBIOS is 2.7, which defines them so. Older versions have SMBIOS 2.4.
"""

PLATFORM = {
    "config.version": "8",
    "pciBridge0.present": "TRUE",
    **{
        f"pciBridge{number}.{key}": value
        for number in range(4, 8)
        for key, value in (("present", "TRUE"), ("virtualDev", "pcieRootPort"), ("functions", "8"))
    },
    "vmci0.present": "TRUE",
    "hpet0.present": "TRUE",
}
"""What each machine of VMware has. Without root ports there are no slots for vmxnet3, pvscsi and NVMe."""


WINDOWS_SCSI, WINDOWS_NIC = "lsisas1068", "e1000e"
OTHER_SCSI, OTHER_NIC = "pvscsi", "vmxnet3"
"""Devices in place of virtio: Windows brings drivers for the first two, and Linux for the others.

Kernels for clouds, such as Debian's, have no others: no AHCI, no LSI, no e1000.
"""


def is_windows(name: str | None) -> bool:
    """True if a `guestOS` is a Windows."""
    return (name or "").lower().startswith(("win", "longhorn"))


def is_vpx(mac: str) -> bool:
    """True if vCenter generates such addresses."""
    return mac.startswith("00:50:56:") and 0x80 <= int(mac[9:11], 16) <= 0xBF


def needs_no_check(mac: str) -> bool:
    """True if VMware accepts the address as a static one only without its check: its range is 00:50:56:00 to :3f."""
    return not (mac.startswith("00:50:56:") and int(mac[9:11], 16) <= 0x3F)


def version_of(hardware: str | None) -> int | None:
    """Returns the number of a hardware version such as `vmx-19`; None if it is no version of VMware."""
    digits = (hardware or "").removeprefix("vmx-")
    return int(digits) if hardware != digits and digits.isascii() and digits.isdigit() and len(digits) < 4 else None
