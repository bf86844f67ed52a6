"""The controllers for which the installed OVMF has a driver, by its modules: those that `check` believes it has."""

from __future__ import annotations

import lzma
import re
import uuid
from pathlib import Path

import pytest

from support.requirements import missing
from vmconv.machine.check import _NO_UEFI_DRIVER
from vmconv.machine.model import CONTROLLER_MODELS

COMPRESSED = uuid.UUID("ee4e5898-3914-4259-9d6e-dc7bd79403cf").bytes_le
"""PI specification, volume 3: a section that LZMA compressed; the offset of its data follows, 2 bytes."""

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")

MODULES = {
    "pvscsi": "PvScsiDxe",
    "lsisas1068": "MptScsiDxe",
    "lsi53c895a": "LsiScsiDxe",
    "virtio-scsi": "VirtioScsiDxe",
    "virtio-blk": "VirtioBlkDxe",
    "nvme": "NvmExpressDxe",
    "ahci": "AtaAtapiPassThruDxe",
}


@pytest.mark.parametrize("model", MODULES)
def test_ovmf_has_a_driver_or_not(model: str) -> None:
    if not CODE.exists():
        missing("oracle", f"{CODE} is not there")
    code = CODE.read_bytes()
    start = code.index(COMPRESSED)
    at = start - 4 + int.from_bytes(code[start + 16 : start + 18], "little")
    volume = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE).decompress(code[at:])
    name = re.escape(MODULES[model].encode("utf-16-le") + b"\0\0")
    assert (re.search(name, volume) is None) == (model in _NO_UEFI_DRIVER)
    assert model in CONTROLLER_MODELS or model == "lsi53c895a"
