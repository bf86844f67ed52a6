"""Conversions in place: what they leave where it was, what they refuse, and the way back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import qcow2_images
from support.crash import Stopped, StoppingCalls
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.inplace import (
    NOBODY,
    Work,
    as_nobody,
    contents,
    converted,
    copied,
    descriptor,
    in_place,
    interrupted,
    names,
    refused,
    run_cli,
)
from support.inplace_pairs import Places, Source, Target, other_pairs, pairs, shifted_pairs
from support.variants import QEMU_NAMES
from vmconv import api
from vmconv.cli.main import main
from vmconv.errors import AccessError, BackendError, ImageError, PlanError, UsageError, VmconvError
from vmconv.inplace import undo, undofile
from vmconv.inplace.journal import Journal, Leftover, commit_record
from vmconv.inplace.names import JOURNAL, UNDO, WORKING
from vmconv.inplace.strategies import Share, Unsuitable
from vmconv.inplace.syscalls import Syscalls
from vmconv.io.opener import Opener
from vmconv.io.physical import BlockSpace, PhysicalMap
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.model.plan import Action, Plan
from vmconv.system import linux
from vmconv.testing.malformed import time_limit

SIZE = 12 * MIB
BLOCK = 4096

each_pair = pytest.mark.parametrize("pair", list(pairs()), ids=lambda pair: f"{pair[0]}-{pair[1]}")


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def any_dir(request: pytest.FixtureRequest) -> Path:
    """An empty directory on each filesystem."""
    directory: Path = request.getfixturevalue(f"{request.param}_dir")
    return directory


class PayloadGuard(Syscalls):
    """Refuses to let anything be written to, or punched out of, the payload that a plan leaves where it is."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, int]] = []
        self.carrier = -1

    def learn(self, plan: Plan, inode: int) -> None:
        self.carrier = inode
        steps = [(file.steps, file.steps.action == Action.SHARE) for file in plan.files]
        for one, shared in steps:
            assert (one.offset[shared] == one.source_offset[shared]).all()
            self.kept += zip(one.offset[shared].tolist(), (one.offset + one.length)[shared].tolist(), strict=True)

    def _look(self, descriptor: int, offset: int, length: int) -> None:
        if os.fstat(descriptor).st_ino == self.carrier:
            assert not [kept for kept in self.kept if kept[0] < offset + length and offset < kept[1]], (offset, length)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._look(descriptor, offset, len(data))
        super().write(descriptor, data, offset)

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        self._look(descriptor, offset, length)
        super().punch(descriptor, offset, length)


def places(path: Path, ranges: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Returns where ranges of a file lie physically, `(logical, length, physical)`."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        rows = linux.physical_ranges(file.fileno())
    found = []
    for low, high in ranges:
        for start, length, physical in rows.tolist():
            begin, end = max(low, start), min(high, start + length)
            if begin < end:
                found.append((begin, end - begin, physical + begin - start))
                if len(found) > 1 and joins(*found[-2:]):
                    found[-2:] = [(found[-2][0], found[-2][1] + found[-1][1], found[-2][2])]
    return found


def most_moved(target: Target) -> int:
    """Returns the bytes of one block of the target."""
    return MIB if target.places == Places.WHOLE_MIB else 65536


def joins(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """True for two pieces that are one, however the filesystem reports them."""
    return (one[0] + one[1], one[2] + one[1]) == (other[0], other[2])


def dead_blocks(path: Path, plan: Plan) -> int:
    """Returns how many blocks of the file that holds the payload have data and are nothing of the target."""
    file = next(one for one in plan.files if one.name == path.name)
    used = np.zeros(-(-file.size // BLOCK) + 1, dtype=bool)
    for row in file.table:
        if row.kind == Kind.DATA:
            used[row.start // BLOCK : -(-row.end // BLOCK)] = True
    dead = 0
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        at = 0
        while at < file.size:
            try:
                at = os.lseek(opened.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(opened.fileno(), at, os.SEEK_HOLE)
            dead += int((~used[at // BLOCK : -(-end // BLOCK)]).sum())
            at = end
    return dead


@each_pair
def test_payload_stays_where_it_lies(
    any_dir: Path,
    tmp_path: Path,
    qemu_img: QemuImg,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    pair: tuple[Source, Target],
) -> None:
    """Physically; nothing is written to it; nothing dead is left; QEMU finds nothing wrong; and there is a way back."""
    source, target = pair
    raw = make_disk(tmp_path / "disk.raw", SIZE, pieces=6)
    (any_dir / "work").mkdir()
    image = source.make(raw, any_dir / "work")
    carrier = max(image.parent.iterdir(), key=lambda path: path.stat().st_size)
    low, high = 0, carrier.stat().st_size
    if any_dir == request.getfixturevalue("mounts").get("btrfs") / "test":
        # A filesystem that copies on write puts a block elsewhere that holds payload beside the header, or its end.
        low, high = BLOCK, high // BLOCK * BLOCK
    before = contents(image.parent)
    guard = PayloadGuard()
    monkeypatch.setattr("vmconv.inplace.stay.Syscalls", lambda: guard)
    seen: list[tuple[int, int, int]] = []
    ranges: list[tuple[int, int]] = []
    plans: list[Plan] = []

    def announced(plan: Plan) -> None:
        plans.append(plan)
        guard.learn(plan, carrier.stat().st_ino)
        ranges.extend((max(low, begin), min(high, end)) for begin, end in guard.kept)
        seen.extend(places(carrier, ranges))

    result = api.convert(
        str(image),
        str(image.with_name(target.name)),
        source_format=source.format,
        target_format=target.format,
        options=target.options,
        in_place=True,
        keep_undo=True,
        announce=announced,
    )
    assert result.backend == "in-place"
    assert result.totals.copied <= most_moved(target)
    (main,) = [path for path in image.parent.iterdir() if path.stat().st_ino == guard.carrier]
    # What was set aside and never written is at no place.
    assert 0 < sum(length for _, length, _ in seen) <= result.totals.shared
    assert places(main, ranges) == seen
    assert dead_blocks(main, plans[0]) == 0
    made = image.with_name(target.name)
    assert api.compare(str(raw), str(made), right_format=target.format)
    kind = QEMU_NAMES.get(target.format, target.format)
    qemu_img("compare", "-f", "raw", "-F", kind, raw, made)
    qemu_img("check", "-f", kind, made, ok=(0, 63))
    assert names(image.parent) == {main.name, made.name, made.name + UNDO}
    api.undo(str(made))
    assert contents(image.parent) == before


def guest_places(path: Path, format_name: str) -> list[tuple[int, int, int]]:
    """Returns where the guest's bytes lie on storage, `(guest address, length, physical)`."""
    with Opener(installed()) as opener:
        image = opener.image(str(path), format_name)
        table = PhysicalMap().apply(image.flat.window(0, SIZE))
        return [(row.start, row.length, row.offset) for row in table if isinstance(row.source, BlockSpace)]


@pytest.fixture(params=["ext4", "xfs"])
def shifting_dir(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory on filesystems that shift, where nothing is shared."""
    monkeypatch.setattr(Share, "propose", lambda *_: PlanError("blocks cannot be shared"))
    directory: Path = request.getfixturevalue(f"{request.param}_dir")
    return directory


@pytest.mark.parametrize("pair", list(shifted_pairs()), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_payload_is_shifted_without_being_moved_on_storage(
    shifting_dir: Path, tmp_path: Path, qemu_img: QemuImg, pair: tuple[Source, Target]
) -> None:
    source, target = pair
    raw = make_disk(tmp_path / "disk.raw", SIZE, pieces=6)
    image = source.make(raw, shifting_dir)
    made = image.with_name(target.name)
    before = guest_places(image, source.format)
    plan = in_place(
        image,
        made,
        source_format=source.format,
        target_format=target.format,
        options=target.options,
        zero_copy="require",
    )
    assert plan.totals.copied == 0
    assert plan.totals.written < MIB
    assert guest_places(made, target.format) == before
    main = max(shifting_dir.iterdir(), key=lambda path: path.stat().st_size)
    assert dead_blocks(main, plan) == 0
    qemu_img("compare", "-f", "raw", "-F", QEMU_NAMES.get(target.format, target.format), raw, made)
    assert names(shifting_dir) == {main.name, made.name}


def test_a_shift_cannot_be_undone(ext4_dir: Path, tmp_path: Path) -> None:
    image = Source("vmdk", "qemu").make(make_disk(tmp_path / "disk.raw", MIB), ext4_dir)
    refused(image, ext4_dir / "new.raw", keep_undo=True)


def test_a_disk_in_another_order_is_not_shifted(ext4_dir: Path, qemu_img: QemuImg) -> None:
    disk = ext4_dir / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", disk, "4M")
    qemu_io(disk, "write -P 1 2M 64k", "write -P 2 0 64k")
    assert "another order" in str(refused(disk, ext4_dir / "new.raw"))


def test_shared_blocks_are_not_shifted(xfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared block gets another place when it is cut or written: an interrupted change would not find it again."""
    monkeypatch.setattr(Share, "propose", lambda *_: Unsuitable("blocks cannot be shared"))
    disk = Source("vhdx", "qemu").make(make_disk(xfs_dir / "disk.raw", SIZE + 512), xfs_dir)
    (xfs_dir / "disk.raw").unlink()
    subprocess.run(["cp", "--reflink=always", disk, xfs_dir / "copy.vhdx"], check=True)
    assert "other files share its blocks" in str(refused(disk, xfs_dir / "new.raw"))
    (xfs_dir / "copy.vhdx").unlink()
    api.convert(str(disk), str(xfs_dir / "new.raw"), in_place=True)


def test_too_many_shifts_are_refused(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Source("vmdk", "qemu").make(make_disk(ext4_dir / "disk.raw", SIZE, pieces=6), ext4_dir)
    (ext4_dir / "disk.raw").unlink()
    monkeypatch.setattr("vmconv.inplace.moves.MOST_SHIFTS", 2)
    assert "2 at most" in str(refused(disk, ext4_dir / "new.raw"))


@pytest.mark.parametrize("pair", list(other_pairs()), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_payload_that_cannot_stay_is_refused(ext4_dir: Path, tmp_path: Path, pair: tuple[Source, Target]) -> None:
    source, target = pair
    image = source.make(make_disk(tmp_path / "disk.raw", MIB), ext4_dir)
    error = refused(
        image,
        image.with_name(target.name),
        source_format=source.format,
        target_format=target.format,
        options=target.options,
    )
    assert "in place" in str(error)
    # What a hint recommends is not refused in its turn.
    named, _, _ = str(error.hint).rpartition(" can hold it in place")
    for name in filter(None, named.split(" or ")):
        there = image.with_name(f"other.{name}")
        assert api.plan(str(image), str(there), source_format=source.format, target_format=name, in_place=True)


@each_pair
def test_with_shared_blocks_the_source_is_replaced(
    reflink_dir: Path, tmp_path: Path, pair: tuple[Source, Target]
) -> None:
    source, target = pair
    image = source.make(make_disk(tmp_path / "disk.raw", SIZE), reflink_dir)
    made = image.with_name(target.name)
    result = api.convert(
        str(image),
        str(made),
        source_format=source.format,
        target_format=target.format,
        options=target.options,
        in_place=True,
    )
    assert result.totals.copied <= most_moved(target)
    assert api.compare(str(tmp_path / "disk.raw"), str(made), right_format=target.format)
    assert image.name not in names(reflink_dir)
    assert len(names(reflink_dir)) == 1 + ("monolithicFlat" in str(target))


def test_formats_that_need_sharing_are_made_by_sharing(reflink_dir: Path, tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    image = Source("vhdx", "vmconv").make(raw, reflink_dir)
    result = api.convert(str(image), str(reflink_dir / "new.raw"), in_place=True, zero_copy="require")
    assert result.backend == "reflink"
    assert (reflink_dir / "new.raw").read_bytes() == raw.read_bytes()
    assert names(reflink_dir) == {"new.raw"}


def test_payload_that_sharing_would_copy_stays(reflink_dir: Path, tmp_path: Path) -> None:
    """A VHD by QEMU has its payload at sectors: blocks of the filesystem cannot be shared, sectors can stay."""
    raw = make_disk(tmp_path / "disk.raw", SIZE)
    image = Source("vhd", "qemu", {"force_size": "on"}).make(raw, reflink_dir)
    result = api.convert(str(image), str(reflink_dir / "new.qcow2"), in_place=True, zero_copy="require")
    assert result.backend == "in-place"
    assert api.compare(str(raw), str(reflink_dir / "new.qcow2"))


def test_a_replaced_source_is_there_until_the_target_is(reflink_dir: Path, tmp_path: Path) -> None:
    """Stopped at each call, where blocks are shared."""
    source, target = Source("vmdk", "qemu", {"subformat": "monolithicFlat"}), Target("qcow2")
    (reflink_dir / "work").mkdir()
    image = source.make(make_disk(tmp_path / "disk.raw", MIB), reflink_dir / "work")
    work = Work(image.parent, image.name, target.name, source, target, "there")
    before, outcomes = contents(image.parent), []
    for at in range(100):
        folder = copied(work.directory, reflink_dir / "stopped")
        calls = StoppingCalls(at)
        with contextlib.suppress(Stopped):
            work.run(calls, folder)
        if not calls.dead:
            break
        with contextlib.suppress(AccessError):
            api.recover(str(folder / work.before))
        if contents(folder) == before:
            outcomes.append("before")
        else:
            assert names(folder) == {target.name}
            assert api.compare(str(tmp_path / "disk.raw"), str(folder / target.name))
            outcomes.append("after")
        shutil.rmtree(folder)
    assert outcomes == sorted(outcomes, reverse=True)
    assert {*outcomes} == {"before", "after"}
    assert not calls.dead


# Names


def test_a_disk_may_keep_its_name(any_dir: Path, tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    disk = Path(shutil.copy(raw, any_dir / "disk.img"))
    in_place(disk, disk, source_format="raw", target_format="qcow2")
    assert names(any_dir) == {"disk.img"}
    assert api.compare(str(raw), str(disk), right_format="qcow2")


def test_a_disk_that_keeps_its_name_can_be_undone(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.img", MIB)
    before = contents(ext4_dir)
    in_place(disk, disk, source_format="raw", target_format="qcow2", keep_undo=True)
    assert names(ext4_dir) == {"disk.img", "disk.img" + UNDO}
    api.undo(str(disk))
    assert contents(ext4_dir) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_existing_target_is_replaced_by_force_only(any_dir: Path, *, force: bool) -> None:
    disk, target = make_disk(any_dir / "disk.raw", MIB), any_dir / "new.qcow2"
    target.write_bytes(b"here already")
    if not force:
        assert "already exists" in str(refused(disk, target))
        return
    in_place(disk, target, force=True)
    assert names(any_dir) == {"new.qcow2"}
    assert api.check(str(target))


def test_permissions_stay(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    disk.chmod(0o640)
    os.chown(disk, 1234, 4321)
    in_place(disk, ext4_dir / "new.qcow2")
    status = (ext4_dir / "new.qcow2").stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 1234, 4321)


# Refusals


def symbolic_link(disk: Path) -> Path:
    link = disk.with_name("link.raw")
    link.symlink_to(disk.name)
    return link


def hard_link(disk: Path) -> Path:
    disk.with_name("other.raw").hardlink_to(disk)
    return disk


def overlay(disk: Path) -> Path:
    disk.with_name("overlay.qcow2").write_bytes(qcow2_images.empty_overlay(disk.name))
    return disk


def data_file(disk: Path) -> Path:
    disk.with_name("front.qcow2").write_bytes(qcow2_images.with_data_file(disk.name))
    return disk


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (symbolic_link, "symbolic link"),
        (hard_link, "hard links"),
        (overlay, "overlay.qcow2: refers to disk.raw"),
        (data_file, "front.qcow2: refers to disk.raw"),
        (descriptor, "front.vmdk: refers to disk.raw"),
    ],
    ids=["symbolic link", "hard link", "overlay", "data file", "descriptor"],
)
def test_a_file_that_others_count_on_is_refused(any_dir: Path, make: Callable[[Path], Path], why: str) -> None:
    disk = make(make_disk(any_dir / "disk.raw", MIB))
    assert why in str(refused(disk, any_dir / "new.qcow2"))


@contextlib.contextmanager
def writer(disk: Path) -> Iterator[None]:
    with disk.open("r+b"):
        yield


@contextlib.contextmanager
def loop_device(disk: Path) -> Iterator[None]:
    device = subprocess.run(["losetup", "--find", "--show", disk], capture_output=True, text=True, check=True)
    try:
        yield
    finally:
        subprocess.run(["losetup", "-d", device.stdout.strip()], check=True)


@contextlib.contextmanager
def qemu_reader(disk: Path) -> Iterator[None]:
    command = ["qemu-io", "-r", "-f", "raw", str(disk)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("length\n")
        process.stdin.flush()
        assert process.stdout.readline()
        yield
        process.stdin.close()


@pytest.mark.parametrize("user", [writer, loop_device, qemu_reader])
def test_a_file_that_is_open_elsewhere_is_refused(
    any_dir: Path, user: Callable[[Path], contextlib.AbstractContextManager[None]]
) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    with user(disk):
        assert "open in another process" in str(refused(disk, any_dir / "new.qcow2", AccessError))
    in_place(disk, any_dir / "new.qcow2")


def test_qemu_cannot_open_an_image_during_its_conversion(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    opened: list[int] = []

    def announced(_: Plan) -> None:
        done = subprocess.run(["qemu-io", "-f", "raw", "-c", "length", str(disk)], capture_output=True, check=False)
        opened.append(done.returncode)

    api.convert(str(disk), str(ext4_dir / "new.qcow2"), in_place=True, announce=announced)
    assert opened == [1]


def test_a_source_that_changes_meanwhile_is_left_alone(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    with pytest.raises(AccessError, match="changed while"):
        api.convert(str(disk), str(ext4_dir / "new.qcow2"), in_place=True, announce=lambda _: disk.touch())
    assert names(ext4_dir) == {"disk.raw"}


def test_another_directory_is_refused(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    (ext4_dir / "other").mkdir()
    with pytest.raises(PlanError, match="another directory"):
        in_place(disk, ext4_dir / "other" / "new.qcow2")
    assert names(ext4_dir) == {"disk.raw", "other"}


def test_a_filesystem_that_promises_nothing_is_refused() -> None:
    directory = Path("/dev/shm/vmconv-test")
    directory.mkdir()
    try:
        disk = make_disk(directory / "disk.raw", MIB)
        assert "tmpfs" in str(refused(disk, directory / "new.qcow2"))
    finally:
        shutil.rmtree(directory)


def test_compressed_payload_is_refused(ext4_dir: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(ext4_dir / "disk.raw", MIB)
    qemu_img("convert", "-c", "-O", "qcow2", raw, ext4_dir / "disk.qcow2")
    assert "decompressed" in str(refused(ext4_dir / "disk.qcow2", ext4_dir / "new.vmdk"))


def test_snapshots_are_destroyed_only_with_a_way_back(ext4_dir: Path, qemu_img: QemuImg) -> None:
    disk = ext4_dir / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", disk, "4M")
    qemu_io(disk, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "before", disk)
    qemu_io(disk, "write -P 2 0 1M")
    before = contents(ext4_dir)
    assert "1 internal snapshot" in str(refused(disk, ext4_dir / "new.vmdk"))
    in_place(disk, ext4_dir / "new.vmdk", keep_undo=True)
    qemu_io(ext4_dir / "new.vmdk", "read -P 2 0 1M")
    # The way back is for who has not written; reading may have left its traces in the times of a file, not more.
    api.undo(str(ext4_dir / "new.vmdk"))
    assert contents(ext4_dir) == before


@pytest.mark.parametrize(
    "options",
    [{"snapshot": "1"}, {"force_share": True}, {"backend": "copy"}, {"cache": "unsafe"}],
    ids=str,
)
def test_options_that_contradict_in_place_are_refused(ext4_dir: Path, options: dict[str, Any]) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    with pytest.raises(VmconvError) as caught:
        in_place(disk, ext4_dir / "new.qcow2", **options)
    assert isinstance(caught.value, UsageError)


def test_a_stream_is_not_in_place(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    done = run_cli("convert", "--in-place", "-O", "vhd", "-o", "subformat=fixed", disk, "-")
    assert done.returncode == 2
    assert "in place does not apply" in done.stderr
    assert names(ext4_dir) == {"disk.raw"}


def test_keep_undo_without_in_place_is_refused(ext4_dir: Path) -> None:
    with pytest.raises(UsageError, match="in place"):
        api.convert(str(make_disk(ext4_dir / "disk.raw", MIB)), str(ext4_dir / "new.qcow2"), keep_undo=True)


def test_a_plan_in_place_touches_nothing_and_names_what_moves(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    before = contents(ext4_dir), disk.stat().st_mtime_ns
    plan = api.plan(str(disk), str(ext4_dir / "new.qcow2"), in_place=True)
    assert plan.totals.copied == plan.copies[0].bytes <= 65536
    assert plan.copies[0].offset == 0
    assert (contents(ext4_dir), disk.stat().st_mtime_ns) == before


def test_zero_copy_can_be_required_in_place(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    done = run_cli("convert", "--in-place", "--zero-copy=require", disk, ext4_dir / "new.qcow2")
    assert done.returncode == 3
    assert names(ext4_dir) == {"disk.raw"}


# Chains


def test_the_top_of_a_chain_is_converted_on_its_own(ext4_dir: Path, qemu_img: QemuImg) -> None:
    base, top = ext4_dir / "base.vmdk", ext4_dir / "top.vmdk"
    qemu_img("create", "-f", "vmdk", base, "8M")
    qemu_io(base, "write -P 1 0 4M")
    qemu_img("create", "-f", "vmdk", "-b", base, "-F", "vmdk", top)
    qemu_io(top, "write -P 2 1M 1M")
    qemu_img("convert", "-O", "raw", top, ext4_dir / "wanted.raw")
    assert "its payload lies in" in str(refused(top, ext4_dir / "new.qcow2"))
    in_place(top, ext4_dir / "new.qcow2", backing_file="base.vmdk")
    qemu_img("check", ext4_dir / "new.qcow2")
    qemu_img("compare", ext4_dir / "wanted.raw", ext4_dir / "new.qcow2")
    assert names(ext4_dir) == {"base.vmdk", "new.qcow2", "wanted.raw"}


def zeros_on_a_parent(directory: Path, qemu_img: QemuImg) -> tuple[Path, Path]:
    """Returns a layer whose zeros and parent meet in the middle of 64 KiB, and the disk that it is with its parent."""
    base = make_disk(directory / "base.raw", MIB + 4096)
    layer, wanted = directory / "layer.qcow2", directory / "wanted.raw"
    size = MIB - 2560
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4096", "-b", base.name, "-F", "raw", layer, str(size))
    qemu_io(layer, "write -z 8K 4K", f"write -z {MIB - 8192} {8192 - 2560}", "write -P 3 64K 8K")
    qemu_img("convert", layer, wanted)
    return layer, wanted


def test_zeros_beside_ranges_of_the_parent_stay_in_small_clusters(ext4_dir: Path, qemu_img: QemuImg) -> None:
    layer, wanted = zeros_on_a_parent(ext4_dir, qemu_img)
    in_place(layer, ext4_dir / "new.qcow2", backing_file="base.raw")
    qemu_img("compare", "-F", "raw", ext4_dir / "new.qcow2", wanted)


def test_payload_of_the_parent_is_not_taken_for_the_files_own(ext4_dir: Path, qemu_img: QemuImg) -> None:
    layer, wanted = zeros_on_a_parent(ext4_dir, qemu_img)
    how: dict[str, Any] = {"backing_file": "base.raw", "options": {"cluster_size": "64K"}}
    assert "64K" not in str(refused(layer, ext4_dir / "new.qcow2", **how))
    qemu_img("compare", "-F", "raw", layer, wanted)


def test_a_chain_is_flattened_into_a_new_file_where_blocks_can_be_shared(reflink_dir: Path, qemu_img: QemuImg) -> None:
    base, top = reflink_dir / "base.qcow2", reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", base, "8M")
    qemu_io(base, "write -P 1 0 4M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_io(top, "write -P 2 1M 1M")
    before = contents(reflink_dir)["base.qcow2"]
    in_place(top, reflink_dir / "new.raw")
    assert names(reflink_dir) == {"base.qcow2", "new.raw"}
    assert contents(reflink_dir)["base.qcow2"] == before


def test_a_disk_in_a_data_file_becomes_a_disk_by_itself(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    front = ext4_dir / "front.qcow2"
    front.write_bytes(qcow2_images.with_data_file(disk.name))
    wanted = api.map_disk(str(front))
    before = contents(ext4_dir)
    in_place(front, ext4_dir / "new.qcow2", keep_undo=True)
    assert names(ext4_dir) == {"new.qcow2", "new.qcow2" + UNDO}
    assert sum(row.length for row in api.map_disk(str(ext4_dir / "new.qcow2"))) == sum(row.length for row in wanted)
    api.undo(str(ext4_dir / "new.qcow2"))
    assert contents(ext4_dir) == before


def test_a_disk_that_is_only_referred_to_is_left_alone(ext4_dir: Path, tmp_path: Path) -> None:
    image = Source("vhdx", "vmconv").make(make_disk(tmp_path / "disk.raw", MIB), ext4_dir)
    api.convert(str(image), str(ext4_dir / "front.vmdk"), options={"subformat": "reference"})
    assert "a disk of its own" in str(refused(ext4_dir / "front.vmdk", ext4_dir / "new.qcow2"))
    assert "front.vmdk: refers to disk.vhdx" in str(refused(image, ext4_dir / "new.qcow2"))


@pytest.mark.parametrize("options", [{"subformat": "reference"}, {"data_file": "disk.raw"}], ids=str)
def test_a_removed_source_cannot_be_referred_to(any_dir: Path, options: dict[str, str]) -> None:
    disk = make_disk(any_dir / "disk.raw", MIB)
    assert "refer to" in str(refused(disk, any_dir / "new.qcow2", options=options))


def make_chain(directory: Path, qemu_img: QemuImg) -> Path:
    """Makes base.qcow2, middle.qcow2 and top.qcow2, and what a guest sees of the top, wanted.raw."""
    base, middle, top = (directory / f"{name}.qcow2" for name in ("base", "middle", "top"))
    qemu_img("create", "-f", "qcow2", base, "8M")
    qemu_io(base, "write -P 1 0 4M")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", middle)
    qemu_io(middle, "write -P 2 1M 1M")
    qemu_img("create", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top)
    qemu_io(top, "write -P 3 2M 64k")
    qemu_img("convert", "-O", "raw", top, directory / "wanted.raw")
    return top


@pytest.mark.parametrize(
    ("base", "left"),
    [
        (None, {"base.qed", "middle.qed", "top.qed"}),
        ("base.qcow2", {"base.qcow2", "middle.qed", "top.qed"}),
        ("middle.qcow2", {"base.qcow2", "middle.qcow2", "top.qed"}),
    ],
)
def test_all_layers_of_a_chain_are_replaced_where_blocks_can_be_shared(
    reflink_dir: Path, qemu_img: QemuImg, base: str | None, left: set[str]
) -> None:
    top = make_chain(reflink_dir, qemu_img)
    in_place(top, reflink_dir / "top.qed", chain=True, backing_file=base, zero_copy="require")
    assert names(reflink_dir) == {*left, "wanted.raw"}
    qemu_img("compare", "-F", "qed", reflink_dir / "wanted.raw", reflink_dir / "top.qed")


def test_a_chain_as_a_whole_is_refused_where_nothing_can_be_shared(ext4_dir: Path, qemu_img: QemuImg) -> None:
    top = make_chain(ext4_dir, qemu_img)
    assert "-B" in str(refused(top, ext4_dir / "top.qed", chain=True).hint)


def test_a_layer_that_others_need_is_refused(any_dir: Path, qemu_img: QemuImg) -> None:
    make_chain(any_dir, qemu_img)
    error = refused(any_dir / "middle.qcow2", any_dir / "middle.qed", backing_file="base.qcow2")
    assert "top.qcow2: refers to middle.qcow2" in str(error)


# Interrupted


@pytest.mark.parametrize("command", ["info", "map", "plan", "compare"])
def test_a_command_that_meets_an_interrupted_conversion_takes_it_back(ext4_dir: Path, command: str) -> None:
    disk = interrupted(ext4_dir)
    more = {"plan": [ext4_dir / "other.qcow2"], "compare": [disk]}.get(command, [])
    done = run_cli(command, disk, *more)
    assert done.returncode == 0, done.stderr
    assert f"{disk}: a change in place was interrupted, and has been rolled back" in done.stderr
    assert names(ext4_dir) == {"disk.raw"}
    assert disk.read_bytes() == make_disk(ext4_dir / "again.raw", MIB).read_bytes()


@pytest.mark.parametrize("name", ["disk.raw", "new.qcow2"])
def test_a_command_that_meets_a_committed_conversion_finishes_it(ext4_dir: Path, qemu_img: QemuImg, name: str) -> None:
    """By either name: a request for the old one gets the new one."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    commits: list[int] = []

    class Stopping(StoppingCalls):
        def punch(self, descriptor: int, offset: int, length: int) -> None:
            commits.append(offset)
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmconv.inplace.stay.Syscalls", lambda: Stopping(10**6))
        patch.setattr("vmconv.inplace.change.Change.give_up", lambda change: change.close())
        with pytest.raises(Stopped):
            in_place(disk, ext4_dir / "new.qcow2")
    assert commits
    done = run_cli("info", ext4_dir / name)
    assert names(ext4_dir) == {"new.qcow2"}
    if name == "new.qcow2":
        assert done.returncode == 0, done.stderr
        assert "interrupted, and has been completed" in done.stderr
    else:
        assert done.returncode == 1
        assert f"{disk}: is {ext4_dir / 'new.qcow2'} now" in done.stderr
    make_disk(ext4_dir / "again.raw", MIB)
    qemu_img("compare", ext4_dir / "again.raw", ext4_dir / "new.qcow2")


@pytest.mark.parametrize("whose", ["another user's", "another directory's", "a key that others can read"])
def test_a_journal_that_is_not_our_own_is_followed_only_when_it_is_trusted(
    ext4_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    disk = interrupted(ext4_dir)
    if whose == "another user's":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    elif whose == "another directory's":
        (ext4_dir / "sub").mkdir()
        for path in (disk.with_name(disk.name + JOURNAL), disk.with_name(disk.name + WORKING)):
            path.rename(ext4_dir / "sub" / path.name)
        disk = ext4_dir / "sub" / disk.name
    else:
        (state / "vmconv" / "journal.key").chmod(0o644)
    before = contents(disk.parent)
    journal = disk.with_name(disk.name + JOURNAL)
    for command in ("info", "recover"):
        done = run_cli(command, disk)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"vmconv: {journal}: has no mark of this user's vmconv for this directory",
            f"  hint: if you know its origin, vmconv recover --trust {journal}; else remove it",
        ]
        assert contents(disk.parent) == before
    assert run_cli("recover", "--trust", journal).returncode == 0
    assert names(disk.parent) == {"disk.raw"}


def test_a_conversion_that_runs_is_not_recovered_by_another_command(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    said: list[str] = []

    def look(done: int, to_do: int) -> None:
        if done == to_do and not said:
            said.append(run_cli("info", disk).stderr)

    api.convert(str(disk), str(ext4_dir / "new.qcow2"), in_place=True, progress=look)
    assert "is running" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_conversions_work_without_a_key(ext4_dir: Path) -> None:
    """A user without a home: what is interrupted is brought back by who trusts the journal."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    for path in (ext4_dir, disk):
        os.chown(path, NOBODY, NOBODY)
    for parent in ext4_dir.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    done = as_nobody("convert", "--in-place", disk, ext4_dir / "new.qcow2", environment={"HOME": "/"})
    assert done.returncode == 0, done.stderr
    assert "only vmconv recover --trust restores the disk" in done.stderr
    assert names(ext4_dir) == {"new.qcow2"}


def test_a_missing_file_beside_an_invalid_journal_is_just_missing(ext4_dir: Path) -> None:
    (ext4_dir / ("disk.raw" + JOURNAL)).write_bytes(b"a diary")
    assert "No such file" in run_cli("info", ext4_dir / "other.raw").stderr


@pytest.mark.parametrize("name", ["disk.raw", "new.qcow2", "disk.raw" + JOURNAL, "disk.raw" + WORKING])
def test_an_interrupted_conversion_is_recovered_by_any_of_its_names(ext4_dir: Path, name: str) -> None:
    interrupted(ext4_dir)
    done = run_cli("recover", ext4_dir / name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ext4_dir / 'disk.raw'}: is as it was before the change\n"
    assert names(ext4_dir) == {"disk.raw"}


def test_there_may_be_nothing_to_recover(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    assert run_cli("recover", disk).stdout == f"{disk}: nothing to recover\n"
    assert run_cli("recover", ext4_dir / "gone.raw").returncode == 1


def test_a_running_conversion_is_not_recovered(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    errors: list[VmconvError] = []

    def look(done: int, to_do: int) -> None:
        if done == to_do and not errors:
            with pytest.raises(AccessError) as caught:
                api.recover(str(disk))
            errors.append(caught.value)

    api.convert(str(disk), str(ext4_dir / "new.qcow2"), in_place=True, progress=look)
    assert "is running" in str(errors[0])


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(ext4_dir: Path) -> None:
    disk = interrupted(ext4_dir)
    disk.write_bytes(b"somebody's")
    done = run_cli("recover", disk)
    assert done.returncode == 1
    assert "was created during" in done.stderr
    assert disk.read_bytes() == b"somebody's"
    disk.unlink()
    assert run_cli("recover", disk).returncode == 0
    assert names(ext4_dir) == {"disk.raw"}


OUTSIDE = ["../victim", "/etc/victim", "", ".", "..", "a\0b", "x" * 256, "disk.raw" + JOURNAL, "disk.raw" + WORKING]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_journal_that_names_files_elsewhere_is_refused(ext4_dir: Path, name: str) -> None:
    """It may come from a stranger's archive, and may not change the user's files."""
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    for journal in (
        Journal(source="disk.raw", target=name),
        Journal(source="disk.raw", target="new.raw", made=(name,)),
        Journal(source="disk.raw", target="new.raw", leftovers=(Leftover(name, 1, 1),)),
    ):
        encoded = journal.encode(lambda _: bytes(32))
        (ext4_dir / ("disk.raw" + JOURNAL)).write_bytes(encoded + commit_record(encoded))
        before = contents(ext4_dir)
        done = run_cli("recover", "--trust", disk)
        assert done.returncode == 1
        assert re.search(
            r" at 0x90: .* is not (the name of a file in the same directory|another file than)", done.stderr
        )
        assert contents(ext4_dir) == before


@pytest.mark.parametrize("name", [*OUTSIDE[:7], "new.qcow2" + UNDO])
def test_an_undo_file_that_names_files_elsewhere_is_refused(ext4_dir: Path, name: str) -> None:
    disk = converted(ext4_dir)
    kept = ext4_dir / (disk.name + UNDO)
    found = read_undo(kept)
    before = contents(ext4_dir)
    for changed in (
        found._replace(source=name),
        found._replace(target=name),
        found._replace(made=(name,)),
        found._replace(siblings=(undofile.Sibling(name, 0o644, 0),)),
    ):
        kept.write_bytes(changed.head(lambda _: bytes(32)))
        with pytest.raises(ImageError, match=r"is not (the name of a file in the same|another file than)"):
            api.undo(str(disk), trust=True)
    kept.unlink()
    assert contents(ext4_dir) == {name: digest for name, digest in before.items() if name != kept.name}


def read_undo(path: Path) -> undofile.Undo:
    with path.open("rb") as file:
        head = undofile.read_head(file.fileno(), path.name)
        return undofile.read(file.fileno(), path.name, head, path.name)


def test_a_file_that_is_no_journal_is_left_alone(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    (ext4_dir / ("disk.raw" + JOURNAL)).write_bytes(b"a diary")
    done = run_cli("recover", disk)
    assert done.returncode == 1
    assert "magic at 0x0: b'a diary' is not that of a journal" in done.stderr
    done = run_cli("info", disk)
    assert done.returncode == 0
    assert "it is ignored" in done.stderr


def test_a_full_filesystem_changes_nothing(tmp_path: Path) -> None:
    image, point = tmp_path / "small.img", tmp_path / "small"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        (point / "work").mkdir()
        disk = make_disk(point / "work" / "disk.raw", MIB)
        with (point / "rest").open("wb") as rest, contextlib.suppress(OSError):
            while True:
                rest.write(bytes(BLOCK))
                rest.flush()
        before = contents(disk.parent)
        with pytest.raises(VmconvError):
            in_place(disk, disk.with_name("new.qcow2"))
        assert contents(disk.parent) == before
    finally:
        subprocess.run(["umount", point], check=True)


@pytest.mark.parametrize("call", ["punch", "rename", "unlink"])
def test_storage_that_fails_after_the_commit_leaves_what_can_be_finished(
    ext4_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    disk = Path(shutil.copy(make_disk(tmp_path / "disk.raw", MIB), ext4_dir / "disk.raw"))

    real = getattr(Syscalls, call)

    def failing(*arguments: Any, **more: Any) -> None:
        if call != "rename" or arguments[-1] == "new.qcow2":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Syscalls, call, failing)
        with pytest.raises(BackendError, match="the change is committed and not complete") as caught:
            in_place(disk, ext4_dir / "new.qcow2")
    assert caught.value.hint == f"vmconv recover {ext4_dir / 'new.qcow2'}"
    now = str(caught.value).partition("; the disk is ")[2].removesuffix(" now")
    assert Path(now).exists()
    assert api.recover(str(disk)).forward
    assert names(ext4_dir) == {"new.qcow2"}
    assert api.compare(str(tmp_path / "disk.raw"), str(ext4_dir / "new.qcow2"))


@pytest.mark.parametrize("call", ["create", "write", "sync"])
def test_storage_that_fails_before_the_commit_leaves_the_source(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    before = contents(ext4_dir)
    real, made = getattr(Syscalls, call), itertools.count()

    def failing(*arguments: Any) -> Any:
        if next(made) == {"create": 0, "write": 2, "sync": 1}[call]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(Syscalls, call, failing)
    with pytest.raises(VmconvError):
        in_place(disk, ext4_dir / "new.qcow2")
    assert contents(ext4_dir) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_everything_back(ext4_dir: Path, number: int) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    before = contents(ext4_dir)
    code = (
        "import sys, time\ncount = 0\nfrom vmconv.inplace.syscalls import Syscalls\nfrom vmconv.cli.main import main\n"
        "real = Syscalls.write\n"
        "def slow(*arguments):\n    global count\n    count += 1\n    print('busy', flush=True)\n"
        # The third write waits for the signal.
        "    for _ in range(6000 if count == 3 else 0):\n        time.sleep(0.1)\n    real(*arguments)\n"
        "Syscalls.write = slow\nraise SystemExit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", "--in-place", str(disk), str(ext4_dir / "new.qcow2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(3):
            assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert contents(ext4_dir) == before


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_loses_nothing(ext4_dir: Path, tmp_path: Path) -> None:
    """With kill -9, at random moments of real runs."""
    raw = make_disk(tmp_path / "disk.raw", 4 * MIB)
    rng, outcomes = random.Random(6), set()
    digest = contents(tmp_path)["disk.raw"]
    for _ in range(40):
        disk = Path(shutil.copy(raw, ext4_dir / "disk.raw"))
        os.sync()
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(disk), str(ext4_dir / "new.qcow2"), str(rng.uniform(0, 0.03))],
            stdout=subprocess.DEVNULL,
        ) as process:
            process.wait(600)
        with contextlib.suppress(AccessError):
            api.recover(str(disk))
        if disk.exists():
            assert contents(ext4_dir) == {"disk.raw": digest}
            outcomes.add("before")
        else:
            assert names(ext4_dir) == {"new.qcow2"}
            assert api.compare(str(raw), str(ext4_dir / "new.qcow2"))
            outcomes.add("after")
        for path in ext4_dir.iterdir():
            path.unlink()
    assert "before" in outcomes


KILLED = """
import os, signal, sys
from vmconv import api
from vmconv.inplace.change import Change

source, target, delay = sys.argv[1:]
begin = Change.begin

def timed(*arguments):
    signal.setitimer(signal.ITIMER_REAL, max(1e-6, float(delay)))
    return begin(*arguments)

# The kernel's own timer: the run itself does nothing to be killed.
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
Change.begin = timed
api.convert(source, target, in_place=True)
"""


# The way back


def written_by_qemu(path: Path) -> None:
    qemu_io(path, "write -P 1 0 512")


def written_behind_the_clock(path: Path) -> None:
    """Written to, with the time of the last change put back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def grown(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 512)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (written_by_qemu, "and modified at"),
        (Path.touch, "and modified at"),
        (written_behind_the_clock, "its metadata differs from what the change made"),
        (grown, "its size was"),
    ],
    ids=["written", "touched", "hidden", "grown"],
)
def test_a_modified_image_is_not_undone(ext4_dir: Path, change: Callable[[Path], None], why: str) -> None:
    disk = converted(ext4_dir)
    change(disk)
    before = contents(ext4_dir)
    with pytest.raises(PlanError, match=why) as caught:
        api.undo(str(disk))
    assert "vmconv convert -O raw" in str(caught.value.hint)
    assert contents(ext4_dir) == before


def test_an_image_that_was_only_read_is_undone(ext4_dir: Path, qemu_img: QemuImg) -> None:
    disk = converted(ext4_dir)
    qemu_img("check", disk)
    qemu_img("convert", "-O", "raw", disk, ext4_dir / "copy.raw")
    done = run_cli("undo", disk)
    assert done.stdout == f"{ext4_dir / 'disk.raw'}: is as it was before the change\n"
    qemu_img("compare", ext4_dir / "copy.raw", ext4_dir / "disk.raw")
    assert names(ext4_dir) == {"copy.raw", "disk.raw"}


def test_a_disk_that_an_overlay_counts_on_is_not_undone(ext4_dir: Path) -> None:
    disk = converted(ext4_dir)
    (ext4_dir / "overlay.qcow2").write_bytes(qcow2_images.empty_overlay(disk.name))
    with pytest.raises(PlanError, match="refers to"):
        api.undo(str(disk))


def test_a_name_that_is_taken_is_not_undone_to(ext4_dir: Path) -> None:
    disk = converted(ext4_dir)
    (ext4_dir / "disk.raw").write_bytes(b"somebody's")
    with pytest.raises(PlanError, match="already exists"):
        api.undo(str(disk))


@pytest.mark.parametrize("place", [10, 140, 300, -5])
def test_a_damaged_undo_file_is_refused(ext4_dir: Path, place: int) -> None:
    disk = converted(ext4_dir)
    kept = ext4_dir / (disk.name + UNDO)
    data = bytearray(kept.read_bytes())
    data[place] ^= 0xFF
    kept.write_bytes(data)
    before = contents(ext4_dir)
    with pytest.raises(VmconvError):
        api.undo(str(disk))
    assert contents(ext4_dir) == before


def test_without_an_undo_file_nothing_is_undone(ext4_dir: Path) -> None:
    with pytest.raises(AccessError, match="there is no") as caught:
        api.undo(str(make_disk(ext4_dir / "disk.raw", MIB)))
    assert "--keep-undo" in str(caught.value.hint)


@pytest.mark.parametrize("piece", [700, 4096, MIB])
def test_old_bytes_come_back_piece_by_piece(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(undo, "PIECE", piece)
    disk = make_disk(ext4_dir / "disk.raw", 4 * MIB)
    before = contents(ext4_dir)
    in_place(disk, ext4_dir / "new.qcow2", keep_undo=True)
    api.undo(str(ext4_dir / "new.qcow2"))
    assert contents(ext4_dir) == before


def test_undo_takes_no_time_for_payload(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", 256 * MIB, pieces=400, unit=1 << 16)
    in_place(disk, ext4_dir / "new.qcow2", keep_undo=True)
    assert (ext4_dir / ("new.qcow2" + UNDO)).stat().st_size < 1 << 17
    with time_limit(2):
        undo.undo(str(ext4_dir / "new.qcow2"))


def test_the_journal_is_locked_while_its_run_lives(ext4_dir: Path) -> None:
    disk = make_disk(ext4_dir / "disk.raw", MIB)
    locked: list[bool] = []

    def look(_done: int, _to_do: int) -> None:
        with (ext4_dir / ("disk.raw" + JOURNAL)).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked.append(False)
            except BlockingIOError:
                locked.append(True)

    api.convert(str(disk), str(ext4_dir / "new.qcow2"), in_place=True, progress=look)
    assert locked
    assert all(locked)


def test_undo_and_recover_print_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    api.convert(str(raw), str(tmp_path / "disk.qcow2"), in_place=True, keep_undo=True)
    assert main(["undo", "--output", "json", str(tmp_path / "disk.qcow2")]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "result", "path": str(raw), "state": "before"}
    assert main(["recover", "--output", "json", str(raw)]) == 0
    assert json.loads(capsys.readouterr().out) == {"event": "result", "path": str(raw), "state": "unchanged"}
