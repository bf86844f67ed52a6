"""Which journal a recovery follows, and what it refuses."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path

import pytest

from support.crash import Stopped, StoppingCalls
from support.disks import MIB, make_disk
from support.inplace import NOBODY, in_place, interrupted, names
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
def test_a_changed_file_without_its_journal_is_not_read_as_a_disk(ext4_dir: Path, name: str) -> None:
    disk = interrupted(ext4_dir)
    disk.with_name(disk.name + JOURNAL).unlink()
    with pytest.raises(AccessError, match=r"disk\.raw\.vmconv-inplace: its journal disk\.raw\.vmconv-journal is"):
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


def test_a_journal_that_is_removed_before_it_is_locked_is_another_run_s(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = interrupted(ext4_dir)
    journal = disk.with_name(disk.name + JOURNAL)
    real = fcntl.flock

    def removing(descriptor: int, flags: int) -> None:
        journal.unlink(missing_ok=True)
        real(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", removing)
    with pytest.raises(AccessError, match=r"disk\.raw\.vmconv-journal: a change in place is running"):
        api.recover(str(disk))


def test_for_a_missing_file_the_journals_of_its_directory_are_named(ext4_dir: Path) -> None:
    with pytest.raises(AccessError) as caught:
        api.recover(str(ext4_dir / "gone.raw"))
    assert caught.value.hint is None
    interrupted(ext4_dir)
    with pytest.raises(AccessError) as caught:
        api.recover(str(ext4_dir / "gone.raw"))
    assert str(caught.value.hint).endswith(f"vmconv recover {ext4_dir / ('disk.raw' + JOURNAL)}")


def test_a_shortened_working_name_finds_its_journal(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / ("d" * 250 + ".raw"), MIB)
    before = disk.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("vmconv.inplace.stay.Syscalls", lambda: StoppingCalls(8))
        in_place(disk, ext4_dir / "new.qcow2")
    (working,) = (name for name in names(ext4_dir) if name.endswith(WORKING))
    assert not working.startswith(disk.name)
    assert api.recover(str(ext4_dir / working)) == (str(disk), False)
    assert (names(ext4_dir), disk.read_bytes()) == ({disk.name}, before)


def test_a_restored_change_may_have_another_owner(ext4_dir: Path) -> None:
    disk = interrupted(ext4_dir)
    os.chown(disk.with_name(disk.name + WORKING), NOBODY, NOBODY)
    with pytest.raises(AccessError, match=f"belongs to user {NOBODY}, "):
        api.recover(str(disk))
    assert api.recover(str(disk), trust=True) == (str(disk), False)
    assert names(ext4_dir) == {"disk.raw"}


def test_a_completed_change_has_the_requested_name(xfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of an extent: on XFS new files take the place of the old one."""
    disk = make_disk(xfs_dir / "disk.raw", MIB)
    for at in itertools.count():
        monkeypatch.setattr("vmconv.inplace.share.Syscalls", lambda at=at: StoppingCalls(at))
        with pytest.raises(Stopped):
            in_place(disk, xfs_dir / "new.vmdk", options={"subformat": "monolithicFlat"})
        done = api.recover(str(disk))
        if done.forward:
            break
    assert done.path == str(xfs_dir / "new.vmdk")
    assert names(xfs_dir) == {"new.vmdk", "new-flat.vmdk"}
