"""Makes `vmconv/testing/samples.zip`, the images that the conformance kit ships.

    python tests/support/sample_images.py

qemu-img gives images new identities each time, so the archive differs each time. It needs to be made again only if the
disk or the list of images changes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from vmconv.testing.samples import ARCHIVE, sample_disk

_TIME = (2026, 1, 1, 0, 0, 0)


class Made(NamedTuple):
    """How an image is made; `format` is vmconv's name of it, `driver` QEMU's."""

    name: str
    format: str
    driver: str
    options: tuple[str, ...] = ()


MADE = (
    Made("v3.qcow2", "qcow2", "qcow2"),
    Made("v2.qcow2", "qcow2", "qcow2", ("-o", "compat=0.10")),
    Made("small-clusters.qcow2", "qcow2", "qcow2", ("-o", "cluster_size=512,refcount_bits=1")),
    Made("subclusters.qcow2", "qcow2", "qcow2", ("-o", "extended_l2=on")),
    Made("zlib.qcow2", "qcow2", "qcow2", ("-c",)),
    Made("zstd.qcow2", "qcow2", "qcow2", ("-c", "-o", "compression_type=zstd")),
    Made("sparse.vmdk", "vmdk", "vmdk", ("-o", "subformat=monolithicSparse")),
    Made("stream.vmdk", "vmdk", "vmdk", ("-o", "subformat=streamOptimized")),
    Made("dynamic.vhdx", "vhdx", "vhdx", ("-o", "block_size=1M")),
    Made("fixed.vhdx", "vhdx", "vhdx", ("-o", "subformat=fixed,block_size=1M")),
    Made("dynamic.vhd", "vhd", "vpc", ("-o", "force_size=on")),
    Made("fixed.vhd", "vhd", "vpc", ("-o", "subformat=fixed,force_size=on")),
    Made("dynamic.vdi", "vdi", "vdi"),
    Made("static.vdi", "vdi", "vdi", ("-o", "static=on")),
    Made("plain.qed", "qed", "qed"),
    Made("plain.parallels", "parallels", "parallels"),
)


def make(target: Path) -> None:
    """Writes the archive."""
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as archive:
        disk = Path(directory, "disk.raw")
        disk.write_bytes(sample_disk())
        index = {one.name: {"format": one.format, "options": " ".join(one.options)} for one in MADE}
        archive.writestr(zipfile.ZipInfo("index.json", _TIME), json.dumps(index), zipfile.ZIP_LZMA)
        for one in MADE:
            image = Path(directory, one.name)
            command = ["qemu-img", "convert", "-f", "raw", "-O", one.driver, *one.options, str(disk), str(image)]
            subprocess.run(command, check=True)
            archive.writestr(zipfile.ZipInfo(one.name, _TIME), image.read_bytes(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    make(ARCHIVE)
    print(f"{ARCHIVE}: {len(MADE)} images, {ARCHIVE.stat().st_size} bytes")
