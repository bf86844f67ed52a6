"""The conformance kit of qcow version 1; qemu-img makes the images."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from support.requirements import oracle_program
from vmconv.testing import ReaderTests, Sample, patterned
from vmconv_qcow2 import Qcow

MIB = 1 << 20


def by_qemu(disk: Path, image: Path, *, packed: bool = False) -> Path:
    """Makes an image of a raw disk, with all clusters compressed that can be."""
    program = oracle_program("qemu-img")
    command = [program, "convert", "-f", "raw", "-O", "qcow", *(["-c"] if packed else []), str(disk), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # QEMU 7.2 makes a whole image with -c, says nothing, and exits with 1.
    assert done.returncode in ((0, 1) if packed else (0,)), done.stderr
    assert not done.stderr
    subprocess.run([program, "compare", "-f", "raw", "-F", "qcow", disk, image], capture_output=True, check=True)
    return image


@cache
def _made(*, packed: bool) -> Sample:
    disk = patterned(5 * MIB, [(0, 4096), (MIB, 70000), (5 * MIB - 8192, 8192)])
    with tempfile.TemporaryDirectory() as folder:
        source, image = Path(folder, "disk.raw"), Path(folder, "disk.qcow")
        content = disk.read(0, disk.size)
        # Text can be compressed, noise cannot.
        source.write_bytes(content[: 3 * MIB] + b"text" * 20000 + content[3 * MIB + 80000 :])
        data = by_qemu(source, image, packed=packed).read_bytes()
    (offset,) = struct.unpack_from(">Q", data, 40)
    tables = [at for (at,) in struct.iter_unpack(">Q", data[offset : offset + 24]) if at]
    return Sample(data, [(0, 48), (offset, offset + 24), *((at, at + 4096) for at in tables)])


class QcowKit(ReaderTests):
    format = Qcow()
    variants = ({"packed": "no"}, {"packed": "yes"})

    def sound(self, variant: Mapping[str, str]) -> Sample:
        return _made(packed=variant.get("packed") == "yes")
