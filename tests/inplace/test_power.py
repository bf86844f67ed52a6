"""Power cuts on real filesystems: what was on the block device at each call is mounted again, and recovered.

The filesystem lies in a file on XFS; a snapshot of that file, a reflink, is the block device as it was at that moment.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.crash import OTHERS
from support.disks import MIB, make_disk
from support.inplace import SIZE, THERE, UNDOABLE, Contents, Work, contents
from support.inplace_pairs import Source, Target
from support.tried import TRIED
from vmconv.inplace import recovery
from vmconv.inplace.strategies import Share, Unsuitable
from vmconv.inplace.syscalls import Syscalls

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
    image = xfs_dir / "device.img"
    with image.open("wb") as file:
        file.truncate(SPACE)
    subprocess.run([*MAKE[kind], image], check=True)
    snapshots = xfs_dir / "snapshots"
    snapshots.mkdir()
    calls = SnapshotCalls(image, snapshots)
    with mounted(image, kind, tmp_path / "mounted") as point:
        (point / "work").mkdir()
        disk = source.make(make_disk(tmp_path / "disk.raw", SIZE, pieces=3), point / "work")
        work = Work(disk.parent, disk.name, target.name, source, target, way)
        subprocess.run(["sync", "-f", point], check=True)
        before = contents(work.directory)
        work.run(calls, work.directory)
        after = contents(work.directory)
    calls.take()
    found = [outcome(path, kind, work, tmp_path, (before, after)) for path in calls.taken]
    assert found == sorted(found, reverse=True)
    assert set(found) == {"before", "after"}
    TRIED["power cuts on real filesystems"] += len(found)


def outcome(image: Path, kind: str, work: Work, tmp_path: Path, wanted: tuple[Contents, Contents]) -> str:
    """Mounts a snapshot, recovers what is there, and returns which of the two it is."""
    with mounted(image, kind, tmp_path / "again") as point:
        folder = point / "work"
        names = {path.name for path in folder.iterdir()}
        if names != set(wanted[1]):
            # It is mounted at another point than before, where marks do not count.
            recovery.recover(str(folder / work.before), trust=True)
        found = contents(folder)
    assert found in wanted, sorted(found)
    return "before" if found == wanted[0] else "after"
