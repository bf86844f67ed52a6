"""Which file a conversion in place changes."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import qcow2_images
from support.disks import MIB, make_disk
from support.inplace import descriptor, in_place, names, refused
from support.inplace_pairs import Source
from vmconv.errors import PlanError, VmconvError
from vmconv.inplace import moves, rules, stay
from vmconv.inplace.names import JOURNAL, UNDO, WORKING
from vmconv.inplace.syscalls import Syscalls
from vmconv.io.directory import Directory
from vmconv.model.sources import File


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
def test_a_file_with_a_working_name_is_reported_with_a_hint(ext4_dir: Path, name: str, suffix: str) -> None:
    """Of the file that is changed, and of those that go with it."""
    descriptor(make_disk(ext4_dir / "disk.raw", MIB))
    (ext4_dir / f"{name}{suffix}").write_bytes(b"somebody's")
    error = refused(ext4_dir / "front.vmdk", ext4_dir / "new.qcow2")
    assert f"{name}{suffix}: is in the way of a change in place" in str(error)
    assert f"vmconv recover {ext4_dir / name};" in str(error.hint)


@pytest.mark.parametrize("name", ["new.vmdk", "new", "~new"])
def test_the_file_with_the_payload_stays_whatever_its_name_is(ext4_dir: Path, name: str) -> None:
    """Before or behind the names of the files that are made beside it."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    payload = disk.stat().st_ino
    in_place(disk, ext4_dir / name, target_format="vmdk", options={"subformat": "monolithicFlat"})
    (extent,) = names(ext4_dir) - {name}
    assert (ext4_dir / extent).stat().st_ino == payload
    assert extent.encode() in (ext4_dir / name).read_bytes()


def test_a_name_that_is_taken_meanwhile_leaves_the_disk(any_dir: Path) -> None:
    disk, target = make_disk(any_dir / "disk.raw", MIB), any_dir / "new.qcow2"
    before = disk.read_bytes()

    def take(done: int, to_do: int) -> None:
        target.write_bytes(b"somebody's")

    with pytest.raises(VmconvError, match=r"new\.qcow2: already exists") as caught:
        in_place(disk, target, progress=take)
    assert caught.value.hint
    assert (disk.read_bytes(), target.read_bytes()) == (before, b"somebody's")
    assert names(any_dir) == {"disk.raw", "new.qcow2"}


@pytest.mark.parametrize("offset", [0, 6, 9, 10, 12])
def test_writes_across_the_old_end_are_placed_correctly(tmp_path: Path, offset: int) -> None:
    """Behind the old end at once, and inside it last: old payload is still to be copied from there."""
    path, data = tmp_path / "working", bytes(range(65, 77))
    path.write_bytes(b"." * 10)
    carrier = File(str(path), os.open(path, os.O_RDWR))
    size = offset + len(data)
    with closing(carrier), Directory.at(str(tmp_path)) as directory:
        change: Any = SimpleNamespace(
            descriptor=carrier.descriptor, working="working", calls=Syscalls(), directory=directory
        )
        output = stay._CarrierOutput(change, carrier, size)
        output.write(offset, data)
        wanted = b"." * 10 + bytes(max(0, offset - 10)) + data[max(0, 10 - offset) :]
        assert path.read_bytes() == wanted
        assert output.finish().size == size
        assert path.read_bytes() == wanted[:offset] + data
        assert not carrier.changed()
        output.close()


def test_an_undo_file_of_the_target_is_not_written_over(ext4_dir: Path) -> None:
    """It has the name of the target that the user gave, not that of an extent."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    (ext4_dir / f"new.vmdk{UNDO}").write_bytes(b"the way back of another one")
    options = {"subformat": "monolithicFlat"}
    error = refused(disk, ext4_dir / "new.vmdk", keep_undo=True, options=options)
    assert f"new.vmdk{UNDO}: already exists" in str(error)
    in_place(disk, ext4_dir / "new.vmdk", options=options)
    assert (ext4_dir / f"new.vmdk{UNDO}").read_bytes() == b"the way back of another one"


def test_a_shift_with_too_much_metadata_is_refused(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make_disk(ext4_dir / "disk.raw", 8 * MIB)
    before = disk.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(moves, "MOST_WRITTEN", 1)
        refused(disk, ext4_dir / "new.vdi")
    assert disk.read_bytes() == before
    in_place(disk, ext4_dir / "new.vdi")
    assert names(ext4_dir) == {"new.vdi"}


def test_new_files_that_copy_a_little_are_better_than_a_shift(xfs_dir: Path, tmp_path: Path) -> None:
    """The last block of the disk is not whole, so it is copied; a shift would not, but could not be taken back."""
    raw = make_disk(tmp_path / "disk.raw", MIB + 512)
    image = Source("vhdx", "qemu").make(raw, xfs_dir)
    before = image.stat().st_ino
    plan = in_place(image, xfs_dir / "new.raw")
    assert 0 < plan.totals.copied < 4096
    assert (xfs_dir / "new.raw").stat().st_ino != before
    assert (xfs_dir / "new.raw").read_bytes() == raw.read_bytes()


@pytest.mark.parametrize("owner", [0, 1, 54321])
def test_a_missing_image_has_no_owner(tmp_path: Path, owner: int) -> None:
    (tmp_path / "extent").touch()
    os.chown(tmp_path / "extent", owner, owner)
    with Directory.at(str(tmp_path)) as directory:
        with pytest.raises(PlanError, match=f"extent: belongs to user {owner}, gone to user -1"):
            rules.refuse_other_owners(directory, "gone", ["extent"], "--any-owner")
        rules.refuse_other_owners(directory, "gone", ["gone", "too"], "--any-owner")


def test_an_overlay_of_another_directory_s_disk_of_this_name_is_no_neighbour(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    (ext4_dir / "overlay.qcow2").write_bytes(qcow2_images.empty_overlay("/elsewhere/disk.raw"))
    in_place(disk, ext4_dir / "new.qcow2")
    assert names(ext4_dir) == {"new.qcow2", "overlay.qcow2"}


def test_a_new_file_is_synced_before_it_gets_its_name(
    xfs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut on a real filesystem cannot show it: verifying asks for physical blocks, which writes them too."""
    source = Source("vhdx", "qemu").make(make_disk(tmp_path / "disk.raw", MIB), xfs_dir)
    synced: set[int] = set()
    renamed: list[int] = []
    sync = os.fsync

    class Calls(Syscalls):
        def rename(self, directory: Directory, old: str, new: str, *, replace: bool) -> None:
            renamed.append(os.stat(old, dir_fd=directory.descriptor).st_ino)
            assert renamed[-1] in synced
            super().rename(directory, old, new, replace=replace)

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr("vmconv.inplace.share.Syscalls", Calls)
    before = source.stat().st_ino
    in_place(source, xfs_dir / "new.raw")
    assert renamed == [(xfs_dir / "new.raw").stat().st_ino] != [before]
