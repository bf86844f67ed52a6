"""libvirt's words for the neutral model's, and the ids of libosinfo.

libvirt, "Domain XML format"; libosinfo's database osinfo-db 20221130.
"""

from __future__ import annotations

import re

OSINFO = "{http://libosinfo.org/xmlns/libvirt/domain/1.0}"

QEMU_TYPES = ("kvm", "qemu")
"""Types of domains that QEMU runs. Others have other hardware behind the same words."""

SCSI = {
    "lsi53c895a": "lsilogic",
    "pvscsi": "vmpvscsi",
    "lsisas1068": "lsisas1068",
    "lsisas1078": "lsisas1078",
    "virtio-scsi": "virtio-scsi",
    "virtio-transitional": "virtio-transitional",
    "am53c974": "am53c974",
    "virtio-non-transitional": "virtio-non-transitional",
}
"""SCSI controllers that QEMU has on PCs. libvirt's `lsilogic` is a 53C895A, VMware's and VirtualBox's a 53C1030."""

VIRTIO_SCSI = ("virtio-scsi", "virtio-transitional", "virtio-non-transitional")
"""SCSI controllers from which UEFI guests start. Debian 12's OVMF 2022.11 and RHEL's have no other driver."""

NICS = {
    "e1000": "e1000",
    "e1000e": "e1000e",
    "vmxnet3": "vmxnet3",
    "virtio": "virtio",
    "rtl8139": "rtl8139",
    "pcnet32": "pcnet",
    "ne2k": "ne2k_pci",
    "igb": "igb",
    "tulip": "tulip",
    "virtio-transitional": "virtio-transitional",
    "virtio-non-transitional": "virtio-non-transitional",
}

DISPLAYS = {
    "vga": "vga",
    "cirrus": "cirrus",
    "vmware": "vmvga",
    "qxl": "qxl",
    "virtio": "virtio",
    "bochs": "bochs",
}

SOUNDS = {
    "hda": "ich6",
    "ac97": "ac97",
    "sb16": "sb16",
    "es1370": "es1370",
    "ich9": "ich9",
    "usb": "usb",
}

WATCHDOGS = ("i6300esb", "ib700")

USB = {"uhci": "piix3-uhci", "ehci": "ich9-ehci1", "xhci": "qemu-xhci"}

BOOT = {"disk": "hd", "cdrom": "cdrom", "floppy": "fd", "network": "network"}

DISK_FORMATS = {"vhd": "vpc"}

PREFIXES = {"ide": "hd", "sata": "sd", "scsi": "sd", "usb": "sd", "virtio": "vd", "floppy": "fd"}
"""Names of disks begin with the prefix of their bus."""

BUSES = {"fdc": "floppy", **{bus: bus for bus in ("ide", "sata", "scsi", "usb", "virtio", "nvme")}}

CPU_MODES = ("host-model", "host-passthrough", "maximum")

CPU_MODELS = re.compile(
    r"(486|pentium|core|n270|kvm(32|64)|qemu(32|64)|cpu64|athlon|phenom|Conroe|Penryn|Nehalem|Westmere|SandyBridge"
    r"|IvyBridge|Haswell|Broadwell|Skylake|Cascadelake|Cooperlake|Icelake|Sapphire|Snowridge|Opteron|EPYC|Dhyana"
    r"|cortex|max$)[A-Za-z0-9_-]*"
)
"""Names in libvirt's CPU map."""

MACHINES = {"i440fx": "pc", "q35": "q35", "virt": "virt"}
"""QEMU's newest machine of each chipset."""


def opposite(words: dict[str, str]) -> dict[str, str]:
    """Returns the table from libvirt's words to the neutral ones."""
    return {theirs: ours for ours, theirs in words.items()}


def chipset(machine: str) -> str | None:
    """Returns the chipset of QEMU's machine type, such as `pc-q35-7.2`; None for another board."""
    found = re.fullmatch(r"(pc|q35|virt)(?:-(i440fx|q35))?(?:-[\w.+-]+)?", machine)
    if not found:
        return None
    return found[2] or {"pc": "i440fx"}.get(found[1], found[1])


_FAMILIES = {
    "almalinux": "almalinux.org",
    "alpinelinux": "alpinelinux.org",
    "altlinux": "altlinux.org",
    "centos": "centos.org",
    "centos-stream": "centos.org",
    "cirros": "cirros-cloud.net",
    "debian": "debian.org",
    "fedora": "fedoraproject.org",
    "freebsd": "freebsd.org",
    "linux": "libosinfo.org",
    "macosx": "apple.com",
    "mageia": "mageia.org",
    "mandriva": "mandriva.com",
    "msdos": "microsoft.com",
    "netbsd": "netbsd.org",
    "netware": "novell.com",
    "oel": "oracle.com",
    "ol": "oracle.com",
    "openbsd": "openbsd.org",
    "opensuse": "opensuse.org",
    "rhel": "redhat.com",
    "rhl": "redhat.com",
    "rocky": "rockylinux.org",
    "scientificlinux": "scientificlinux.org",
    "sle": "suse.com",
    "sled": "suse.com",
    "sles": "suse.com",
    "slem": "suse.com",
    "ubuntu": "ubuntu.com",
    "win": "microsoft.com",
    "winnt": "microsoft.com",
    "dragonflybsd": "dragonflybsd.org",
    "haiku": "haiku-os.org",
    "miraclelinux": "miraclelinux.com",
    "solaris": "oracle.com",
    "eos": "endlessos.com",
    "silverblue": "fedoraproject.org",
    "popos": "system76.com",
}
"""Families of systems whose ids are `http://HOST/FAMILY/VERSION` and whose short ids are FAMILY and VERSION."""

_ROLLING = {
    "archlinux": "archlinux.org",
    "gentoo": "gentoo.org",
    "manjaro": "manjaro.org",
    "voidlinux": "voidlinux.org",
}
_SLE = ("sle", "sled", "sles")
_OLD_SOLARIS = ("9", "10")
_UNKNOWN = ("eln", "rawhide", "unknown", "factory")
"""Versions in ids whose short ids are spelt otherwise."""


def osinfo_url(short: str) -> str | None:
    """Returns libosinfo's id of a short id, such as `http://debian.org/debian/12`; None if the family is not known."""
    if short in _ROLLING:
        return f"http://{_ROLLING[short]}/{short}/rolling"
    found = re.fullmatch(r"(sle[ds]?)(\d+)sp(\d+)", short)
    if found:
        return f"http://suse.com/{found[1]}/{found[2]}.{found[3]}"
    for family in sorted(_FAMILIES, key=len, reverse=True):
        version = short.removeprefix(family)
        if version != short and re.fullmatch(r"[a-z0-9][a-z0-9.]*", version):
            host = "sun.com" if family == "solaris" and version in _OLD_SOLARIS else _FAMILIES[family]
            return f"http://{host}/{family}/{version}"
    return None


def osinfo_short(url: str) -> str | None:
    """Returns the short id of libosinfo's id; None if it is not one of the known families."""
    found = re.fullmatch(r"http://[a-z0-9.-]+/([a-z0-9-]+)/([a-z0-9.]+)", url)
    if not found or found[2] in _UNKNOWN:
        return None
    family, version = found.groups()
    short = family if version == "rolling" else f"{family}{version}"
    pack = re.fullmatch(r"(\d+)\.([1-9]\d*)", version)
    if family in _SLE and pack:
        short = f"{family}{pack[1]}sp{pack[2]}"
    return short if osinfo_url(short) == url else None
