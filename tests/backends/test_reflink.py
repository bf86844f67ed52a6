"""Sharing by FICLONERANGE, on storage with prepared answers (`vmconv.backends.reflink`)."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmconv import api
from vmconv.backends import reflink
from vmconv.backends.copy import CopyBackend
from vmconv.backends.files import FileTransaction
from vmconv.backends.reflink import ReflinkBackend, ReflinkOutput
from vmconv.backends.temporary import Temporary
from vmconv.errors import BackendError
from vmconv.interface.backend import DEFAULT_ACCESS, Backend
from vmconv.io.directory import Directory
from vmconv.model.plan import ShareSteps
from vmconv.model.sources import File
from vmconv.system import linux
from vmconv.testing.disks import random_bytes

UNIT = 4096
"""Bytes of a block, as `statvfs` has it on the filesystem of the tests' directories."""


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Btrfs:
    """Files that are copied on write or not, by inode; only files that are alike share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "btrfs") -> None:
        self.nocow: set[int] = set()
        self.refusals: dict[int, int] = {}
        self.asked: list[tuple[int, int, int]] = []
        self.sets: list[bool] = []
        self.no_flags: int | None = None
        monkeypatch.setattr(linux, "mount_of", lambda _path: linux.Mount(kind, "/mnt"))
        monkeypatch.setattr(linux, "is_nocow", lambda fd: self.inode(fd) in self.nocow)
        monkeypatch.setattr(linux, "set_nocow", self.set)
        monkeypatch.setattr(linux, "clone_range", self.clone)

    @staticmethod
    def inode(descriptor: int) -> int:
        return os.fstat(descriptor).st_ino

    def set(self, descriptor: int, nocow: bool) -> None:
        if self.no_flags:
            raise error(self.no_flags)
        assert os.fstat(descriptor).st_size == 0
        self.sets.append(nocow)
        (self.nocow.add if nocow else self.nocow.discard)(self.inode(descriptor))

    def clone(self, source: int, target: int, source_offset: int, length: int, target_offset: int) -> None:
        self.asked.append((source_offset, length, target_offset))
        if number := self.refusals.get(self.inode(source)):
            raise error(number)
        if (self.inode(source) in self.nocow) != (self.inode(target) in self.nocow):
            raise error(errno.EINVAL)
        os.ftruncate(target, target_offset + (length or os.fstat(source).st_size))


@pytest.fixture
def btrfs(monkeypatch: pytest.MonkeyPatch) -> Btrfs:
    return Btrfs(monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def make(name: str, size: int) -> File:
            (tmp_path / name).write_bytes(bytes(size))
            return stack.enter_context(closing(File(str(tmp_path / name), os.open(tmp_path / name, os.O_RDONLY))))

        yield make


# -- which files can share


@pytest.mark.parametrize(
    ("plain", "unlike", "refused", "sets"),
    [
        (30000, 20000, ["unlike"], [False, True, False]),
        (20000, 30000, ["plain"], [False, True, True]),
        (20000, 20000, ["unlike"], [False, True, False]),
        (20000, 0, [], []),
        (0, 20000, [], [False, True, True]),
    ],
)
def test_the_way_of_most_payload_is_the_way_of_the_file(
    tmp_path: Path, btrfs: Btrfs, files: Any, plain: int, unlike: int, refused: list[str], sets: list[bool]
) -> None:
    sources = [files(name, size) for name, size in (("plain", plain), ("unlike", unlike)) if size]
    btrfs.nocow |= {btrfs.inode(file.descriptor) for file in sources if file.name == "unlike"}
    survey = ReflinkBackend().survey(str(tmp_path), sources)
    assert [file.name for file in sources if id(file) in survey.refusals] == refused
    assert survey.unit == os.statvfs(tmp_path).f_bsize
    assert btrfs.sets == sets
    for reason in survey.refusals.values():
        mine, most = ("copied on write", "not copied on write (chattr +C)")[:: -1 if refused == ["unlike"] else 1]
        assert (
            reason == f"{refused[0]} is {mine} and most payload is {most}, and Btrfs does not mix the two in one file"
        )


def test_a_refusal_for_another_reason_changes_no_flag(tmp_path: Path, btrfs: Btrfs, files: Any) -> None:
    one, other = files("one", UNIT), files("other", UNIT)
    btrfs.refusals[btrfs.inode(one.descriptor)] = errno.EXDEV
    survey = ReflinkBackend().survey(str(tmp_path), [one, other])
    # The files are on one filesystem, so the mounts must be two.
    said = f"one is on another mount of {tmp_path}'s filesystem, and Linux before 5.18 shares within one mount"
    assert dict(survey.refusals) == {id(one): said}
    assert btrfs.sets == []


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        (errno.ENOTTY, True),
        (errno.EINVAL, True),
        (errno.EPERM, True),
        (errno.EACCES, True),
        (524, True),
        (errno.EIO, False),
        (errno.ENOSPC, False),
    ],
)
def test_a_filesystem_without_flags_keeps_its_way(
    tmp_path: Path, btrfs: Btrfs, files: Any, number: int, passes: bool
) -> None:
    file = files("unlike", UNIT)
    btrfs.nocow.add(btrfs.inode(file.descriptor))
    btrfs.no_flags = number
    if passes:
        assert list(ReflinkBackend().survey(str(tmp_path), [file]).refusals) == [id(file)]
    else:
        with pytest.raises(OSError):
            reflink._set_nocow(file.descriptor, True)


@pytest.mark.parametrize(
    ("size", "length"), [(UNIT, UNIT), (UNIT + 1, UNIT), (UNIT - 1, UNIT - 1), (1, 1), (3 * UNIT, UNIT)]
)
def test_one_block_is_shared_and_removed_as_a_trial(
    tmp_path: Path, btrfs: Btrfs, files: Any, size: int, length: int
) -> None:
    source, scratch = files("source", size), os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    assert reflink._clone_error(source, scratch, UNIT) is None
    assert btrfs.asked == [(0, length, 0)]
    assert os.fstat(scratch).st_size == 0
    btrfs.refusals[btrfs.inode(source.descriptor)] = errno.EXDEV
    refused = reflink._clone_error(source, scratch, UNIT)
    assert refused is not None
    assert refused.errno == errno.EXDEV
    source.is_device = True
    refused = reflink._clone_error(source, scratch, UNIT)
    assert refused is not None
    assert refused.errno == errno.ENOTBLK
    assert len(btrfs.asked) == 2
    os.close(scratch)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOTBLK, "xfs", "a is a block device, which shares nothing with files"),
        (errno.EXDEV, "xfs", "a is on another filesystem than /there"),
        (errno.EOPNOTSUPP, "ext4", "ext4 at /mnt cannot share blocks between files"),
        (errno.ETXTBSY, "xfs", "a is in use as swap"),
        (errno.EINVAL, "xfs", "xfs at /mnt refuses to share with a: Invalid argument"),
        (errno.EINVAL, "btrfs", "btrfs at /mnt refuses to share with a: Invalid argument"),
        (errno.EIO, "btrfs", "btrfs at /mnt refuses to share with a: Input/output error"),
    ],
)
def test_reasons_end_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, number: int, kind: str, said: str
) -> None:
    btrfs = Btrfs(monkeypatch, kind)
    monkeypatch.setattr(reflink, "_is_mounted_twice", lambda *_: False)
    source, scratch = files("a", UNIT), files("scratch", 0)
    assert reflink._refusal(error(number), "/there", source, scratch.descriptor) == said
    btrfs.nocow.add(btrfs.inode(source.descriptor))
    mixed = "a is not copied on write (chattr +C) and most payload is copied on write"
    mixed += ", and Btrfs does not mix the two in one file"
    unlike = (number, kind) == (errno.EINVAL, "btrfs")
    assert reflink._refusal(error(number), "/there", source, scratch.descriptor) == (mixed if unlike else said)
    assert reflink._refusal(error(number), "/there") == said.replace("a is", "a file is").replace(
        "with a:", "with a file:"
    )


def test_a_directory_whose_files_share_says_in_which_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, btrfs: Btrfs
) -> None:
    unit = os.statvfs(tmp_path).f_bsize
    sizes: list[int] = []

    def clone(source: int, target: int, *numbers: int) -> None:
        assert source == target
        sizes.append(os.fstat(source).st_size)
        btrfs.asked.append(numbers)  # type: ignore[arg-type]

    monkeypatch.setattr(linux, "clone_range", clone)
    ability = ReflinkBackend().capabilities(str(tmp_path))
    assert (ability.usable, ability.shares, ability.unit, ability.reason) == (True, True, unit, None)
    assert btrfs.asked == [(0, unit, unit)]
    assert sizes == [2 * unit]

    def refuse(*_numbers: int) -> None:
        raise error(errno.EOPNOTSUPP)

    monkeypatch.setattr(linux, "clone_range", refuse)
    ability = ReflinkBackend().capabilities(str(tmp_path))
    assert (ability.usable, ability.shares) == (False, False)
    assert ability.reason == "btrfs at /mnt cannot share blocks between files"


@pytest.mark.parametrize(
    ("number", "named"), [(errno.EISDIR, True), (errno.ENOENT, True), (errno.EOPNOTSUPP, True), (errno.EACCES, False)]
)
def test_scratch_files_have_no_name_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, named: bool
) -> None:
    with reflink._scratch(str(tmp_path)) as scratch:
        assert os.listdir(tmp_path) == []
        assert os.fstat(scratch).st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(scratch)
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise error(number)
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    if named:
        with reflink._scratch(str(tmp_path)) as scratch:
            assert os.listdir(tmp_path) == []
            assert os.fstat(scratch).st_nlink == 0
        with pytest.raises(OSError), reflink._scratch(str(tmp_path / "none")):
            pass
    else:
        with pytest.raises(PermissionError), reflink._scratch(str(tmp_path)):
            pass


@pytest.mark.parametrize("backend", [ReflinkBackend(), CopyBackend()], ids=["reflink", "copy"])
def test_by_default_nothing_is_replaced_and_all_is_durable(tmp_path: Path, backend: Backend) -> None:
    with Directory.at(str(tmp_path)) as directory:
        transaction = backend.begin(directory)
        assert isinstance(transaction, FileTransaction)
        assert (transaction.force, transaction.durable, transaction.access) == (False, True, DEFAULT_ACCESS)


# -- sharing


def steps_of(source: File, *rows: tuple[int, int, int]) -> ShareSteps:
    """Returns ranges `(source offset, length, offset)`."""
    source_offset, length, offset = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return ShareSteps((source,), np.zeros(len(rows), dtype=np.int32), source_offset, length, offset)


@pytest.mark.parametrize(("kind", "by_target"), [("btrfs", True), ("xfs", False)])
def test_the_end_of_a_file_is_shared_before_anything_lies_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, kind: str, by_target: bool
) -> None:
    Btrfs(monkeypatch, kind)
    unit = os.statvfs(tmp_path).f_bsize
    source = files("source", 9 * unit + 5)
    calls: list[Any] = []
    with Directory.at(str(tmp_path)) as directory, closing(Temporary(directory, "target", None)) as temporary:
        output = ReflinkOutput(temporary, 20 * unit, kernel_copies=False, durable=False)

        def clone(steps: ShareSteps) -> None:
            rows = zip(steps.source_offset.tolist(), steps.length.tolist(), steps.offset.tolist(), strict=True)
            calls.append((os.fstat(output.descriptor).st_size, list(rows)))

        monkeypatch.setattr(output, "_clone", clone)
        monkeypatch.setattr(reflink, "_LONGEST_CALL", 2 * unit)
        output.share(steps_of(source, (0, 3 * unit, 6 * unit), (8 * unit, unit + 5, 0), (6 * unit, unit, 4 * unit)))
    whole = [(0, 2 * unit, 6 * unit), (2 * unit, unit, 8 * unit), (6 * unit, unit, 4 * unit)]
    assert calls == [
        (0, [(8 * unit, unit + 5, 0)]),
        (20 * unit, sorted(whole, key=lambda row: row[2] if by_target else row[0])),
    ]


def test_a_call_that_fails_says_which_range_it_was_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    source = files("source", 9 * UNIT)
    given: list[tuple[int, ...]] = []

    def ioctl(descriptor: int, request: int, packed: bytes) -> None:
        assert request == linux.FICLONERANGE
        given.append((descriptor, *linux.CLONE.unpack(packed)))
        if len(given) == 2:
            raise error(errno.EIO)

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    with Directory.at(str(tmp_path)) as directory, closing(Temporary(directory, "target", None)) as temporary:
        output = ReflinkOutput(temporary, 20 * UNIT, kernel_copies=False, durable=False)
        with pytest.raises(BackendError, match="target: sharing 4096 bytes from 0x3000 at 0x1000: Input/output error"):
            output._clone(steps_of(source, (0, UNIT, 0), (3 * UNIT, UNIT, UNIT), (6 * UNIT, UNIT, 5 * UNIT)))
        assert given == [
            (output.descriptor, source.descriptor, 0, UNIT, 0),
            (output.descriptor, source.descriptor, 3 * UNIT, UNIT, UNIT),
        ]


@pytest.mark.parametrize("nocow", [False, True])
@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_new_file_becomes_alike_with_the_first_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, kind: str, nocow: bool
) -> None:
    btrfs = Btrfs(monkeypatch, kind)
    unit = os.statvfs(tmp_path).f_bsize
    source = files("source", 2 * unit)
    if nocow:
        btrfs.nocow.add(btrfs.inode(source.descriptor))
    with Directory.at(str(tmp_path)) as directory, closing(Temporary(directory, "target", None)) as temporary:
        output = ReflinkOutput(temporary, 2 * unit, kernel_copies=False, durable=False)
        monkeypatch.setattr(output, "_clone", lambda _steps: None)
        output.share(steps_of(source, (0, unit, 0)))
        assert linux.is_nocow(output.descriptor) == (nocow and kind == "btrfs")
        assert btrfs.sets == ([False, True] if nocow and kind == "btrfs" else [])
        output.share(steps_of(source, (0, unit, 0)).take(np.array([False])))
        assert len(btrfs.asked) == (0 if kind == "xfs" else 3 if nocow else 1)


def test_a_source_that_shares_in_no_way_is_tried_no_longer(btrfs: Btrfs, files: Any) -> None:
    source, target = files("source", UNIT), files("target", 0)
    descriptor = os.open(target.path, os.O_RDWR)
    btrfs.refusals[btrfs.inode(source.descriptor)] = errno.EXDEV
    reflink._match_nocow(source, descriptor, UNIT)
    assert btrfs.sets == []
    btrfs.refusals[btrfs.inode(source.descriptor)] = errno.EINVAL
    reflink._match_nocow(source, descriptor, UNIT)
    assert btrfs.sets == [False, True]
    os.close(descriptor)


# -- ZFS, which is no part of Linux: its rules as zfs_clone_range has them


class Zfs:
    """Files with records, by inode. A clone is a copy here, so that results can be read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, record: int) -> None:
        self.record = record
        self.records: dict[int, int] = {}
        self.busy = 0
        """Clones that come too early."""
        self.clones: list[tuple[int, int, int]] = []
        self.synced: list[int] = []
        self._stat, self._truncate, self._sync, self._ioctl = os.fstat, os.ftruncate, os.fsync, fcntl.ioctl
        monkeypatch.setattr(linux, "mount_of", lambda _path: linux.Mount("zfs", "/tank"))
        monkeypatch.setattr(os, "fstat", self.stat)
        monkeypatch.setattr(os, "ftruncate", self.truncate)
        monkeypatch.setattr(os, "fsync", self.sync)
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)
        monkeypatch.setattr(time, "sleep", lambda _seconds: None)

    def stat(self, descriptor: int) -> Any:
        status = self._stat(descriptor)
        size = self.records.get(status.st_ino)
        return status if size is None else Recorded(status, size)

    def truncate(self, descriptor: int, size: int) -> None:
        inode = self._stat(descriptor).st_ino
        if size > self._stat(descriptor).st_size:
            self.records.setdefault(inode, self.record)
        elif size == 0:
            self.records.pop(inode, None)
        self._truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self.synced.append(self._stat(descriptor).st_ino)
        self._sync(descriptor)

    def ioctl(self, target: int, request: int, packed: Any = 0, *more: Any) -> Any:
        if request != linux.FICLONERANGE:
            return self._ioctl(target, request, packed, *more)
        source, source_offset, length, offset = linux.CLONE.unpack(packed)
        record = self.records.get(self._stat(source).st_ino, self.record)
        size, end = self._stat(source).st_size, self._stat(target).st_size
        if source_offset % record or offset % record:
            raise error(errno.EINVAL)
        if length % record and (source_offset + length < size or offset + length < end):
            raise error(errno.EINVAL)
        if self.records.setdefault(self._stat(target).st_ino, record) != record:
            raise error(errno.EINVAL)
        if self.busy:
            self.busy -= 1
            raise error(errno.EAGAIN)
        self.clones.append((source_offset, length, offset))
        os.pwrite(target, os.pread(source, length, source_offset), offset)
        return 0


class Recorded:
    """The status of a file with records of another size."""

    def __init__(self, status: os.stat_result, size: int) -> None:
        self._status = status
        self.st_blksize = size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._status, name)


KIB = 1 << 10
MIB = 1 << 20


@pytest.mark.parametrize("record", [16 * KIB, 128 * KIB, MIB])
@pytest.mark.parametrize("format_name", ["qcow2", "vhdx", "raw"])
def test_zfs_shares_whole_records_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: int, format_name: str
) -> None:
    """The filesystem has another size by now. The end of the disk is less than a record."""
    data = random_bytes(8 * MIB + 5 * 512)
    (tmp_path / "disk.raw").write_bytes(data)
    zfs = Zfs(monkeypatch, 32 * KIB)
    zfs.records[os.stat(tmp_path / "disk.raw").st_ino] = record
    zfs.busy = 3
    result = api.convert(str(tmp_path / "disk.raw"), str(tmp_path / "target"), target_format=format_name)
    assert (result.backend, result.totals.shared) == ("reflink", len(data) if format_name == "raw" else 8 * MIB)
    assert zfs.clones
    assert all(start % record == 0 and offset % record == 0 for start, _, offset in zfs.clones)
    api.convert(str(tmp_path / "target"), str(tmp_path / "back.raw"), source_format=format_name)
    assert (tmp_path / "back.raw").read_bytes()[: len(data)] == data


def test_files_of_other_records_are_copied_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    most, other, small = files("most", MIB), files("other", MIB // 2), files("small", 5120)
    zfs = Zfs(monkeypatch, 128 * KIB)
    for file, record in ((most, 128 * KIB), (other, 16 * KIB), (small, 5120)):
        zfs.records[os.stat(file.path).st_ino] = record
    survey = ReflinkBackend().survey(str(tmp_path), [other, most, small])
    said = "has records of {} bytes and most payload has 131072, and ZFS does not mix the two in one file"
    assert survey.unit == 128 * KIB
    assert survey.refusals == {id(other): f"other {said.format(16384)}", id(small): f"small {said.format(5120)}"}


def test_a_source_that_was_just_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    source = files("source", 4 * KIB * 32)
    zfs = Zfs(monkeypatch, 4 * KIB)
    zfs.busy = 5
    with Directory.at(str(tmp_path)) as directory, closing(Temporary(directory, "target", None)) as temporary:
        output = ReflinkOutput(temporary, 8 * UNIT, kernel_copies=False, durable=False)
        output.share(steps_of(source, (0, UNIT, UNIT), (2 * UNIT, UNIT, 3 * UNIT)))
        assert zfs.synced == [os.stat(source.path).st_ino]
        assert zfs.clones == [(0, UNIT, UNIT), (2 * UNIT, UNIT, 3 * UNIT)]
        assert os.fstat(output.descriptor).st_size == 8 * UNIT
        # Not for ever.
        zfs.busy = 1 << 30
        monkeypatch.setattr(reflink, "_PATIENCE", 0.01)
        with pytest.raises(BackendError, match="sharing 4096 bytes from 0x0 at 0x1000: Resource temporarily"):
            output.share(steps_of(source, (0, UNIT, UNIT)))


def test_what_comes_too_early_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any) -> None:
    source = files("source", 2 * UNIT)
    zfs = Zfs(monkeypatch, UNIT)
    zfs.busy = 1
    assert ReflinkBackend().capabilities(str(tmp_path)).usable
    zfs.busy = 1
    assert ReflinkBackend().survey(str(tmp_path), [source]).refusals == {}
