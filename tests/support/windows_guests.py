"""NTFS filesystems with the registry hives of a Windows, written by hivexregedit and read back by hivexget."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from .disks import MIB
from .requirements import oracle_program

_NONE = 0xFFFFFFFF
_ROOT, _SECURITY = 0x20, 0x90
"""Where the root key and its security descriptor are, behind the first 4096 bytes."""


def empty_hive() -> bytes:
    """Returns a hive with nothing but its root key, for hivexregedit to fill."""
    fields = (0, 0, 0, 0, _NONE, _NONE, 0, _NONE, _SECURITY, _NONE, 0, 0, 0, 0, 0)
    key = struct.pack("<2sHQ15IHH4s", b"nk", 0x2C, 0, *fields, 4, 0, b"root")
    descriptor = struct.pack("<BBHIIII", 1, 0, 0x8000, 0, 0, 0, 0)
    security = struct.pack("<2sHIIII", b"sk", 0, _SECURITY, _SECURITY, 1, len(descriptor)) + descriptor
    cells = struct.pack("<i", _ROOT - _SECURITY) + key
    cells = cells.ljust(_SECURITY - _ROOT, b"\0") + struct.pack("<i", -48) + security
    cells = cells.ljust(_SECURITY - _ROOT + 48, b"\0")
    free = 4096 - 32 - len(cells)
    page = struct.pack("<4sIIQQI", b"hbin", 0, 4096, 0, 0, 0) + cells + struct.pack("<i", free)
    head = bytearray(struct.pack("<4sIIQIIIIIII", b"regf", 1, 1, 0, 1, 3, 0, 1, _ROOT, 4096, 1).ljust(4096, b"\0"))
    check = 0
    for (word,) in struct.iter_unpack("<I", head[:508]):
        check ^= word
    struct.pack_into("<I", head, 508, check)
    return bytes(head) + page.ljust(4096, b"\0")


def hive(path: Path, keys: Mapping[str, Mapping[str, int | str]]) -> Path:
    """Makes a hive with these keys; numbers are DWORD values."""
    path.write_bytes(empty_hive())
    lines = ["Windows Registry Editor Version 5.00", ""]
    above = {"\\".join(key.split("\\")[:depth]) for key in keys for depth in range(1, key.count("\\") + 1)}
    # A key is made in one that exists.
    every: dict[str, Mapping[str, int | str]] = {**{key: {} for key in sorted(above)}, **keys}
    for key, values in every.items():
        lines.append(f"[\\{key}]")
        for name, value in values.items():
            escaped = str(value).replace("\\", "\\\\")
            lines.append(f'"{name}"=dword:{value:08x}' if isinstance(value, int) else f'"{name}"="{escaped}"')
        lines.append("")
    text = path.with_suffix(".reg")
    text.write_text("\n".join(lines))
    subprocess.run([oracle_program("hivexregedit"), "--merge", str(path), str(text)], check=True)
    for key, values in keys.items():
        for name, value in values.items():
            command = [oracle_program("hivexget"), str(path), f"\\{key}", name]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            assert said == str(value)
    return path


def ntfs(path: Path, tree: Path, size: int = 32 * MIB) -> Path:
    """Makes a file with an NTFS filesystem that holds a tree."""
    if os.geteuid() != 0:
        pytest.skip("mounting NTFS needs root")
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run([oracle_program("mkntfs"), "-q", "-F", str(path)], check=True, capture_output=True)
    point = path.parent / f"{path.name}.mnt"
    point.mkdir()
    subprocess.run([oracle_program("ntfs-3g"), str(path), str(point)], check=True)
    try:
        subprocess.run(["cp", "-r", f"{tree}/.", str(point)], check=True)
    finally:
        subprocess.run(["umount", str(point)], check=True)
    return path
