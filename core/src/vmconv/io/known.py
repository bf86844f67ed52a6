"""Known formats, installed or not, for hints such as "pip install ...".

The only place in core that names formats. Magic numbers: QEMU's block drivers, the formats' specifications.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.interface.format import FormatKind
    from vmconv.model.sources import File


class Known(NamedTuple):
    """A format by name; `distribution` is None if no plugin exists. `magic`: bytes at an offset, from the end if < 0.

    `qemu_name` is QEMU's name for it, if different. `bundle` is the name of the descriptor in a directory with one of
    the suffixes. `hint` names another converter for formats without a plugin.
    """

    name: str
    title: str
    distribution: str | None
    suffixes: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...]
    qemu_name: str | None = None
    bundle: str | None = None
    hint: str | None = None
    kind: FormatKind = "disk"


RAW_NAME = "raw"
"""The format of files without a signature."""

RAM_NAME = "ram"
"""The memory format of files without a signature."""

_MEMORY = "vmconv-memory"

KNOWN = (
    Known("raw", "raw disk", "vmconv-raw", (".raw", ".img", ".dd"), ()),
    Known(
        "qcow2",
        "QEMU copy-on-write, versions 2 and 3",
        "vmconv-qcow2",
        (".qcow2",),
        ((0, b"QFI\xfb\0\0\0\2"), (0, b"QFI\xfb\0\0\0\3")),
    ),
    Known(
        "vmdk",
        "VMware virtual disk",
        "vmconv-vmdk",
        (".vmdk",),
        ((0, b"KDMV"), (0, b"COWD"), (0, b"# Disk DescriptorFile"), (0, b"\xbe\xba\xfe\xca\0\0\0\0")),
    ),
    Known("vhdx", "Hyper-V virtual disk, version 2", "vmconv-vhdx", (".vhdx", ".avhdx"), ((0, b"vhdxfile"),)),
    Known(
        "vhd",
        "Hyper-V and Virtual PC virtual disk",
        "vmconv-vhd",
        (".vhd", ".vpc", ".avhd"),
        ((0, b"conectix"), (-512, b"conectix"), (-511, b"conectix")),
        qemu_name="vpc",
    ),
    Known("vdi", "VirtualBox disk image", "vmconv-vdi", (".vdi",), ((64, b"\x7f\x10\xda\xbe"),)),
    Known(
        "parallels",
        "Parallels disk image",
        "vmconv-parallels",
        (".hdd", ".hds"),
        ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt"), (0, b"<Parallels_disk_image")),
        bundle="DiskDescriptor.xml",
    ),
    Known(
        "ewf",
        "Expert Witness disk image (E01)",
        "vmconv-ewf",
        (".e01",),
        ((0, b"EVF\t\r\n\xff\0"), (0, b"EVF2\r\n\x81\0")),
    ),
    Known("qed", "QEMU enhanced disk", "vmconv-qed", (".qed",), ((0, b"QED\0"),)),
    Known("qcow", "QEMU copy-on-write, version 1", "vmconv-qcow2", (".qcow",), ((0, b"QFI\xfb\0\0\0\1"),)),
    Known(
        "luks",
        "LUKS encrypted disk",
        "vmconv-luks",
        (".luks",),
        ((0, b"LUKS\xba\xbe"),),
    ),
    Known(
        "bochs",
        "Bochs growing disk",
        "vmconv-bochs",
        (".bochs",),
        ((0, b"Bochs Virtual HD Image"),),
    ),
    Known(
        "cloop",
        "compressed loop image",
        "vmconv-cloop",
        (".cloop",),
        ((0, b"#!/bin/sh\n#V2.0 Format\n"),),
    ),
    Known(
        "dmg",
        "Apple disk image",
        "vmconv-dmg",
        (".dmg",),
        ((-512, b"koly"),),
    ),
    Known(
        "asif",
        "Apple sparse image",
        None,
        (".asif",),
        ((0, b"shdw"),),
        hint="diskutil image create from, on macOS, makes a raw disk of it",
    ),
    Known(
        "sparseimage",
        "Apple sparse disk image",
        None,
        (".sparseimage",),
        ((0, b"sprs"),),
        hint="hdiutil convert, on macOS, makes a raw disk of it",
    ),
    Known(
        "uml-cow",
        "User-mode Linux copy-on-write",
        None,
        (".cow",),
        ((0, b"OOOM"), (0, b"MOOO")),
        hint="uml_moo makes a raw disk of it",
    ),
    Known(
        "ova",
        "Open Virtualization archive",
        None,
        (".ova",),
        (),
        hint="vmconv machine convert converts its machine; tar -xf unpacks its disks",
    ),
    Known("ram", "raw memory: offsets are physical addresses", _MEMORY, (".ram", ".mem"), (), kind="memory"),
    # Programs and libraries have the magic number of ELF too, so only its plugin recognises a core.
    Known("elfcore", "ELF core of a machine", _MEMORY, (".elf", ".core", ".vmcore", ".dump"), (), kind="memory"),
    Known("lime", "LiME memory image", _MEMORY, (".lime",), ((0, b"EMiL\1\0\0\0"),), kind="memory"),
    Known("avml", "AVML memory image, compressed", _MEMORY, (".avml",), ((0, b"AVML\2\0\0\0"),), kind="memory"),
    Known(
        "vmem",
        "VMware memory with its saved state",
        _MEMORY,
        (".vmss", ".vmsn", ".vmem"),
        ((0, b"\xd0\xbe\xd2\xbe"), (0, b"\xd1\xba\xd1\xba"), (0, b"\xd2\xbe\xd2\xbe"), (0, b"\xd3\xbe\xd3\xbe")),
        kind="memory",
    ),
    Known(
        "kdump",
        "kdump-compressed dump of makedumpfile or QEMU",
        _MEMORY,
        (".kdump",),
        ((0, b"KDUMP   "), (0, b"makedumpfile\0\0\0\0")),
        kind="memory",
    ),
    # Configurations have the same magic number.
    Known("vmrs", "Hyper-V saved state", "vmconv-vmrs", (".vmrs",), (), kind="memory"),
    Known("qevm", "QEMU migration stream", _MEMORY, (".mig", ".qemusave"), ((0, b"QEVM\0\0\0\3"),), kind="memory"),
    Known("libvirtsave", "libvirt saved machine", _MEMORY, (".save",), ((0, b"LibvirtQemudSave"),), kind="memory"),
)

_BY_NAME = {name: known for known in KNOWN for name in (known.name, known.qemu_name) if name}


def known_format(name: str) -> Known | None:
    """Returns a format by its name or QEMU's name."""
    return _BY_NAME.get(name)


def qemu_name(name: str) -> str:
    """Returns QEMU's name of a format, for references in images that QEMU reads."""
    known = known_format(name)
    return (known and known.qemu_name) or name


def known_suffix(path: str) -> Known | None:
    """Returns the format of a file name's suffix."""
    lower = path.lower()
    return next((known for known in KNOWN if lower.endswith(known.suffixes) or is_bundle(lower, known)), None)


def is_bundle(path: str, known: Known) -> bool:
    """True for the path of a bundle's descriptor."""
    return known.bundle is not None and os.path.basename(path).lower() == known.bundle.lower()


def known_content(file: File) -> Known | None:
    """Returns the format of the content's magic number."""
    head = file.read(0, min(512, file.size))
    tail = file.read(max(0, file.size - 512), min(512, file.size))
    for known in KNOWN:
        for offset, magic in known.magic:
            place = head[offset:] if offset >= 0 else tail[offset:] if file.size >= -offset else b""
            if place.startswith(magic):
                return known
    return None
