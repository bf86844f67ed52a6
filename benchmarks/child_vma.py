"""Writes and extracts VMA archives with nothing but loops, as `vma create` and `vma extract` do.

    child_vma.py create|extract FROM TO

`extract` reads standard input if FROM is `-`, as Proxmox does behind `zstd -d`.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from typing import BinaryIO

BLOCK, CLUSTER, ENTRIES = 4096, 65536, 59
UUID = bytes(range(16))
CONF = b"""name: web
cores: 2
memory: 2048
ostype: l26
scsihw: virtio-scsi-pci
scsi0: local-lvm:vm-100-disk-0
smbios1: uuid=421f245c-7fa8-60fa-1122-334455667788
net0: virtio=BC:24:11:01:02:03,bridge=vmbr0
#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:
"""


def _sealed(data: bytes, at: int) -> bytes:
    return data[:at] + hashlib.md5(data, usedforsecurity=False).digest() + data[at + 16 :]


def create(source: str, target: str) -> None:
    """Writes the archive of one disk."""
    blobs, places = bytearray(b"\0"), []
    for blob in (b"qemu-server.conf\0", CONF, b"drive-scsi0\0"):
        places.append(len(blobs))
        blobs += struct.pack("<H", len(blob)) + blob
    blobs += bytes(-len(blobs) % 512)
    size = os.path.getsize(source)
    head = b"VMA\0" + struct.pack(">I16sQ16xIII", 1, UUID, 0, 12288, len(blobs), 12288 + len(blobs)) + bytes(1984)
    head += struct.pack(">I1020xI1020x4x", places[0], places[1])
    head += bytes(32) + struct.pack(">IIQQQ", places[2], 0, size, 0, 0) + bytes(254 * 32)
    with open(source, "rb") as disk, open(target, "wb") as out:
        out.write(_sealed(head + blobs, 32))
        for first in range(0, -(-size // CLUSTER), ENTRIES):
            out.write(_extent(disk.read(ENTRIES * CLUSTER), first))


def _extent(data: bytes, first: int) -> bytes:
    entries, payload = bytearray(), bytearray()
    zero = bytes(BLOCK)
    for at in range(0, len(data), CLUSTER):
        mask = 0
        for number in range(16):
            block = data[at + number * BLOCK : at + (number + 1) * BLOCK]
            if block and block != zero[: len(block)]:
                mask |= 1 << number
                payload += block.ljust(BLOCK, b"\0")
        entries += struct.pack(">HBBI", mask, 0, 1, first + at // CLUSTER)
    head = b"VMAE" + struct.pack(">HH", 0, len(payload) // BLOCK) + UUID + bytes(16) + entries.ljust(8 * ENTRIES, b"\0")
    return _sealed(head, 24) + payload


def extract(source: str, target: str) -> None:
    """Writes the disk of an archive: each run of blocks to its place."""
    with sys.stdin.buffer if source == "-" else open(source, "rb") as archive, open(target, "wb") as out:
        head = archive.read(12288)
        archive.read(struct.unpack(">I", head[56:60])[0] - 12288)
        out.truncate(struct.unpack(">Q", head[4096 + 40 : 4096 + 48])[0])
        while header := archive.read(512):
            _restore(header, archive, out)
        out.flush()
        os.fsync(out.fileno())


def _restore(header: bytes, archive: BinaryIO, out: BinaryIO) -> None:
    blocks = memoryview(archive.read(BLOCK * struct.unpack(">H", header[6:8])[0]))
    at = 0
    for number in range(ENTRIES):
        mask, _, device, cluster = struct.unpack(">HBBI", header[40 + 8 * number : 48 + 8 * number])
        if device and mask == 0xFFFF:
            out.seek(cluster * CLUSTER)
            out.write(blocks[at : at + CLUSTER])
            at += CLUSTER
        elif device:
            for bit in range(16):
                if mask >> bit & 1:
                    out.seek(cluster * CLUSTER + bit * BLOCK)
                    out.write(blocks[at : at + BLOCK])
                    at += BLOCK


if __name__ == "__main__":
    {"create": create, "extract": extract}[sys.argv[1]](*sys.argv[2:])
