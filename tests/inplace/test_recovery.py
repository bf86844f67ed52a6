"""Which journal a recovery follows, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.disks import MIB, make_disk
from support.inplace import interrupted, names
from vmconv import api
from vmconv.errors import AccessError, ImageError, VmconvError
from vmconv.inplace.names import JOURNAL, WORKING


def torn(directory: Path) -> Path:
    """Returns a disk beside a journal that was never complete: its run had changed nothing."""
    disk = interrupted(directory)
    disk.with_name(disk.name + WORKING).rename(disk)
    journal = disk.with_name(disk.name + JOURNAL)
    journal.write_bytes(journal.read_bytes()[:-1])
    return disk


@pytest.mark.parametrize("name", ["disk.raw", "new.qcow2", "disk.raw" + JOURNAL])
def test_a_torn_journal_is_removed(ext4_dir: Path, name: str) -> None:
    disk = torn(ext4_dir)
    done = api.recover(str(ext4_dir / name))
    assert (done.path, done.forward) == (str(disk), False)
    assert names(ext4_dir) == {"disk.raw"}
    assert disk.read_bytes()[:MIB] == make_disk(ext4_dir / "again.raw", MIB).read_bytes()


def test_a_torn_journal_of_a_changed_file_is_kept(ext4_dir: Path) -> None:
    disk = torn(ext4_dir)
    disk.rename(disk.with_name(disk.name + WORKING))
    with pytest.raises(ImageError, match="is damaged"):
        api.recover(str(disk))
    assert names(ext4_dir) == {"disk.raw" + JOURNAL, "disk.raw" + WORKING}


@pytest.mark.parametrize("name", ["disk.raw", "disk.raw" + WORKING])
def test_a_changed_file_whose_journal_is_gone_is_not_taken_for_a_disk(ext4_dir: Path, name: str) -> None:
    disk = interrupted(ext4_dir)
    disk.with_name(disk.name + JOURNAL).unlink()
    with pytest.raises(AccessError, match=r"disk\.raw\.vmconv-inplace: its journal disk\.raw\.vmconv-journal is gone"):
        api.recover(str(ext4_dir / name))
    with pytest.raises(VmconvError):
        api.info(str(disk))
    assert names(ext4_dir) == {"disk.raw" + WORKING}


def test_a_disk_beside_another_s_working_file_is_its_own(ext4_dir: Path) -> None:
    """A new file that got the old name does not count on the missing journal."""
    disk = interrupted(ext4_dir)
    disk.with_name(disk.name + JOURNAL).unlink()
    disk.write_bytes(bytes(MIB))
    assert api.recover(str(disk)).forward is None
    assert api.info(str(disk))["virtual-size"] == MIB
