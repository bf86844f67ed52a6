"""Files that are not disks, by suffix and by content, with hints for the user.

Without this table, compressed downloads, archives, forensic images, backups and configuration files would be taken for
raw disks. Magic numbers: the formats' specifications, else libmagic's database.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.model.sources import File


class Foreign(NamedTuple):
    """A kind of file that is not a disk. `magic` are bytes at an offset; `hint` says how to get at a disk."""

    title: str
    suffixes: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...]
    hint: str


AS_RAW = (
    frozenset({"bin", "disk", "hd", "image", "lv", "rootfs", "sdcard", "sdimg", "wic"})
    | {"fd", "flp", "ima", "iso", "vfd"}
    | {"btrfs", "ext2", "ext3", "ext4", "fat", "squashfs", "swap", "xfs"}
)
"""Suffixes of raw disks, filesystems and media that are not a format's; lower case, without the dot.

A file with one is accepted if the user or an image names it. A scan of a directory does not take it for an image.
"""

_DECOMPRESS = "decompress it first: {}"
_OR_DECOMPRESS = "decompress it first: {}, or convert it with --decompress"
_UNPACK = "unpack it first: {}; then convert the disk that was in it"
_UNZIP = "unzip it first, or convert it with --decompress if a disk is all that is in it"
_RESTORE = "restore it to a raw disk first: {}"
_CONFIGURATION = "vmconv machine convert converts the machine; vmconv convert converts a disk that this file names"
_MACHINE = "vmconv machine convert converts the machine in it, with its disks"
_MEMORY = "to convert the disk of a machine, name the disk, not memory or state; vmconv-memory converts memory images"
_MEMORY_OF = "to convert the disk of a machine, name the disk; for its memory, {}"
_TEXT = "download the disk itself"

FOREIGN = (
    # -- compression
    Foreign("gzip", (".gz", ".tgz", ".gzip"), ((0, b"\x1f\x8b\x08"),), _OR_DECOMPRESS.format("gzip -d")),
    Foreign("xz", (".xz", ".txz"), ((0, b"\xfd7zXZ\0"),), _OR_DECOMPRESS.format("xz -d")),
    Foreign("lzma", (".lzma",), ((0, b"\x5d\0\0\x80\0" + b"\xff" * 8),), _OR_DECOMPRESS.format("xz -d")),
    Foreign(
        "Zstandard",
        (".zst", ".zstd", ".tzst"),
        ((0, b"\x28\xb5\x2f\xfd"), (0, b"\x50\x2a\x4d\x18")),
        _OR_DECOMPRESS.format("zstd -d"),
    ),
    Foreign(
        "bzip2",
        (".bz2", ".bz", ".tbz", ".tbz2"),
        tuple((0, b"BZh%d1AY&SY" % level) for level in range(1, 10)),
        _OR_DECOMPRESS.format("bzip2 -d"),
    ),
    Foreign("LZ4", (".lz4",), ((0, b"\x04\x22\x4d\x18"), (0, b"\x02\x21\x4c\x18")), _DECOMPRESS.format("lz4 -d")),
    Foreign("lzop", (".lzo",), ((0, b"\x89LZO\0\r\n\x1a\n"),), _DECOMPRESS.format("lzop -d")),
    Foreign("lzip", (".lz", ".tlz"), ((0, b"LZIP\1"),), _DECOMPRESS.format("lzip -d")),
    Foreign("compress", (".z",), ((0, b"\x1f\x9d\x90"),), _DECOMPRESS.format("gzip -d")),
    Foreign("brotli", (".br",), (), _DECOMPRESS.format("brotli -d")),
    # -- archives
    # A ZIP archive that begins with this file (pyaff4).
    Foreign("AFF4", (".aff4", ".af4"), ((30, b"container.description"),), _RESTORE.format("AFF4 tools export it")),
    Foreign(
        "ZIP archive",
        (".zip", ".zipx"),
        ((0, b"PK\3\4"), (0, b"PK\5\6")),
        _UNZIP,
    ),
    Foreign("7z archive", (".7z",), ((0, b"7z\xbc\xaf\x27\x1c"),), _UNPACK.format("7z x")),
    Foreign("RAR archive", (".rar",), ((0, b"Rar!\x1a\x07"),), _UNPACK.format("unrar x")),
    Foreign("cabinet", (".cab",), ((0, b"MSCF\0\0\0\0"),), _UNPACK.format("cabextract")),
    Foreign("tar archive", (".tar",), ((257, b"ustar"),), _UNPACK.format("tar -xf")),
    Foreign("Vagrant box", (".box",), (), _UNPACK.format("tar -xf")),
    Foreign(
        "cpio archive",
        (".cpio",),
        tuple((0, magic) for magic in (b"070701", b"070702", b"070707")),
        _UNPACK.format("cpio -i"),
    ),
    Foreign("ar archive", (".ar", ".deb"), ((0, b"!<arch>\n"),), _UNPACK.format("ar x")),
    Foreign("RPM package", (".rpm",), ((0, b"\xed\xab\xee\xdb"),), _UNPACK.format("rpm2cpio")),
    # -- forensic images
    Foreign("EWF version 2 or SMART", (".ex01", ".s01", ".ewf"), (), _RESTORE.format("ewfexport -f raw")),
    Foreign(
        "logical EWF",
        (".l01", ".lx01"),
        ((0, b"LVF\t\r\n\xff\0"), (0, b"LEF2\r\n\x81\0")),
        "it holds files, not a disk",
    ),
    Foreign("AFF", (".aff", ".afd", ".afm"), ((0, b"AFF10\r\n\0"),), _RESTORE.format("affconvert -r")),
    Foreign("AccessData AD1", (".ad1",), ((0, b"ADSEGMENTEDFILE"),), _RESTORE.format("FTK Imager exports it")),
    # -- backups
    Foreign("XenServer export (XVA)", (".xva",), (), _MACHINE),
    Foreign("Proxmox backup (VMA)", (".vma",), ((0, b"VMA\0"),), _MACHINE),
    Foreign(
        "Windows image (WIM)",
        (".wim", ".esd", ".swm"),
        ((0, b"MSWIM\0\0\0"), (0, b"WLPWM\0\0\0")),
        "it holds files, not a disk: apply it to a disk with wimlib-imagex apply",
    ),
    Foreign("Veeam backup", (".vbk", ".vib", ".vrb"), (), _RESTORE.format("Veeam's extract utility")),
    Foreign("Acronis backup", (".tib", ".tibx"), ((0, b"\xb4\x6e\x68\x44"),), _RESTORE.format("Acronis restores it")),
    Foreign("Ghost image", (".gho", ".ghs"), ((0, b"\xfe\xef\x01"),), _RESTORE.format("Ghost restores it")),
    Foreign("Macrium backup", (".mrimg", ".mrbak"), (), _RESTORE.format("Macrium Reflect restores it")),
    Foreign("Active@ disk image", (".adi",), (), _RESTORE.format("Active@ Disk Image restores it")),
    Foreign("Symantec recovery point", (".v2i", ".iv2i"), (), _RESTORE.format("its own program restores it")),
    Foreign("Partclone image", (), ((0, b"partclone-image"),), _RESTORE.format("partclone.restore")),
    Foreign("Partimage image", (), ((0, b"PaRtImAgE-VoLuMe"),), _RESTORE.format("partimage restore")),
    Foreign("ntfsclone image", (), ((0, b"\0ntfsclone-image"),), _RESTORE.format("ntfsclone --restore-image")),
    Foreign("part of a split raw disk", (".001", ".002", ".003"), (), "join the parts first: cat NAME.0* > disk.raw"),
    # -- other images that are no disks as they are
    Foreign("Android sparse image", (".simg",), ((0, b"\x3a\xff\x26\xed"),), "make a raw disk of it first: simg2img"),
    Foreign("Apple disk image", (".sparsebundle",), (), "make a raw disk of it first: hdiutil convert"),
    Foreign("encrypted Apple disk image", (), ((0, b"encrcdsa"),), "decrypt it first: hdiutil convert, on macOS"),
    Foreign("UBI image", (".ubi",), ((0, b"UBI#"),), "it is for flash memory, not for a disk"),
    Foreign("optical disc image", (".mdf", ".mds", ".nrg", ".cue", ".ccd", ".cdi"), (), "make an ISO image of it"),
    # -- configurations
    Foreign("OVF descriptor", (".ovf",), (), _CONFIGURATION),
    Foreign("VMware configuration", (".vmx", ".vmxf", ".vmsd", ".vmtx"), ((0, b'.encoding = "'),), _CONFIGURATION),
    Foreign("VirtualBox configuration", (".vbox", ".vbox-prev"), (), _CONFIGURATION),
    Foreign("Hyper-V configuration", (".vmcx", ".vmgs", ".vhds"), (), _CONFIGURATION),
    Foreign(
        "XML document", (".xml", ".plist"), ((0, b"<?xml"), (0, b"\xef\xbb\xbf<?xml"), (0, b"<domain")), _CONFIGURATION
    ),
    Foreign("configuration", (".yaml", ".yml", ".json", ".toml", ".conf", ".cfg", ".ini", ".pvs"), (), _CONFIGURATION),
    Foreign("variables of firmware", (".nvram",), ((0, b"MRVN\1\0\0\0"),), _CONFIGURATION),
    Foreign("HTML page", (".html", ".htm"), ((0, b"<!DOCTYPE html"), (0, b"<!doctype html"), (0, b"<html")), _TEXT),
    Foreign("Git LFS pointer", (), ((0, b"version https://git-lfs"),), "fetch the disk itself: git lfs pull"),
    Foreign(
        "checksum or text",
        (".txt", ".md", ".log", ".sha256", ".sha512", ".md5", ".sig", ".asc", ".mf", ".torrent", ".zsync"),
        (),
        _TEXT,
    ),
    # -- memory and state
    Foreign("VMware swap", (".vswp",), (), _MEMORY),
    Foreign("Hyper-V state", (".vsv",), ((0, b"\x14\x20\x28\x01"),), _MEMORY),
    Foreign(
        "VirtualBox state",
        (".sav",),
        ((0, b"\x7fVirtualBox SavedState"),),
        _MEMORY_OF.format("resume it and make a core: VBoxManage debugvm NAME dumpvmcore --filename=FILE"),
    ),
    Foreign("QEMU migration of another version", (), ((0, b"QEVM"),), _MEMORY),
    Foreign("libvirt saved machine, not complete", (), ((0, b"LibvirtQemudPart"),), _MEMORY),
    Foreign("ELF file", (), ((0, b"\x7fELF"),), _MEMORY),
    Foreign("download that is not complete", (".part", ".partial", ".crdownload", ".aria2"), (), _TEXT),
)

_HEAD = 512
_SUFFIX = re.compile(r"\.([A-Za-z0-9]{1,16}(?:-prev)?)", re.ASCII)


def foreign_content(file: File) -> Foreign | None:
    """Returns the kind of file by its magic number; None for a possible disk."""
    head = file.read(0, min(_HEAD, file.size))
    return next((kind for kind in FOREIGN if any(head.startswith(magic, at) for at, magic in kind.magic)), None)


def foreign_suffix(suffix: str) -> Foreign | None:
    """Returns the kind of file with this suffix: lower case, with the dot."""
    return next((kind for kind in FOREIGN if suffix in kind.suffixes), None)


def hint_for(kind: Foreign, path: str) -> str:
    """Returns how to get at a disk in a file of this kind; compressed backups of machines need not be decompressed."""
    inside, suffix = os.path.splitext(path.lower())
    said = foreign_suffix(suffix), foreign_suffix(os.path.splitext(inside)[1])
    return _MACHINE if any(each and each.hint == _MACHINE for each in said) else kind.hint


def suffix_of(path: str) -> str | None:
    """Returns the suffix of a file name with its dot, in lower case; None if it has none, or one without a meaning."""
    # Numbers of versions and snapshots, and the random part of a temporary name, have no meaning.
    name = os.path.basename(path)
    stem, dot, last = name.rpartition(".")
    if not stem or name.startswith("tmp."):
        return None
    found = _SUFFIX.fullmatch(dot + last)
    if not found:
        return None
    suffix = found[0].lower()
    if foreign_suffix(suffix):
        return suffix
    return None if last.isdecimal() or suffix[1:] in AS_RAW else suffix


_FLAT_PART = re.compile(r".+-(?:flat|rdmp?|f\d{1,4})\.vmdk", re.IGNORECASE)


def is_payload(path: str) -> bool:
    """Returns whether a file name says flat extent of a VMDK: a guest writes all of it, from its first sector on."""
    return _FLAT_PART.fullmatch(os.path.basename(path)) is not None


_PART = re.compile(r"(.+?)-(?:flat|delta|sesparse|rdmp?|ctk|[sfp]\d{1,4})\.vmdk", re.IGNORECASE)


def described_beside(path: str) -> str | None:
    """Returns a hint for an extent of a VMDK whose descriptor lies beside it; None for any other file."""
    found = _PART.fullmatch(os.path.basename(path))
    name = f"{found[1]}.vmdk" if found else ""
    if not (found and os.path.isfile(os.path.join(os.path.dirname(path), name))):
        return None
    return f"it is an extent of the disk {name}: use that file"
