"""What a change in place does, call by call: its order, what it refuses, and which bytes stay (`vmconv.inplace`)."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sources import A
from vmconv.conversion.planner import plan_layout
from vmconv.errors import AccessError, BackendError, PlanError
from vmconv.inplace import change, space
from vmconv.inplace import moves as shifting
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal, Leftover
from vmconv.inplace.names import JOURNAL, WORKING, beside
from vmconv.inplace.syscalls import Syscalls
from vmconv.interface.backend import Congruence, Survey
from vmconv.io import ownership
from vmconv.io.directory import Directory
from vmconv.model.extents import Extents, Kind
from vmconv.model.layout import Layout, OutFile
from vmconv.model.plan import Action, FilePlan
from vmconv.model.sources import Blob
from vmconv.system import linux
from vmconv.testing.memory import MemoryFile

BEFORE = b"0123456789abcdef"
quick = settings(deadline=None, max_examples=100)


def ranges(*rows: tuple[int, ...]) -> Any:
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(rows[0]) if rows else 2)


class Noting(Syscalls):
    """Notes what is called, and fails before call number `at`."""

    def __init__(self, at: int = -1, number: int = errno.EIO) -> None:
        self.log: list[tuple[object, ...]] = []
        self.at = at
        self.number = number

    def _note(self, *what: object) -> None:
        if len(self.log) == self.at:
            raise OSError(self.number, os.strerror(self.number), "somewhere")
        self.log.append(what)

    def create(self, directory: Directory, name: str) -> int:
        self._note("create", name)
        return super().create(directory, name)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._note("write", bytes(data)[:20], offset)
        super().write(descriptor, data, offset)

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        self._note("punch", offset, length)
        os.pwrite(descriptor, bytes(length), offset)

    def truncate(self, descriptor: int, size: int) -> None:
        self._note("truncate", size)
        super().truncate(descriptor, size)

    def set_times(self, descriptor: int, mtime: int) -> None:
        self._note("set_times", mtime)
        super().set_times(descriptor, mtime)

    def sync(self, descriptor: int) -> None:
        self._note("sync")

    def rename(self, directory: Directory, old: str, new: str, *, replace: bool) -> None:
        self._note("rename", old, new, replace)
        super().rename(directory, old, new, replace=replace)

    def unlink(self, directory: Directory, name: str) -> None:
        self._note("unlink", name)
        super().unlink(directory, name)

    def sync_directory(self, directory: Directory) -> None:
        self._note("sync_directory")


class FailingOnce(Noting):
    """Whose next sync fails, and later ones do not."""

    fails = False

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        if self.fails:
            self.fails = False
            raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    (tmp_path / "disk").write_bytes(BEFORE)
    (tmp_path / "gone").write_bytes(b"extent")
    os.utime(tmp_path / "disk", ns=(5, 7))
    with Directory.at(str(tmp_path)) as found:
        yield found


ENTRY, WORK, MADE = beside("disk", JOURNAL), beside("disk", WORKING), beside("extra", WORKING)


def begun(directory: Directory, calls: Syscalls | None = None, **fields: Any) -> Change:
    place = Path(directory.path)
    given: dict[str, Any] = {
        "old_size": 16,
        "new_size": 20,
        "old_mtime": 7,
        "saved": ranges((0, 2), (4, 3)),
        "old": b"01456",
        "holes": ranges((8, 2)),
        "dead": ranges((10, 2), (14, 1)),
        "later": ranges((1, 1), (18, 2)),
        "new": b"XYZ",
        "made": ("extra",),
        "leftovers": (Leftover.of("gone", (place / "gone").stat()),),
        "mtime": 99,
    }
    descriptor = os.open(place / "disk", os.O_RDWR)
    return Change(directory, Journal("disk", "new", **{**given, **fields}), calls or Noting(), descriptor)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_nothing_is_written_before_the_journal_is_durable(tmp_path: Path, directory: Directory) -> None:
    calls = Noting()
    one = begun(directory, calls)
    one.begin()
    steps = [step[0] for step in calls.log]
    assert steps == ["create", "write", "sync", "sync_directory", "rename", "sync_directory"]
    assert calls.log[0] == ("create", ENTRY)
    assert calls.log[4] == ("rename", "disk", WORK, False)
    assert names(tmp_path) == sorted([ENTRY, WORK, "gone"])
    assert not one.committed
    descriptor = os.open(tmp_path / ENTRY, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    one.close()
    assert one.record == -1
    assert (one.source, one.target) == (str(tmp_path / "disk"), str(tmp_path / "new"))


def test_a_committed_change_is_finished(tmp_path: Path, directory: Directory) -> None:
    calls = Noting()
    one = begun(directory, calls)
    one.begin()
    os.close(one.make("extra"))
    record = one.record
    calls.log.clear()
    one.complete()
    assert one.committed
    assert calls.log[:3] == [("sync_directory",), ("write", one._commit_record[:20], one._commit_offset), ("sync",)]
    assert calls.log[3:] == [
        ("truncate", 20),
        ("write", b"X", 1),
        ("write", b"YZ", 18),
        ("punch", 10, 2),
        ("punch", 14, 1),
        ("set_times", 99),
        ("sync",),
        ("rename", MADE, "extra", False),
        ("rename", WORK, "new", False),
        ("unlink", "gone"),
        ("sync_directory",),
        ("unlink", ENTRY),
        ("sync_directory",),
    ]
    assert names(tmp_path) == ["extra", "new"]
    assert (tmp_path / "new").read_bytes() == b"0X23456789\0\0cd\0f\0\0YZ"
    assert (tmp_path / "new").stat().st_mtime_ns == 99
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(record)
    one.give_up()
    assert names(tmp_path) == ["extra", "new"]


def test_requests_for_missing_records_are_refused(tmp_path: Path, directory: Directory) -> None:
    calls = Noting()
    one = begun(directory, calls, made=(), mtime=None, leftovers=())
    one.begin()
    calls.log.clear()
    one.complete()
    assert [step[0] for step in calls.log[:2]] == ["write", "sync"]
    assert not any(step[0] == "set_times" for step in calls.log)
    assert names(tmp_path) == ["gone", "new"]


def test_an_aborted_change_is_rolled_back(tmp_path: Path, directory: Directory) -> None:
    calls = Noting()
    one = begun(directory, calls)
    one.begin()
    os.close(one.make("extra"))
    os.pwrite(one.descriptor, b"?" * 2, 0)
    os.pwrite(one.descriptor, b"?" * 3, 4)
    os.ftruncate(one.descriptor, 40)
    calls.log.clear()
    one.give_up()
    assert calls.log == [
        ("write", b"01", 0),
        ("write", b"456", 4),
        ("punch", 8, 2),
        ("truncate", 16),
        ("set_times", 7),
        ("sync",),
        ("rename", WORK, "disk", False),
        ("unlink", MADE),
        ("sync_directory",),
        ("unlink", ENTRY),
        ("sync_directory",),
    ]
    assert names(tmp_path) == ["disk", "gone"]
    assert (tmp_path / "disk").read_bytes() == b"01234567\0\0abcdef"
    assert one.record == -1


def test_a_change_that_never_began_is_not_rolled_back(tmp_path: Path, directory: Directory) -> None:
    calls = Noting()
    begun(directory, calls).give_up()
    assert (calls.log, names(tmp_path)) == ([], ["disk", "gone"])


@pytest.mark.parametrize("name", [ENTRY, WORK, MADE])
def test_names_in_between_are_not_taken(tmp_path: Path, directory: Directory, name: str) -> None:
    (tmp_path / name).write_bytes(b"somebody's")
    calls = Noting()
    with pytest.raises(PlanError, match="is in the way of a change in place"):
        begun(directory, calls).begin()
    assert (calls.log, (tmp_path / name).read_bytes()) == ([], b"somebody's")


def test_a_journal_is_not_larger_than_one_that_is_read(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = begun(directory)
    size = len(one.journal.encode(lambda _digest: bytes(32)))
    monkeypatch.setattr(change, "MAX_SIZE", size - 1)
    with pytest.raises(PlanError, match=f"{size} bytes would be overwritten, {size - 1} at most"):
        one.begin()
    assert names(tmp_path) == ["disk", "gone"]
    monkeypatch.setattr(change, "MAX_SIZE", size)
    one.begin()
    one.close()


def test_a_journal_that_somebody_removed_is_not_used(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def locked(descriptor: int, how: int) -> None:
        (tmp_path / ENTRY).unlink(missing_ok=True)
        real(descriptor, how)

    one = begun(directory)
    monkeypatch.setattr(fcntl, "flock", locked)
    with pytest.raises(BackendError, match="was being recovered by another process"):
        one.begin()
    assert (one.record, names(tmp_path)) == (-1, ["disk", "gone"])


@pytest.mark.parametrize(("after", "now"), [(3, "new"), (11, "new"), (12, "new")])
def test_failed_storage_after_the_commit_reports_where_the_disk_is(
    tmp_path: Path, directory: Directory, after: int, now: str
) -> None:
    calls = Noting()
    one = begun(directory, calls)
    one.begin()
    os.close(one.make("extra"))
    calls.at = len(calls.log) + after
    with pytest.raises(BackendError, match="the change is committed and not complete: somewhere: ") as caught:
        one.complete()
    assert one.committed
    where = WORK if after in {3, 11} else now
    assert f"the disk is {tmp_path / where} now" in str(caught.value)
    one.give_up()
    again = begun_again(directory, one)
    again.finish()
    assert names(tmp_path) == ["extra", "new"]


def begun_again(directory: Directory, one: Change) -> Change:
    return Change(directory, one.journal, Noting(), one.descriptor)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_failed_storage_during_rollback_reports_where_the_disk_is(
    tmp_path: Path, directory: Directory, number: int
) -> None:
    calls = Noting(number=number)
    one = begun(directory, calls)
    one.begin()
    calls.at = len(calls.log)
    with pytest.raises(BackendError, match="cannot be rolled back: somewhere: ") as caught:
        one.give_up()
    assert f"the disk is {tmp_path / WORK} now" in str(caught.value)
    assert one.record == -1
    begun_again(directory, one).roll_back()
    assert names(tmp_path) == ["disk", "gone"]


def not_committed(directory: Directory) -> tuple[Change, Noting]:
    """Returns a change whose commit has failed, and its calls, which fail from then on."""
    calls = Noting()
    one = begun(directory, calls)
    one.begin()
    calls.at = len(calls.log) + 2
    with pytest.raises(BackendError, match="cannot be committed"):
        one.complete()
    return one, calls


def test_before_the_commit_an_error_is_not_one_after_it(tmp_path: Path, directory: Directory) -> None:
    one, calls = not_committed(directory)
    assert not one.committed
    calls.at = -1
    one.give_up()
    assert names(tmp_path) == ["disk", "gone"]


def test_a_commit_that_may_have_reached_storage_is_withdrawn_first(tmp_path: Path, directory: Directory) -> None:
    one, _calls = not_committed(directory)
    # The record is in the file, and the storage takes nothing: recovery has to decide, so nothing is rolled back.
    with pytest.raises(BackendError, match="cannot be rolled back"):
        one.give_up()
    assert names(tmp_path) == sorted([ENTRY, WORK, "gone"])


def test_a_failed_commit_leaves_no_record_for_recovery(tmp_path: Path, directory: Directory) -> None:
    calls = FailingOnce()
    one = begun(directory, calls)
    one.begin()
    calls.log.clear()
    calls.fails = True
    with pytest.raises(BackendError, match="cannot be committed"):
        one.complete()
    assert calls.log[-2:] == [("truncate", one._commit_offset), ("sync",)]
    # As if the process ended here: recovery finds a journal that is not committed.
    assert (tmp_path / ENTRY).stat().st_size == one._commit_offset
    one.give_up()
    assert names(tmp_path) == ["disk", "gone"]


@pytest.mark.parametrize("replace", [True, False])
def test_a_name_that_appeared_is_replaced_only_on_request(tmp_path: Path, directory: Directory, replace: bool) -> None:
    one = begun(directory, replace=replace)
    one.begin()
    (tmp_path / "new").write_bytes(b"somebody's")
    if replace:
        one.complete()
        assert (tmp_path / "new").read_bytes()[:2] == b"0X"
        return
    with pytest.raises(BackendError, match="new: was created during the change, which is committed; the disk is"):
        one.complete()
    assert (tmp_path / "new").read_bytes() == b"somebody's"
    one.close()


def test_a_source_that_appeared_is_kept(tmp_path: Path, directory: Directory) -> None:
    one = begun(directory)
    one.begin()
    (tmp_path / "disk").write_bytes(b"somebody's")
    with pytest.raises(BackendError, match="disk: was created during"):
        one.give_up()
    assert (tmp_path / "disk").read_bytes() == b"somebody's"


def exchanged(place: Path, name: str) -> None:
    (place / name).rename(place / "kept")
    (place / name).write_bytes(b"somebody's")


def test_an_exchanged_file_gets_no_name(tmp_path: Path, directory: Directory) -> None:
    one = begun(directory)
    one.begin()
    exchanged(tmp_path, WORK)
    with pytest.raises(BackendError, match="is not the file that vmconv made"):
        one.complete()
    assert not (tmp_path / "new").exists()
    one.close()


@pytest.mark.parametrize("own", [0, 1, 2, None])
def test_files_of_a_change_are_its_owner_s_or_this_user_s(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, own: int | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    os.chown(tmp_path / "gone", 1, 1)
    one = begun(directory, owner=own)
    status = (tmp_path / "gone").stat()
    if own in (1, None):
        one._refuse_foreign("gone", status)
    else:
        with pytest.raises(BackendError, match="another process replaced it"):
            one._refuse_foreign("gone", status)
    one._refuse_foreign("disk", (tmp_path / "disk").stat())
    with pytest.raises(BackendError):
        one._refuse_foreign("disk", os.stat(tmp_path))
    one._remove(one.journal.leftovers[0])
    assert (tmp_path / "gone").exists() == (own not in (1, None))


@pytest.mark.parametrize("changed", ["size", "mtime", "gone"])
def test_only_unchanged_files_are_removed_with_the_source(tmp_path: Path, directory: Directory, changed: str) -> None:
    one = begun(directory)
    gone = tmp_path / "gone"
    time = gone.stat().st_mtime_ns
    if changed == "size":
        gone.write_bytes(b"longer than before")
        os.utime(gone, ns=(time, time))
    elif changed == "mtime":
        os.utime(gone, ns=(time, time + 1))
    else:
        gone.unlink()
    one._remove(one.journal.leftovers[0])
    assert gone.exists() == (changed != "gone")


@pytest.mark.parametrize("how", ["untouched", "size", "mtime", "gone"])
def test_a_file_that_never_had_its_working_name_must_be_as_it_was(
    tmp_path: Path, directory: Directory, how: str
) -> None:
    one = begun(directory)
    disk = tmp_path / "disk"
    if how == "size":
        os.truncate(disk, 17)
        os.utime(disk, ns=(7, 7))
    elif how == "mtime":
        os.utime(disk, ns=(7, 8))
    elif how == "gone":
        disk.unlink()
    if how == "untouched":
        one.roll_back()
        assert disk.read_bytes() == BEFORE
    else:
        with pytest.raises(BackendError, match="is not the file of the interrupted change"):
            one.roll_back()


def test_a_missing_committed_file_is_reported_as_lost(tmp_path: Path, directory: Directory) -> None:
    one = begun(directory)
    with pytest.raises(BackendError, match=f"{WORK}: is not the file of the interrupted"):
        one.finish()
    (tmp_path / "disk").rename(tmp_path / "new")
    one.finish()
    assert (tmp_path / "new").read_bytes() == BEFORE
    (tmp_path / "new").unlink()
    assert one._whereabouts() == f"{tmp_path / WORK} and {tmp_path / 'disk'} cannot be examined"


def test_a_change_that_carries_nothing_only_names_and_removes(tmp_path: Path, directory: Directory) -> None:
    calls = Noting()
    one = begun(directory, calls, carried=False, made=("extra", "new"))
    one.begin()
    assert names(tmp_path) == sorted([ENTRY, "disk", "gone"])
    for name in ("extra", "new"):
        os.close(one.make(name))
    assert one._whereabouts() == f"the disk is {tmp_path / 'disk'} now"
    calls.log.clear()
    one.complete()
    assert [step[0] for step in calls.log] == [
        "sync_directory",
        "write",
        "sync",
        "rename",
        "rename",
        "unlink",
        "sync_directory",
        "unlink",
        "sync_directory",
    ]
    assert names(tmp_path) == ["disk", "extra", "new"]


def test_errors_name_their_file() -> None:
    assert change._where(OSError(5, "x", "a")) == "a: "
    assert change._where(OSError(5, "x", "a", None, "b")) == "b: "
    assert change._where(OSError(5, "x", 7)) == change._where(OSError(5, "x")) == ""


# -- which bytes stay


@quick
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=9))
def test_joined_ranges_are_the_same_bytes_in_fewer_rows(rows: list[tuple[int, bool]]) -> None:
    at, start, length = 0, [], []
    for step, gap in rows:
        at += 3 * gap
        start.append(at)
        length.append(step)
        at += step
    found = space._joined(np.array(start, dtype=np.int64), np.array(length, dtype=np.int64))
    assert found.shape == (len(found), 2)
    wanted = {byte for low, count in zip(start, length, strict=True) for byte in range(low, low + count)}
    assert [byte for low, count in found.tolist() for byte in range(low, low + count)] == sorted(wanted)
    assert (found[1:, 0] > found[:-1].sum(axis=1)).all()


@quick
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=5), st.integers(0, 50), st.integers(0, 50))
def test_clipped_ranges_are_the_bytes_in_between(rows: list[tuple[int, int]], low: int, more: int) -> None:
    found = space.clipped(ranges(*rows), low, low + more)
    wanted = [byte for begin, length in rows for byte in range(begin, begin + length) if low <= byte < low + more]
    assert [byte for begin, length in found.tolist() for byte in range(begin, begin + length)] == wanted
    assert (found[:, 1] > 0).all()


@quick
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=5), st.integers(1, 9))
def test_whole_blocks_are_the_blocks_inside(rows: list[tuple[int, int]], block: int) -> None:
    found = space._whole(ranges(*rows), block)
    wanted = [
        byte
        for begin, length in rows
        for byte in range(begin, begin + length)
        if begin <= byte // block * block and (byte // block + 1) * block <= begin + length
    ]
    assert [byte for begin, length in found.tolist() for byte in range(begin, begin + length)] == wanted


def plan_of(table: Extents, *, slack: bool = False, unit: int = 0) -> FilePlan:
    layout = Layout((OutFile(table, slack=slack),))
    return plan_layout(layout, "new", "/", "in-place", Survey(unit, {})).files[0]


def table_of(size: int, *rows: tuple[int, Any, int]) -> Extents:
    return Extents.of([(at, Kind.DATA if source else Kind.ZERO, source, offset) for at, source, offset in rows], size)


def carrier_of(size: int, *holes: tuple[int, int]) -> MemoryFile:
    """Returns a file that has these holes, `(begin, end)`."""
    file = MemoryFile("carrier", size)
    data, at = [], 0
    for begin, end in holes:
        data += [(at, begin)] if begin > at else []
        at = end
    data += [(at, size)] if size > at else []
    file.data_ranges = lambda *_arguments: data  # type: ignore[method-assign]
    return file


def test_dead_ranges_take_space_and_are_nothing() -> None:
    carrier = carrier_of(100, (30, 40), (70, 80))
    table = table_of(90, (0, Blob("header", bytes(10)), 0), (10, None, 0), (35, carrier, 35), (60, None, 0))
    found = space.dead_ranges(plan_of(table), carrier, 8)
    assert found.tolist() == [[10, 20], [60, 10], [80, 10]]
    slack = space.dead_ranges(plan_of(table, slack=True), carrier, 8)
    assert slack.tolist() == [[16, 8], [80, 8]]
    assert space.unused(plan_of(table), 8).tolist() == [[16, 16], [64, 24]]
    assert space.written(plan_of(table), Action.WRITE).tolist() == [[0, 10]]
    assert space.written(plan_of(table), Action.WRITE, Action.SHARE).tolist() == [[0, 10], [35, 25]]


def test_behind_the_end_of_the_file_space_is_dead_too() -> None:
    carrier = carrier_of(20)
    table = table_of(64, (0, carrier, 0), (12, None, 0), (50, A, 0))
    assert space.dead_ranges(plan_of(table), carrier, 8).tolist() == [[12, 8]]
    assert space.dead_ranges(plan_of(table, slack=True), carrier, 8).tolist() == [[16, 32]]


def test_the_carried_file_is_the_one_with_the_payload() -> None:
    carrier, other = carrier_of(20), carrier_of(20)
    one, two = (OutFile(table_of(20, (0, each, 0)), name) for each, name in ((carrier, "one"), (other, "two")))
    plan = plan_layout(Layout((one, two)), "new", "/", "in-place", Survey(1, {}, Congruence.EQUAL))
    assert space.carrier_plan(plan, carrier).name == "one"
    assert space.carrier_plan(plan, other).name == "two"
    assert space.carrier_plan(plan, carrier_of(5)).name == "two"


# -- shifting


@quick
@given(st.data())
def test_overlaps_are_the_common_bytes(data: st.DataObject) -> None:
    def drawn(*, sorted_apart: bool) -> Any:
        at, rows = 0, []
        for _ in range(data.draw(st.integers(0, 5))):
            at = at + data.draw(st.integers(0, 6)) if sorted_apart else data.draw(st.integers(0, 40))
            length = data.draw(st.integers(1, 9))
            rows.append((at, length))
            at += length
        return ranges(*rows)

    mine, others = drawn(sorted_apart=False), drawn(sorted_apart=True)
    found = zip(*shifting._overlaps(mine[:, 0], mine[:, 1], others[:, 0], others[:, 1]), strict=True)
    pairs = sorted((int(a), int(b), byte) for a, b, low, count in found for byte in range(low, low + count))
    assert pairs == sorted(
        (a, b, byte)
        for a, (low, length) in enumerate(mine.tolist())
        for b, (start, size) in enumerate(others.tolist())
        for byte in range(max(low, start), min(low + length, start + size))
    )


class Shifted(Syscalls):
    """A file as its blocks: which place on storage each has, -1 for a hole."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.made: list[str] = []

    def now(self) -> Any:
        return ranges(*((at * 4, 4, place * 4) for at, place in enumerate(self.blocks) if place >= 0)).reshape(-1, 3)

    def punch(self, _descriptor: int, offset: int, length: int) -> None:
        assert offset % 4 == length % 4 == 0 < length
        self.made.append("punch")
        self.blocks[offset // 4 : (offset + length) // 4] = [-1] * (length // 4)

    def collapse(self, _descriptor: int, offset: int, length: int) -> None:
        assert offset % 4 == length % 4 == 0 < length
        self.made.append("collapse")
        del self.blocks[offset // 4 : (offset + length) // 4]

    def insert(self, _descriptor: int, offset: int, length: int) -> None:
        assert offset % 4 == length % 4 == 0 < length
        self.made.append("insert")
        self.blocks[offset // 4 : offset // 4] = [-1] * (length // 4)


@quick
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 3)), max_size=5), st.integers(0, 4))
def test_payload_is_shifted_to_where_it_belongs(rows: list[tuple[int, int, int]], tail: int) -> None:
    """`rows` are the foreign blocks before each piece, its blocks, and the zero blocks before it in the output."""
    blocks: list[int] = []
    pieces: list[tuple[int, int, int]] = []
    place, at = 500, 0
    wanted: list[int] = []
    for number, (before, count, gap) in enumerate(rows):
        blocks += [100 + len(blocks) + n for n in range(before)]
        # Pieces lie on storage in another order than in the file.
        place = 500 + (number * 37) % 101 * 10
        blocks += range(place, place + count)
        wanted += [-1] * gap + list(range(place, place + count))
        at += gap
        pieces.append((place * 4, count * 4 - (number == len(rows) - 1), at * 4))
        at += count
    # What follows lies behind the last piece on storage too.
    blocks += [(blocks[-1] if rows else 900000) + 1 + n for n in range(tail)]
    calls = Shifted(blocks)
    sorted_pieces = ranges(*sorted(pieces)).reshape(-1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifting, "_current_extents", lambda _descriptor: calls.now())
        patch.setattr(os, "fstatvfs", lambda _descriptor: type("", (), {"f_bsize": 4}))
        shifting.shift(-1, sorted_pieces, calls)
        assert calls.blocks[: len(wanted)] == wanted
        assert set(calls.blocks[len(wanted) :]) <= {-1}
        calls.made.clear()
        shifting.shift(-1, sorted_pieces, calls)
        assert calls.made == []
        if pieces:
            patch.setattr(calls, "insert", lambda *_arguments: None)
            patch.setattr(calls, "collapse", lambda *_arguments: None)
            calls.blocks.insert(0, -1)
            with pytest.raises(BackendError, match="payload is not at its new offsets"):
                shifting.shift(-1, sorted_pieces, calls)
            calls.made.clear()
            lost = max(n for n, block in enumerate(calls.blocks) if block == max(wanted))
            calls.blocks[lost] = 900001
            with pytest.raises(BackendError, match="4 bytes of payload are not at the physical addresses"):
                shifting.shift(-1, sorted_pieces, calls)
            assert calls.made == []


@pytest.mark.parametrize(
    ("rows", "size", "behind", "right"),
    [
        ([(8, 8, 16), (20, 4, 24)], 32, b"x", True),
        ([(8, 8, 16), (20, 3, 24)], 27, b"x", True),
        ([(8, 8, 16), (20, 3, 24)], 28, b"x", False),
        ([(8, 8, 16), (20, 3, 24)], 28, b"\0x", True),
        ([(8, 8, 16), (60, 3, 24)], 28, b"\0", True),
        ([(9, 8, 16)], 24, b"", False),
        ([(8, 8, 17)], 25, b"", False),
        ([(8, 7, 16), (20, 4, 24)], 28, b"", False),
        ([], 8, b"", True),
    ],
)
def test_payload_is_whole_blocks(rows: list[tuple[int, int, int]], size: int, behind: bytes, right: bool) -> None:
    """`behind` is what the file has behind the last piece, which moves with it."""
    carrier = carrier_of(64)
    if rows:
        carrier.write(rows[-1][0] + rows[-1][1], behind)
    parts: list[tuple[int, Any, int]] = [(0, None, 0)]
    for offset, length, at in rows:
        parts = [part for part in parts if part[0] != at]
        parts += [(at, carrier, offset), *([(at + length, None, 0)] if at + length < size else [])]
    main = plan_of(table_of(size, *parts))
    found = shifting._rows(main, carrier)
    assert found.tolist() == [list(row) for row in rows]
    if right:
        shifting._refuse_torn_blocks(found, main, carrier, 4)
    else:
        with pytest.raises(PlanError, match="it is not whole blocks of 4 bytes"):
            shifting._refuse_torn_blocks(found, main, carrier, 4)


@pytest.mark.parametrize(
    ("rows", "extents", "wanted"),
    [
        ([(0, 8, 20)], [(0, 4, 100), (4, 8, 50)], [[50, 4, 24], [100, 4, 20]]),
        ([(2, 4, 20)], [(0, 4, 100)], [[102, 2, 20]]),
        ([(0, 8, 20), (8, 8, 40)], [(0, 16, 100)], [[100, 8, 20], [108, 8, 40]]),
        ([(0, 8, 20)], [(0, 4, 100), (4, 4, 100)], None),
        ([(0, 8, 20)], [(0, 4, 100), (4, 4, 103)], None),
    ],
)
def test_payload_has_a_place_on_storage(rows: Any, extents: Any, wanted: list[list[int]] | None) -> None:
    if wanted is None:
        with pytest.raises(PlanError, match="two parts of the file are one block on storage"):
            shifting._on_storage(ranges(*rows), ranges(*extents))
    else:
        assert shifting._on_storage(ranges(*rows), ranges(*extents)).tolist() == wanted


# -- whose journals are


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


def test_a_mark_holds_for_a_digest_and_a_directory(homes: Path) -> None:
    (homes / "one").mkdir()
    (homes / "two").mkdir()
    with Directory.at(str(homes / "one")) as one, Directory.at(str(homes / "two")) as two:
        mark = ownership.mark(one, b"digest")
        assert len(mark) == 32
        assert ownership.forged(one, b"digest", mark) is None
        for directory, digest, given_mark in ((two, b"digest", mark), (None, b"digest", mark), (one, b"other", mark)):
            found = ownership.forged(directory, digest, given_mark)
            assert found is not None
            assert found.endswith("for this directory") == (directory is not None)
        assert ownership.forged(None, b"digest", ownership.mark(None, b"digest")) is None
        assert ownership.forged(one, b"digest", None) == "was made by an older vmconv, without a mark"
    key = homes / "state" / "vmconv" / "journal.key"
    assert [path.name for path in key.parent.iterdir()] == ["journal.key"]
    assert (key.stat().st_mode & 0o777, key.stat().st_size, key.parent.stat().st_mode & 0o777) == (0o600, 32, 0o700)
    assert ownership.can_mark()


@pytest.mark.parametrize(
    ("damage", "used"),
    [
        (lambda key: key.chmod(0o640), False),
        (lambda key: key.chmod(0o604), False),
        (lambda key: key.write_bytes(bytes(31)), False),
        (lambda key: key.write_bytes(bytes(33)), False),
        (lambda key: key.parent.chmod(0o720), False),
        (lambda key: key.parent.chmod(0o702), False),
        (lambda key: os.chown(key, 1, 1), False),
        (lambda key: os.chown(key.parent, 1, 1), False),
        (lambda key: key.parent.chmod(0o755), True),
    ],
)
def test_a_key_is_this_user_s_alone(homes: Path, damage: Callable[[Path], None], used: bool) -> None:
    mark = ownership.mark(None, b"digest")
    damage(homes / "state" / "vmconv" / "journal.key")
    assert (ownership.forged(None, b"digest", mark) is None) == used


def test_without_a_key_nothing_is_marked(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_homes", lambda: iter(["/proc/none"]))
    assert not ownership.can_mark()
    assert ownership.mark(None, b"digest") == ownership.UNMARKED == bytes(32)
    assert ownership.forged(None, b"digest", bytes(32)) is not None


def test_the_first_key_stays(homes: Path) -> None:
    place = homes / "state" / "vmconv"
    ownership._make_directories(str(place))
    with Directory.at(str(place)) as directory:
        first = ownership._made(directory)
        assert ownership._made(directory) == first == (place / "journal.key").read_bytes()


def test_homes_are_this_user_s(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class User:
        pw_dir = str(homes / "passwd")

    (homes / "passwd").mkdir()
    monkeypatch.setattr(pwd, "getpwuid", lambda _user: User)
    state, home, passwd = str(homes / "state"), *(f"{homes}/{name}/.local/state" for name in ("home", "passwd"))
    assert list(ownership._homes()) == [state, home, passwd]
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert list(ownership._homes()) == [home, passwd]
    os.chown(homes / "home", 1, 1)
    assert list(ownership._homes()) == [passwd]
    monkeypatch.setenv("HOME", ".")
    assert list(ownership._homes()) == [passwd]
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert list(ownership._homes()) == [passwd]


@pytest.mark.parametrize(("mode", "why"), [(0o600, None), (0o644, None), (0o620, "0620"), (0o602, "0602")])
def test_a_strangers_file_is_recognised_by_its_status(tmp_path: Path, mode: int, why: str | None) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file").chmod(mode)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    found = ownership.stranger(descriptor)
    assert found == (why and f"may be written by others (mode {why})")
    os.close(descriptor)


def test_a_journal_has_one_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with Directory.at(str(tmp_path)) as directory:
        descriptor = ownership.opened(directory, "file", os.O_RDWR)
        os.write(descriptor, b"y")
        os.close(descriptor)
        os.close(ownership.opened(directory, "file"))
        os.link(tmp_path / "file", tmp_path / "other")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(AccessError, match=r"has 2 names \(hard links\)"):
            ownership.opened(directory, "file")
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_some_filesystems_shift_blocks(ext4_dir: Path, btrfs_dir: Path) -> None:
    for path, shifts in ((ext4_dir, True), (btrfs_dir, False)):
        with Directory.at(str(path)) as directory:
            assert shifting.supported(directory) is shifts


def test_payload_is_not_shifted_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = carrier_of(64)
    once = plan_of(table_of(32, (0, None, 0), (16, carrier, 8), (24, None, 0), (28, carrier, 20)))
    twice = plan_of(table_of(36, (0, None, 0), (16, carrier, 8), (24, None, 0), (32, carrier, 20)))
    back = plan_of(table_of(32, (0, None, 0), (16, carrier, 20), (20, None, 0), (24, carrier, 8)))
    # The guide to conversions in place names the second.
    assert (shifting.MOST_WRITTEN, shifting.MOST_SHIFTS) == (16 << 20, 1024)
    monkeypatch.setattr(shifting, "MOST_SHIFTS", 1)
    monkeypatch.setattr(os, "fstatvfs", lambda _descriptor: type("", (), {"f_bsize": 4}))
    monkeypatch.setattr(linux, "settled_ranges", lambda _descriptor: ranges((0, 64, 400)))
    monkeypatch.setattr(linux, "shares_blocks", lambda _descriptor: False)
    assert shifting.physical_pieces(once, carrier).tolist() == [[408, 8, 16], [420, 4, 28]]
    with pytest.raises(PlanError, match="shifted 2 times, 1 at most"):
        shifting.physical_pieces(twice, carrier)
    with pytest.raises(PlanError, match="in another order"):
        shifting.physical_pieces(back, carrier)
    over = plan_of(table_of(16, (0, carrier, 8), (4, carrier, 20), (12, carrier, 24)))
    with pytest.raises(PlanError, match="in another order"):
        shifting.physical_pieces(over, carrier)
    monkeypatch.setattr(linux, "settled_ranges", lambda _descriptor: None)
    with pytest.raises(PlanError, match="does not report all"):
        shifting.physical_pieces(once, carrier)


def test_the_disk_is_looked_for_under_its_other_name(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = begun(directory)
    has = Directory.has

    def asked(place: Directory, name: str) -> bool:
        if name == WORK:
            raise OSError(errno.EIO, "broken")
        return has(place, name)

    monkeypatch.setattr(Directory, "has", asked)
    assert one._whereabouts() == f"the disk is {tmp_path / 'disk'} now"
