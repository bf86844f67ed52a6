"""Which file a conversion in place changes."""

from __future__ import annotations

import os
from pathlib import Path

from support.disks import MIB
from support.inplace import descriptor, in_place, names


def test_of_a_disk_without_payload_the_last_file_becomes_the_target(ext4_dir: Path) -> None:
    """The extent and not its descriptor: it has the right size, and the undo file stays small."""
    disk = ext4_dir / "disk.raw"
    disk.touch()
    os.truncate(disk, MIB)
    descriptor(disk)
    extent = disk.stat().st_ino
    in_place(ext4_dir / "front.vmdk", ext4_dir / "new.raw")
    assert names(ext4_dir) == {"new.raw"}
    assert ((ext4_dir / "new.raw").stat().st_ino, (ext4_dir / "new.raw").stat().st_size) == (extent, MIB)
