"""Builds the bytes of small VDI images by hand, sound or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from support.disks import MIB
from vmconv.testing import random_bytes
from vmconv_vdi import structs

IDENTITY = UUID("12345678-9abc-4ef0-8234-56789abcdef0")


def build(
    payload: dict[int, bytes],
    entries: list[int],
    *,
    block: int = MIB,
    extra: int = 0,
    data: int = 0x1000,
    **fields: Any,
) -> bytes:
    """Returns an image as VirtualBox may write it: `payload` by the number of the block in the file."""
    header: dict[str, object] = {
        "cbHeader": structs.HEADER_LENGTH,
        "u32Type": structs.NORMAL,
        "fFlags": 0,
        "szComment": bytes(256),
        "offBlocks": 0x200,
        "offData": data,
        "LegacyGeometry": {"cCylinders": 0, "cHeads": 0, "cSectors": 0, "cbSector": 512},
        "u32Dummy": 0,
        "cbDisk": block * len(entries),
        "cbBlock": block,
        "cbBlockExtra": extra,
        "cBlocks": len(entries),
        "cBlocksAllocated": len(payload),
        "uuidCreate": structs.uuid_bytes(IDENTITY),
        "uuidModify": bytes(16),
        "uuidLinkage": bytes(16),
        "uuidParentModify": bytes(16),
    }
    pre = {"szFileInfo": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0"), "u32Version": 0x10001}
    image = bytearray(structs.PreHeader.build(pre) + structs.Header.build(header | fields)).ljust(0x200, b"\0")
    image += np.array(entries, dtype="<u4").tobytes()
    for number in range(len(payload)):
        at = data + number * (extra + block) + extra
        image = image.ljust(at, b"\xee") + payload[number].ljust(block, b"\0")
    return bytes(image)


def chain(directory: Path, **fields: Any) -> tuple[Path, Path, dict[int, bytes]]:
    """Writes a parent and an image that differs from it, as VirtualBox names them; returns the paths and payload."""
    payload = {number: random_bytes(MIB, number) for number in range(4)}
    parent, child = directory / f"{{{IDENTITY}}}.vdi", directory / "child.vdi"
    modified = structs.uuid_bytes(UUID(int=7))
    free = structs.UNALLOCATED
    parent.write_bytes(build({0: payload[0], 1: payload[1]}, [0, 1, free, free], uuidModify=modified))
    link: dict[str, Any] = {
        "u32Type": structs.DIFFERENCING,
        "uuidCreate": structs.uuid_bytes(UUID(int=5)),
        "uuidLinkage": structs.uuid_bytes(IDENTITY),
        "uuidParentModify": modified,
    }
    child.write_bytes(build({0: payload[2]}, [free, structs.DISCARDED, 0, free], **(link | fields)))
    return parent, child, payload
