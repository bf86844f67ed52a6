"""Power cuts on real filesystems: what was on the block device at each call is mounted again, and recovered.

The filesystem lies in a file on XFS; a snapshot of that file, a reflink, is the block device as it was at that moment.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.crash import OTHERS
from support.disks import MIB, make_disk
from support.inplace import SIZE, THERE, UNDOABLE, Contents, Work, contents
from support.inplace_pairs import Source, Target
from support.tried import TRIED
from vmconv.inplace import recovery
from vmconv.inplace.strategies import Share, Unsuitable
from vmconv.inplace.syscalls import Syscalls
from vmconv.io.directory import Directory

MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}
SPACE = 320 * MIB
SHIFTED = "there, shifted"


@contextmanager
def mounted(image: Path, kind: str, point: Path) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    options = "loop,nouuid" if kind == "xfs" else "loop"
    subprocess.run(["mount", "-t", kind, "-o", options, image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


class SnapshotCalls(Syscalls):
    """Keeps what the block device holds before each call."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image = image
        self.directory = directory
        self.taken: list[Path] = []

    def take(self) -> None:
        path = self.directory / f"{len(self.taken)}.img"
        subprocess.run(["cp", "--reflink=always", self.image, path], check=True)
        self.taken.append(path)


def _after_a_snapshot(name: str) -> Any:
    def call(self: SnapshotCalls, *arguments: Any, **more: Any) -> Any:
        self.take()
        return getattr(Syscalls, name)(self, *arguments, **more)

    return call


for _name in (*OTHERS, "write"):
    setattr(SnapshotCalls, _name, _after_a_snapshot(_name))


def device(directory: Path, kind: str) -> SnapshotCalls:
    """Returns calls that take snapshots of a new block device with an empty filesystem."""
    image, snapshots = directory / "device.img", directory / "snapshots"
    with image.open("wb") as file:
        file.truncate(SPACE)
    subprocess.run([*MAKE[kind], image], check=True)
    snapshots.mkdir()
    return SnapshotCalls(image, snapshots)


def judge(found: list[str]) -> None:
    """Checks that the old state was found at first, and the new one at last."""
    assert found == sorted(found, reverse=True)
    assert set(found) == {"before", "after"}
    TRIED["power cuts on real filesystems"] += len(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    ("source", "target", "way"),
    [
        (Source("raw", "cp"), Target("qcow2"), UNDOABLE),
        # Where blocks can be shared, a new file is made, and the old ones go.
        (Source("vmdk", "qemu", {"subformat": "monolithicFlat"}), Target("vmdk"), THERE),
        (Source("vmdk", "qemu"), Target("raw"), SHIFTED),
    ],
    ids=lambda part: str(part).replace(" ", "-"),
)
def test_a_power_cut_on_a_real_filesystem_is_rolled_back_or_completed(
    xfs_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    source: Source,
    target: Target,
    way: str,
) -> None:
    if way == SHIFTED:
        if kind == "btrfs":
            pytest.skip("Btrfs shifts nothing")
        monkeypatch.setattr(Share, "propose", lambda *_: Unsuitable("blocks cannot be shared"))
    calls = device(xfs_dir, kind)
    with mounted(calls.image, kind, tmp_path / "mounted") as point:
        (point / "work").mkdir()
        disk = source.make(make_disk(tmp_path / "disk.raw", SIZE, pieces=3), point / "work")
        work = Work(disk.parent, disk.name, target.name, source, target, way)
        subprocess.run(["sync", "-f", point], check=True)
        before = contents(work.directory)
        work.run(calls, work.directory)
        after = contents(work.directory)
    calls.take()
    found = [outcome(path, kind, work.before, tmp_path, (before, after)) for path in calls.taken]
    judge(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["qcow2", "raw"])
def test_a_power_cut_during_a_sync_leaves_the_old_target_or_the_new(
    xfs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """In place: qcow2 by appending, raw through the journal."""
    calls = device(xfs_dir, "ext4")
    disk = make_disk(tmp_path / "disk.raw", SIZE, pieces=3)
    with mounted(calls.image, "ext4", tmp_path / "mounted") as point:
        (point / "work").mkdir()
        made = point / "work" / f"target.{target}"
        vmconv.sync(disk, made, target_format=target)
        subprocess.run(["sync", "-f", point], check=True)
        before = contents(made.parent)
        with disk.open("r+b") as file:
            for at in (0, MIB, SIZE - MIB):
                file.seek(at)
                file.write(random.Random(at).randbytes(65536))
        monkeypatch.setattr("vmconv.inplace.stay.Syscalls", lambda: calls)
        assert vmconv.sync(disk, made).backend == "in-place"
        after = contents(made.parent)
    calls.take()
    found = [outcome(path, "ext4", f"target.{target}", tmp_path, (before, after)) for path in calls.taken]
    judge(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_power_cut_during_an_exchange_leaves_the_old_target_or_the_new(
    xfs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where blocks are shared, a sync makes a new file: its name is that of the old one or the new one, whole."""
    taken = device(xfs_dir, kind)

    def hook(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def snapshot_first(*arguments: Any, **more: Any) -> Any:
            taken.take()
            return call(*arguments, **more)

        monkeypatch.setattr(owner, name, snapshot_first)

    disk = make_disk(tmp_path / "disk.raw", SIZE, pieces=3)
    with mounted(taken.image, kind, tmp_path / "mounted") as point:
        target = point / "target.qcow2"
        vmconv.sync(disk, target)
        subprocess.run(["sync", "-f", point], check=True)
        before = target.read_bytes()
        with disk.open("r+b") as changed:
            changed.write(random.Random(1).randbytes(65536))
        for owner, name in ((os, "fsync"), (Directory, "link_open"), (Directory, "rename"), (Directory, "sync")):
            hook(owner, name)
        assert vmconv.sync(disk, target).backend == "reflink"
        monkeypatch.undo()
        after = target.read_bytes()
        taken.take()
    found = []
    for path in taken.taken:
        with mounted(path, kind, tmp_path / "again") as point:
            content = (point / target.name).read_bytes()
        assert content in (before, after)
        found.append("before" if content == before else "after")
    judge(found)


def outcome(image: Path, kind: str, name: str, tmp_path: Path, wanted: tuple[Contents, Contents]) -> str:
    """Mounts a snapshot, recovers the file `name` that is there, and returns which of the two it is."""
    with mounted(image, kind, tmp_path / "again") as point:
        folder = point / "work"
        names = {path.name for path in folder.iterdir()}
        if names != set(wanted[1]):
            # It is mounted at another point than before, where marks do not count.
            recovery.recover(str(folder / name), trust=True)
        found = contents(folder)
    assert found in wanted, sorted(found)
    return "before" if found == wanted[0] else "after"
