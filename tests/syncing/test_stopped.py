"""A sync stopped anywhere leaves the old target or the new one, and the next sync finishes the work."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vmconv
from support.crash import KILLED, RecordingCalls, failing_at, in_child, killed_at, storages
from support.disks import MIB, QemuImg, make_disk
from support.mounts import Mounts
from support.tried import TRIED
from support.variants import QEMU_NAMES
from vmconv.inplace import recovery
from vmconv.inplace.syscalls import Syscalls

SIZE = 6 * MIB


class Work(NamedTuple):
    """A target that is behind its source: the states of its directory before and after."""

    source: Path
    directory: Path
    format: str

    @property
    def target(self) -> Path:
        return self.directory / "target.img"

    def calls(self) -> int:
        """Returns the number of calls of a sync that change storage."""
        self.again()
        made = mmap.mmap(-1, 8)

        def reached(number: int) -> None:
            made[:8] = (number + 1).to_bytes(8, "little")

        assert in_child(self.run, reached) == 0
        return int.from_bytes(made[:8], "little")

    def run(self) -> None:
        vmconv.sync(self.source, self.target, target_format=self.format, force=True)

    def again(self) -> None:
        """Makes the directory as it is before the sync."""
        template = self.directory.with_name("template.img")
        if not template.exists():
            vmconv.sync(self.source.with_name("old.raw"), template, target_format=self.format)
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        shutil.copy2(template, self.target)


@pytest.fixture
def work(mounts: Mounts, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Work]:
    """A target on the filesystem that the test asks for; the source is elsewhere, or on the same."""
    kind, format_name, same = request.param
    root = mounts.get(kind) / "stopped"
    root.mkdir()
    old = make_disk((root if same else tmp_path) / "old.raw", SIZE, pieces=6, unit=65536)
    source = old.with_name("disk.raw")
    data = bytearray(old.read_bytes())
    for at in (MIB, 3 * MIB + 65536):
        data[at : at + 65536] = random.Random(at).randbytes(65536)
    data[5 * MIB : 5 * MIB + 262144] = bytes(262144)
    source.write_bytes(data)
    (root / "work").mkdir()
    made = Work(source, root / "work", format_name)
    made.again()
    yield made
    shutil.rmtree(root)


def which(work: Work, qemu_img: QemuImg) -> str:
    """Returns "old" or "new", the disk that QEMU sees in the target; fails if it is neither."""
    back = work.directory.with_name("back.raw")
    qemu_img("convert", "-f", QEMU_NAMES.get(work.format, work.format), "-O", "raw", work.target, back)
    found = back.read_bytes()[:SIZE]
    return "new" if found == work.source.read_bytes() else "old" if found == old_of(work) else "another"


def old_of(work: Work) -> bytes:
    return work.source.with_name("old.raw").read_bytes()


WAYS = [
    ("xfs", "qcow2", True),
    ("xfs", "vmdk", False),
    ("ext4", "qcow2", False),
    ("ext4", "vmdk", False),
    ("ext4", "parallels", False),
    ("ext4", "raw", False),
    ("ext4", "vdi", False),
]


def title(way: tuple[str, str, bool]) -> str:
    return f"{way[0]}-{way[1]}-{'same' if way[2] else 'across'}"


@pytest.mark.slow
@pytest.mark.parametrize("work", WAYS, ids=title, indirect=True)
def test_a_sync_that_is_killed_leaves_a_whole_disk(work: Work, qemu_img: QemuImg) -> None:
    assert stopped(work, qemu_img, killed_at) == {"old", "new"}


@pytest.mark.slow
@pytest.mark.parametrize("work", [WAYS[0], WAYS[2], WAYS[5]], ids=title, indirect=True)
def test_a_sync_whose_storage_fails_leaves_a_whole_disk(work: Work, qemu_img: QemuImg) -> None:
    assert "old" in stopped(work, qemu_img, failing_at)


def stopped(work: Work, qemu_img: QemuImg, stop: Callable[[int], Callable[[int], None]]) -> set[str]:
    """Stops a sync at each call that changes storage; returns which disks were there afterwards."""
    seen = set()
    calls = work.calls()
    for number in range(calls):
        work.again()
        assert in_child(work.run, stop(number)) in (0, 1, KILLED)
        if not work.target.exists():
            assert recovery.recover(str(work.target)).forward is not None, number
        found = which(work, qemu_img)
        assert found != "another", number
        seen.add(found)
        work.run()
        assert which(work, qemu_img) == "new"
        assert [path.name for path in work.directory.iterdir()] == ["target.img"], number
        TRIED["stops of a sync"] += 1
    return seen


# -- power cuts, by the model of storage


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("work", [way for way in WAYS if way[0] == "ext4"], ids=lambda way: way[1], indirect=True)
def test_a_power_cut_leaves_the_old_target_or_the_new(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(work.directory)
    calls = RecordingCalls(work.directory)
    monkeypatch.setattr("vmconv.inplace.stay.Syscalls", lambda: calls)
    work.run()
    after = digest(work.directory)
    assert before != after
    monkeypatch.undo()
    rng, found = random.Random(3), set()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for number, (_, storage) in enumerate(storages(calls)):
            for cut in storage.cuts(rng, 12):
                folder = Path(scratch) / "cut"
                folder.mkdir()
                cut.make(folder)
                recovery.recover(str(folder / "target.img"), trust=True, calls=Syscalls())
                left = digest(folder)
                assert left in (before, after), number
                found.add("before" if left == before else "after")
                shutil.rmtree(folder)
                TRIED["power cuts of a sync"] += 1
    assert found == {"before", "after"}
    assert os.path.exists(work.target)
