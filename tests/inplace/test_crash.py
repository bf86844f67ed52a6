"""A change in place stopped anywhere is rolled back or completed.

Every single call that changes storage is a place to stop at, as a killed process and as a power cut.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.crash import RecordingCalls, Stopped, StoppingCalls, TornCalls, storages
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.inplace import BACK, SIZE, THERE, UNDOABLE, Contents, Edit, Work, contents, copied
from support.inplace_pairs import Source, Target, pairs, shifted_pairs
from support.tried import TRIED
from support.variants import QEMU_NAMES
from vmconv import api
from vmconv.errors import AccessError
from vmconv.inplace import recovery
from vmconv.inplace.syscalls import Syscalls


def make_work(pair: tuple[Source, Target], way: str, directory: Path, raw: Path) -> Work:
    source, target = pair
    (directory / "work").mkdir()
    image = source.make(make_disk(raw, SIZE, pieces=3, unit=4096), directory / "work")
    work = Work(image.parent, image.name, target.name, source, target, way)
    if way != BACK:
        return work
    work.convert(image.parent, keep_undo=True)
    return work._replace(before=target.name, after=image.name)


def works() -> Iterator[tuple[tuple[Source, Target], str]]:
    for pair in pairs():
        yield pair, THERE
        yield pair, BACK
        if pair[0].format == "raw":
            yield pair, UNDOABLE


@pytest.fixture(params=list(shifted_pairs()), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def shifted(request: pytest.FixtureRequest, ext4_dir: Path, tmp_path: Path) -> Work:
    return make_work(request.param, THERE, ext4_dir, tmp_path / "disk.raw")


@pytest.fixture(params=list(works()), ids=lambda work: f"{work[0][0]}-{work[0][1]}-{work[1]}")
def work(request: pytest.FixtureRequest, ext4_dir: Path, tmp_path: Path) -> Work:
    pair, way = request.param
    return make_work(pair, way, ext4_dir, tmp_path / "disk.raw")


EDITS: dict[str, Callable[..., object]] = {
    "rebase": lambda path, **more: api.rebase(path, "other.raw", backing_format="raw", unsafe=True, **more),
    "snapshot-create": lambda path, **more: api.snapshot(path, "create", "new", **more),
    "snapshot-delete": lambda path, **more: api.snapshot(path, "delete", "old", **more),
    "snapshot-apply": lambda path, **more: api.snapshot(path, "apply", "old", **more),
    "bitmap": lambda path, **more: api.bitmap(path, "new", ["add"], **more),
    "repair": api.repair,
}


@pytest.fixture(params=EDITS)
def verb(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[False, True], ids=["plain", "undoable"])
def edit(request: pytest.FixtureRequest, verb: str, ext4_dir: Path, qemu_img: QemuImg) -> Edit:
    """An edit of a qcow2 with a snapshot; of a damaged one for a repair."""
    (ext4_dir / "work").mkdir()
    path = ext4_dir / "work" / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "256k")
    qemu_io(path, "write -P 1 0 64k", format_name="qcow2")
    qemu_img("snapshot", "-c", "old", path)
    qemu_io(path, "write -P 2 32k 64k", format_name="qcow2")
    if verb == "repair":
        data = bytearray(path.read_bytes())
        table = int.from_bytes(data[48:56], "big")
        data[table : table + 8] = bytes(8)
        path.write_bytes(data)
    return Edit(path.parent, path.name, EDITS[verb], request.param)


@pytest.fixture
def anywhere() -> Iterator[Path]:
    """A directory for what needs no particular filesystem: where syncing costs nothing, if there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


class Finished(NamedTuple):
    """A run that was not stopped: its calls, and the directory before and after it."""

    calls: RecordingCalls
    before: Contents
    after: Contents
    commit: int
    """How many calls it takes until it is committed and that is durable."""


def finished(work: Work | Edit, directory: Path) -> Finished:
    folder = copied(work.directory, directory)
    before = contents(folder)
    calls = RecordingCalls(folder)
    work.run(calls, folder)
    after = contents(folder)
    shutil.rmtree(folder)
    journal = next(action.node for action in calls.log if action.call == "create")
    syncs = [n for n, action in enumerate(calls.log, start=1) if action.call == "sync" and action.node == journal]
    return Finished(calls, before, after, syncs[-1])


def recover(folder: Path, work: Work | Edit, calls: Syscalls | None = None, *, trust: bool = False) -> None:
    """Recovers by the name that the disk had, or by the one that it got when there is nothing left to recover.

    With `trust` what is there was made again in another directory, where marks do not count.
    """
    try:
        recovery.recover(str(folder / work.before), trust=trust, calls=calls)
    except AccessError:
        assert recovery.recover(str(folder / work.after)).forward is None


def outcome(directory: Path, run: Finished) -> str:
    """Returns "before" or "after", whatever a recovery left behind; fails when it is neither."""
    found = contents(directory)
    assert found in (run.before, run.after), sorted(found)
    return "before" if found == run.before else "after"


def stops(run: Finished) -> Iterator[tuple[int, bool]]:
    """Yields each call to stop before, and each write to stop in the middle of."""
    for at, action in enumerate(run.calls.log):
        yield at, False
        if action.call == "write":
            yield at, True


def test_a_killed_conversion_is_rolled_back_or_completed(work: Work, ext4_dir: Path) -> None:
    killed(work, ext4_dir)


def test_a_conversion_killed_while_shifting_is_rolled_back_or_completed(shifted: Work, ext4_dir: Path) -> None:
    killed(shifted, ext4_dir)


def test_a_killed_edit_is_rolled_back_or_completed(edit: Edit, ext4_dir: Path) -> None:
    killed(edit, ext4_dir)


def test_after_a_power_failure_an_edit_is_rolled_back_or_completed(edit: Edit, ext4_dir: Path, anywhere: Path) -> None:
    without_power(edit, ext4_dir, anywhere)


def test_a_torn_shift_is_finished(shifted: Work, ext4_dir: Path) -> None:
    """Torn in the middle of each shift, at several places, and once more while that is repaired."""
    run = finished(shifted, ext4_dir / "finished")
    shifts = sum(action.call in ("collapse", "insert") for action in run.calls.log)
    assert shifts
    for at in range(shifts):
        for edge, again in itertools.product((0.0, 0.3, 0.8), repeat=2):
            folder = copied(shifted.directory, ext4_dir / "torn")
            with pytest.raises(Stopped):
                shifted.run(TornCalls(at, edge), folder)
            with contextlib.suppress(Stopped):
                recover(folder, shifted, TornCalls(0, again))
            recover(folder, shifted)
            assert outcome(folder, run) == "after", (at, edge, again)
            shutil.rmtree(folder)
            TRIED["torn shifts"] += 1


def killed(work: Work | Edit, ext4_dir: Path) -> None:
    """Stops a run before each call, and in the middle of each write."""
    # In the same directory as those that are stopped: marks speak of it.
    run = finished(work, ext4_dir / "stopped")
    assert run.before != run.after
    count = 0
    for at, half in stops(run):
        folder = copied(work.directory, ext4_dir / "stopped")
        with pytest.raises(Stopped):
            work.run(StoppingCalls(at, half=half), folder)
        recover(folder, work)
        assert outcome(folder, run) == ("before" if at < run.commit - 1 else "after"), at
        shutil.rmtree(folder)
        count += 1
    TRIED["stops"] += count


def test_after_a_power_failure_a_change_is_rolled_back_or_completed(work: Work, ext4_dir: Path, anywhere: Path) -> None:
    without_power(work, ext4_dir, anywhere)


def without_power(work: Work | Edit, ext4_dir: Path, anywhere: Path) -> None:
    """Cuts the power before each call, with any part of what is pending done."""
    run = finished(work, ext4_dir / "finished")
    rng, count = random.Random(4), 0
    for number, storage in storages(run.calls):
        for there in storage.cuts(rng, 16):
            folder = anywhere / "cut"
            folder.mkdir()
            there.make(folder)
            recover(folder, work, trust=True)
            found = outcome(folder, run)
            if number < run.commit - 1 or number >= run.commit:
                assert found == ("before" if number < run.commit else "after")
            shutil.rmtree(folder)
            count += 1
    TRIED["power cuts"] += count


@pytest.mark.parametrize("way", [UNDOABLE, BACK])
def test_a_recovery_that_is_stopped_can_be_done_again(ext4_dir: Path, tmp_path: Path, anywhere: Path, way: str) -> None:
    """Stopped at each call of the recovery from a stop at each call, killed and without power."""
    pair = next(pair for pair in pairs() if str(pair[1]) == "vmdk-monolithicFlat")
    work = make_work(pair, way, ext4_dir, tmp_path / "disk.raw")
    run = finished(work, ext4_dir / "finished")
    rng, count = random.Random(5), 0
    for _, storage in storages(run.calls):
        stopped = anywhere / "stopped"
        stopped.mkdir()
        every = [action for actions in storage.pending.values() for action in actions]
        storage.after(every).make(stopped)
        again = copied(stopped, anywhere / "again")
        calls = RecordingCalls(again)
        recover(again, work, calls, trust=True)
        wanted = outcome(again, run)
        for _, second in storages(calls):
            for there in second.cuts(rng, 8):
                folder = anywhere / "cut"
                folder.mkdir()
                there.make(folder)
                recover(folder, work, trust=True)
                assert outcome(folder, run) == wanted
                shutil.rmtree(folder)
                count += 1
        shutil.rmtree(stopped)
        shutil.rmtree(again)
    TRIED["power cuts"] += count


@pytest.mark.slow
def test_a_larger_disk_is_rolled_back_or_completed(ext4_dir: Path, tmp_path: Path) -> None:
    """Stopped at some of the calls, in the middle of writes where it is one."""
    (ext4_dir / "work").mkdir()
    raw = make_disk(tmp_path / "disk.raw", 512 * MIB, pieces=150, unit=1 << 16)
    disk = ext4_dir / "work" / "disk.raw"
    subprocess.run(["cp", "--sparse=always", raw, disk], check=True)
    source, target = next(pair for pair in pairs() if str(pair[1]) == "qcow2")
    work = Work(disk.parent, disk.name, target.name, source, target, UNDOABLE)
    run = finished(work, ext4_dir / "stopped")
    for at, half in random.Random(7).sample(list(stops(run)), 8):
        folder = copied(work.directory, ext4_dir / "stopped")
        with pytest.raises(Stopped):
            work.run(StoppingCalls(at, half=half), folder)
        recover(folder, work)
        assert outcome(folder, run) == ("before" if at < run.commit - 1 else "after"), at
        shutil.rmtree(folder)
        TRIED["stops"] += 1


@pytest.mark.parametrize("pair", list(pairs()), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_the_finished_conversion_is_the_disk(
    pair: tuple[Source, Target], ext4_dir: Path, tmp_path: Path, qemu_img: QemuImg
) -> None:
    """What all the others are compared with is right: for vmconv, and for QEMU."""
    raw = tmp_path / "disk.raw"
    work = make_work(pair, UNDOABLE, ext4_dir, raw)
    before, image = contents(work.directory), work.directory / work.after
    work.convert(work.directory, keep_undo=True)
    kind = QEMU_NAMES.get(work.target.format, work.target.format)
    assert api.compare(str(raw), str(image), right_format=work.target.format)
    qemu_img("compare", "-f", "raw", "-F", kind, raw, image)
    if kind in ("qcow2", "vmdk"):
        qemu_img("check", "-f", kind, image)
    api.undo(str(image))
    assert contents(work.directory) == before
