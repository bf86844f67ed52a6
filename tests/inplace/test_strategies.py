"""Which file a conversion in place changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.disks import MIB, make_disk
from support.inplace import descriptor, in_place, names, refused
from vmconv.inplace.names import JOURNAL, WORKING


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


@pytest.mark.parametrize("suffix", [JOURNAL, WORKING])
@pytest.mark.parametrize("name", ["disk.raw", "front.vmdk"])
def test_a_file_of_a_working_name_is_told_with_what_to_do(ext4_dir: Path, name: str, suffix: str) -> None:
    """Of the file that is changed, and of those that go with it."""
    descriptor(make_disk(ext4_dir / "disk.raw", MIB))
    (ext4_dir / f"{name}{suffix}").write_bytes(b"somebody's")
    error = refused(ext4_dir / "front.vmdk", ext4_dir / "new.qcow2")
    assert f"{name}{suffix}: is in the way of a conversion in place" in str(error)
    assert f"vmconv recover {ext4_dir / name};" in str(error.hint)
