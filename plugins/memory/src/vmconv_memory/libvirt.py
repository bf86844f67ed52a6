"""Reads libvirt's saved machines: a header, the domain's XML, and QEMU's migration stream.

    0     "LibvirtQemudSave", version, length of the XML, was it running, compression, cookie's offset (u32 each)
    0x5c  XML, with padding
    then  the stream

The numbers are in the host's order, here little-endian (libvirt, qemu_saveimage.h).
"""

from __future__ import annotations

import struct

from vmconv.plugin import File, Image, damaged, read_part
from vmconv_memory import qemu

MAGIC = b"LibvirtQemudSave"
_HEADER = struct.Struct("<16s5I")
_LENGTH = 0x5C
_VERSIONS = (1, 2, 3)
_COMPRESSIONS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
_MAX_XML = 16 << 20


def read(file: File, *, snapshot: str | None = None) -> Image:
    """Returns the memory of a saved machine. Raises `ImageError` if it is compressed."""
    magic, version, length, _, compression, _ = _HEADER.unpack(read_part(file, "header", 0, _HEADER.size))
    if magic != MAGIC:
        raise damaged(file, "magic", 0, "no signature of a saved machine")
    if version not in _VERSIONS:
        raise damaged(file, "version", 16, f"{version} is not one of {', '.join(map(str, _VERSIONS))}")
    if length > min(_MAX_XML, file.size - min(file.size, _LENGTH)):
        raise damaged(file, "length of the XML", 20, f"{length} is more than {_MAX_XML}, or than the file holds")
    word = _COMPRESSIONS[compression] if compression < len(_COMPRESSIONS) else str(compression)
    if word not in ("raw", "sparse"):
        raise damaged(
            file,
            "compression",
            28,
            f"{word} is not read",
            hint='set save_image_format = "raw" in qemu.conf, restore the machine and save it again',
        )
    return qemu.read(file, snapshot=snapshot, name="libvirtsave", at=_LENGTH + length)
