"""Copies and writes continue at the right place after partial system calls (`vmconv.backends`)."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmconv.backends import direct, writing
from vmconv.backends.direct import STEP, DirectFile
from vmconv.backends.files import FileOutput
from vmconv.backends.reflink import ReflinkBackend
from vmconv.backends.temporary import Temporary
from vmconv.conversion import execute as commit
from vmconv.conversion.planner import plan_layout
from vmconv.errors import BackendError
from vmconv.interface.backend import Output, Survey, Transaction
from vmconv.io.directory import Directory
from vmconv.model.extents import Extents, Kind
from vmconv.model.layout import Layout, OutFile
from vmconv.model.plan import Plan, ShareSteps
from vmconv.model.sources import Blob, Decoded, File, Source
from vmconv.system import linux, parallel

BLOCK = 4096
MIB = 1 << 20
PATTERN = bytes(range(251)) * 70000


def source_of(directory: Path, size: int = 4 * MIB) -> File:
    path = directory / "source"
    path.write_bytes(PATTERN[:size])
    return File(str(path), os.open(path, os.O_RDONLY))


@contextmanager
def output(directory: Path, size: int, *, kernel: bool = False, durable: bool = False) -> Iterator[FileOutput]:
    with Directory.at(str(directory)) as opened:
        made = FileOutput(Temporary(opened, "target", None), size, kernel_copies=kernel, durable=durable)
        try:
            made.share(nothing())
            yield made
        finally:
            made.close()


def nothing() -> ShareSteps:
    empty = np.empty(0, dtype=np.int64)
    return ShareSteps((), empty.astype(np.int32), empty, empty, empty)


def noting(note: Callable[..., object], real: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that does what `real` does, after its arguments were given to `note`."""

    def call(*arguments: Any) -> Any:
        note(*arguments)
        return real(*arguments)

    return call


def content(made: FileOutput) -> bytes:
    return os.pread(made.descriptor, os.fstat(made.descriptor).st_size + 1, 0)


# -- copy_file_range


class Kernel:
    """copy_file_range that copies these numbers of bytes, call by call, and then fails with `error`, or copies none."""

    def __init__(self, steps: list[int], error: int | None) -> None:
        self.steps = steps
        self.error = error
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, source: int, target: int, count: int, from_offset: int, to_offset: int) -> int:
        if len(self.calls) == len(self.steps):
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            return 0
        step = min(count, self.steps[len(self.calls)])
        self.calls.append((count, from_offset, to_offset))
        return os.pwrite(target, os.pread(source, step, from_offset), to_offset)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copying")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 700), max_size=6),
    st.sampled_from([None, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM]),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(1, 2000),
)
def test_a_copy_continues_where_the_kernel_stopped(
    place: Path, steps: list[int], error: int | None, source_offset: int, offset: int, length: int
) -> None:
    kernel = Kernel(steps, error)
    size = offset + length + 7
    with closing(source_of(place, 3000)) as source, output(place, size, kernel=True) as made:
        with patch.object(os, "copy_file_range", kernel), patch.object(writing, "_STEP", 97):
            made.copy(source, source_offset, offset, length)
        wanted = PATTERN[source_offset : min(3000, source_offset + length)].ljust(length, b"\0")
        assert content(made) == bytes(offset) + wanted + bytes(7)
    done = 0
    for step, call in zip(steps, kernel.calls, strict=False):
        assert call == (length - done, source_offset + done, offset + done)
        done += step


def test_bytes_that_the_kernel_copied_are_not_copied_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel([500, 500], errno.EXDEV)
    asked: list[tuple[int, int]] = []
    read_into = File.read_into
    monkeypatch.setattr(os, "copy_file_range", kernel)
    monkeypatch.setattr(File, "read_into", noting(lambda _file, at, part: asked.append((at, len(part))), read_into))
    with closing(source_of(place)) as source, output(place, 2000, kernel=True) as made:
        made.copy(source, 10, 0, 1000)
        assert asked == []
        made.copy(source, 10, 1000, 1000)
        assert asked == [(10, 1000)]
    assert len(kernel.calls) == 2


def test_room_is_made_for_what_the_kernel_did_not_copy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "copy_file_range", Kernel([BLOCK], errno.EXDEV))
    with closing(source_of(place)) as source, output(place, 4 * BLOCK, kernel=True, durable=True) as made:
        direct: Any = SimpleNamespace(prepare=lambda at, length: asked.append((at, length)), close=lambda: None)
        made._direct = direct
        made.copy(source, 0, BLOCK, 3 * BLOCK)
        assert content(made) == bytes(BLOCK) + PATTERN[: 3 * BLOCK]
    assert asked == [(2 * BLOCK, 2 * BLOCK)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_range_that_no_method_can_copy_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", Kernel([10], number))
    with closing(source_of(place)) as source, output(place, 100, kernel=True) as made:
        with pytest.raises(OSError) as caught:
            made.copy(source, 0, 0, 100)
        assert caught.value.errno == number


def test_the_kernel_copies_only_on_request(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel([100], None)
    monkeypatch.setattr(os, "copy_file_range", kernel)
    with closing(source_of(place)) as source, output(place, 100) as made:
        made.copy(source, 0, 0, 100)
        assert content(made) == PATTERN[:100]
    with output(place, 100, kernel=True) as made:
        made.copy(Blob("letters", b"x" * 100), 0, 0, 100)
        assert content(made) == b"x" * 100
    assert kernel.calls == []


def test_a_backend_that_shares_leaves_no_copy_to_the_kernel(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would share what the plan has as copied."""
    monkeypatch.setattr(os, "copy_file_range", kernel := Kernel([100], None))
    with closing(source_of(place)) as source, Directory.at(str(place)) as directory:
        transaction = ReflinkBackend().begin(directory)
        made = transaction.create("target", 100, [])
        made.share(nothing())
        made.copy(source, 0, 0, 100)
        transaction.abort()
    assert kernel.calls == []


# -- writing


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5), st.lists(st.integers(1, 12), min_size=1))
def test_a_write_continues_where_the_kernel_stopped(place: Path, parts: list[bytes], takes: list[int]) -> None:
    pwrite = os.pwrite
    sizes = iter(takes * 60)
    with output(place, 64) as made:
        with (
            patch.object(os, "pwritev", lambda fd, data, at: pwrite(fd, b"".join(data)[: next(sizes)], at)),
            patch.object(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[: next(sizes)], at)),
        ):
            made._write(5, parts)
        assert content(made) == (bytes(5) + b"".join(parts)).ljust(64, b"\0")


def test_a_kernel_that_writes_nothing_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda _fd, _parts, _offset: 3)
    monkeypatch.setattr(os, "pwrite", lambda _fd, _data, _offset: 0)
    with output(place, 8) as made:
        with pytest.raises(OSError, match="nothing was written") as caught:
            made.write(0, b"letters")
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(place / "target"))


def test_a_backend_that_cannot_share_refuses(place: Path) -> None:
    one = np.array([1], dtype=np.int64)
    steps = ShareSteps((Blob("letter", b"x"),), np.array([0], dtype=np.int32), one, one, one)
    with output(place, 8) as made:
        assert os.fstat(made.descriptor).st_size == 8
        with pytest.raises(BackendError, match="this backend cannot share"):
            made.share(steps)


@pytest.mark.parametrize("durable", [True, False])
def test_a_finished_file_is_the_file(place: Path, durable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    closed: list[int] = []
    close = os.close
    monkeypatch.setattr(os, "fsync", synced.append)
    with output(place, 8, durable=durable) as made:
        made.write(2, b"ab")
        monkeypatch.setattr(os, "close", noting(closed.append, close))
        file = made.finish()
        monkeypatch.setattr(os, "close", close)
        assert file.settled
        assert file.read(0, 8) == b"\0\0ab\0\0\0\0"
        assert synced == ([made.descriptor] if durable else [])
        # A network filesystem says at a close what it could not write.
        assert len(closed) == (not durable)
        assert (made._direct is not None) == durable
    assert made.descriptor == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.descriptor)


# -- past the page cache


class Direct(NamedTuple):
    """What was asked of a filesystem, and how much of each write it takes."""

    allocated: list[tuple[int, int]]
    written: list[tuple[int, int]]


@pytest.fixture
def ext4(monkeypatch: pytest.MonkeyPatch) -> Direct:
    """Lets every filesystem pass for ext4, and writes past the page cache go through it."""
    noted = Direct([], [])
    real = os.open
    monkeypatch.setattr(linux, "mount_of", lambda _path: linux.Mount("ext4", "/"))
    monkeypatch.setattr(
        os, "open", lambda path, flags, *more, **named: real(path, flags & ~os.O_DIRECT, *more, **named)
    )
    monkeypatch.setattr(linux, "allocate", lambda _fd, offset, length: noted.allocated.append((offset, length)))
    return noted


@pytest.mark.parametrize(
    ("offset", "length", "prepared"),
    [
        (0, MIB, True),
        (BLOCK, MIB, True),
        (0, MIB - 1, False),
        (1, MIB, False),
        (BLOCK - 1, MIB, False),
        (512, MIB, False),
        (0, 5 * MIB + 1, True),
    ],
)
def test_long_ranges_at_blocks_are_written_directly(
    place: Path, ext4: Direct, offset: int, length: int, prepared: bool
) -> None:
    with output(place, 1) as made, closing(DirectFile(made.descriptor)) as direct:
        assert direct.prepare(offset, length) is prepared
        assert ext4.allocated == ([(offset, length)] if prepared else [])


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_filesystems_are_known_that_write_directly(
    place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[str] = []
    with output(place, 1) as made, closing(DirectFile(made.descriptor)) as direct:
        monkeypatch.setattr(linux, "mount_of", noting(asked.append, lambda _path: linux.Mount(kind, "/")))
        assert direct.prepare(0, MIB) is direct.prepare(0, MIB) is (kind in ("ext4", "xfs"))
    assert asked == [str(place)]


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EINVAL, False), (errno.EACCES, False), (errno.EMFILE, True), (errno.ENFILE, True), (errno.ENOMEM, True)],
)
def test_a_second_descriptor_may_be_refused(
    place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    opened: list[object] = []

    def refuse(path: object, *_arguments: object) -> int:
        opened.append(path)
        raise OSError(number, os.strerror(number))

    with output(place, 1) as made, closing(DirectFile(made.descriptor)) as direct:
        monkeypatch.setattr(os, "open", refuse)
        if raised:
            with pytest.raises(OSError) as caught:
                direct.prepare(0, MIB)
            assert caught.value.errno == number
        else:
            assert not direct.prepare(0, MIB)
            assert not direct.prepare(0, MIB)
            assert len(opened) == 1
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (errno.EOPNOTSUPP, False),
        (errno.ENOSYS, False),
        (errno.EINVAL, False),
        (errno.EPERM, False),
        (errno.ENOSPC, True),
        (errno.EIO, True),
    ],
)
def test_room_may_not_be_found_beforehand(
    place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(linux, "allocate", refuse)
    with output(place, 1) as made, closing(DirectFile(made.descriptor)) as direct:
        if raised:
            with pytest.raises(OSError):
                direct.prepare(0, MIB)
        else:
            assert not direct.prepare(0, MIB)
            assert direct.write(0, memoryview(bytes(BLOCK))) == 0


@pytest.mark.parametrize(
    ("length", "takes", "done"),
    [
        (3 * BLOCK, [3 * BLOCK], 3 * BLOCK),
        (3 * BLOCK + 5, [3 * BLOCK], 3 * BLOCK),
        (3 * BLOCK, [BLOCK, BLOCK, BLOCK], 3 * BLOCK),
        (3 * BLOCK, [BLOCK, 512], BLOCK + 512),
        (BLOCK - 1, [], 0),
        (3 * BLOCK, [BLOCK, errno.EINVAL], BLOCK),
        (3 * BLOCK, [2 * BLOCK, -errno.EIO], None),
        (3 * BLOCK, [2 * BLOCK, -errno.ENOSPC], None),
    ],
)
def test_whole_blocks_are_written_as_far_as_storage_takes_them(
    place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch, length: int, takes: list[int], done: int | None
) -> None:
    pwrite, left = os.pwrite, list(takes)

    def taking(descriptor: int, part: memoryview, offset: int) -> int:
        assert descriptor != made.descriptor
        assert len(part) % BLOCK == 0
        take = left.pop(0)
        if abs(take) < 512:
            raise OSError(abs(take), os.strerror(abs(take)))
        return pwrite(descriptor, part[:take], offset)

    part = memoryview(PATTERN)[:length]
    with output(place, 1) as made, closing(DirectFile(made.descriptor)) as direct:
        assert direct.prepare(0, MIB)
        monkeypatch.setattr(os, "pwrite", taking)
        if done is None:
            with pytest.raises(OSError):
                direct.write(BLOCK, part)
        else:
            assert direct.write(BLOCK, part) == done
            assert content(made)[BLOCK:] == PATTERN[:done]
            # What storage refused once it is not asked again.
            assert (direct.write(0, part[:0]), direct._refused) == (0, errno.EINVAL in takes)
        assert left == []


def test_a_second_descriptor_is_closed_once(place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    with output(place, 1) as made:
        direct = DirectFile(made.descriptor)
        assert direct.prepare(0, MIB)
        descriptor = direct._descriptor
        closed: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", noting(closed.append, os.close))
            direct.close()
            direct.close()
        assert closed == [descriptor]


def test_room_is_found_for_what_the_kernel_left(place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", Kernel([3 * BLOCK], None))
    with closing(source_of(place)) as source, output(place, 2 * MIB, kernel=True, durable=True) as made:
        made.copy(source, 0, 0, 2 * MIB)
        assert content(made) == PATTERN[: 2 * MIB]
    assert ext4.allocated == [(3 * BLOCK, 2 * MIB - 3 * BLOCK)]


@pytest.mark.parametrize("offset", [0, BLOCK, 512])
@pytest.mark.parametrize("takes", [STEP, 3 * BLOCK, BLOCK + 100])
def test_a_durable_copy_is_whole_however_much_is_written_directly(
    place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch, offset: int, takes: int
) -> None:
    pwrite = os.pwrite
    advised: list[tuple[int, int, int]] = []
    direct_writes: list[int] = []

    def taking(descriptor: int, part: memoryview, at: int) -> int:
        if descriptor == made.descriptor:
            return pwrite(descriptor, part, at)
        direct_writes.append(at)
        return pwrite(descriptor, part[:takes], at)

    monkeypatch.setattr(direct, "STEP", 1 << 18)
    monkeypatch.setattr(writing, "STEP", 1 << 18)
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, at, length, what: advised.append((at, length, what)))
    length = MIB + 777
    with closing(source_of(place)) as source, output(place, offset + length, durable=True) as made:
        monkeypatch.setattr(os, "pwrite", taking)
        made.copy(source, 13, offset, length)
        assert content(made) == bytes(offset) + PATTERN[13 : 13 + length]
    assert bool(direct_writes) == (offset % BLOCK == 0)
    assert advised == ([] if direct_writes else [(offset, length, os.POSIX_FADV_DONTNEED)])


def test_advice_may_be_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EINVAL, "no advice")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with closing(source_of(place)) as source, output(place, 100, durable=True) as made:
        made.copy(source, 0, 0, 100)
        assert content(made) == PATTERN[:100]


# -- decoded payload


def letters(first: int, count: int) -> list[bytes]:
    return [bytes([65 + number % 26]) * 512 for number in range(first, first + count)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9000), st.integers(1, 9000), st.integers(0, 5000), st.sampled_from([1, 512, 1500, 4096]))
def test_any_part_of_decoded_payload_is_copied(
    place: Path, source_offset: int, length: int, offset: int, step: int
) -> None:
    length = min(length, 20 * 512 - source_offset)
    with closing(source_of(place, 512)) as file, output(place, offset + length) as made:
        source = Decoded("letters", file, unit=512, count=20, decode=letters, reason="they are made up")
        with patch.object(Decoded, "step", step):
            made.copy(source, source_offset, offset, length)
        whole = b"".join(letters(0, 20))
        assert content(made) == bytes(offset) + whole[source_offset : source_offset + length]


@pytest.mark.parametrize("step", [1 << 16, 1 << 19])
def test_decoded_payload_is_gathered_before_it_is_written_directly(
    place: Path, ext4: Direct, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(writing, "STEP", 1 << 18)
    monkeypatch.setattr(Decoded, "step", step)
    through: list[int] = []
    write = FileOutput._write
    monkeypatch.setattr(
        FileOutput, "_write", noting(lambda _self, _at, parts: through.append(sum(map(len, parts))), write)
    )
    count = 2 * MIB // 512
    with closing(source_of(place, 512)) as file, output(place, 3 * MIB, durable=True) as made:
        source = Decoded("letters", file, unit=512, count=count, decode=letters, reason="they are made up")
        made.copy(source, 512, BLOCK, 2 * MIB - 1024)
        wanted = b"".join(letters(1, count - 2))
        assert content(made) == (bytes(BLOCK) + wanted).ljust(3 * MIB, b"\0")
    # What does not fit into the buffer goes through the cache; else only what is no whole block.
    assert (sum(through) == len(wanted)) == (step > 1 << 18)


# -- a plan becomes files


class Noted(Output):
    """Notes what it is asked for."""

    def __init__(self, name: str, size: int, log: list[tuple[object, ...]]) -> None:
        self.name, self.data, self.log = name, bytearray(size), log

    def share(self, steps: ShareSteps) -> None:
        self.log.append(("share", self.name, steps.length.tolist()))

    def write(self, offset: int, data: bytes) -> None:
        self.log.append(("write", self.name, offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        self.log.append(("copy", self.name, source_offset, offset, length))
        self.data[offset : offset + length] = source.read(source_offset, length)

    def finish(self) -> File:
        self.log.append(("finish", self.name))
        return File.__new__(File)


class NotedTransaction(Transaction):
    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.outputs: list[Noted] = []

    def prepare(self, plan: Plan) -> None:
        self.log.append(("prepare",))

    def create(self, name: str, size: int, sources: object) -> Output:
        assert all(isinstance(source, File) for source in sources)  # type: ignore[attr-defined]
        self.outputs.append(Noted(name, size, self.log))
        return self.outputs[-1]

    def commit(self) -> None:
        self.log.append(("commit",))

    def abort(self) -> None:
        self.log.append(("abort",))


def plan_of(source: File, *rows: tuple[Source, int, int]) -> Plan:
    """Returns the plan of one file with these rows, `(source, offset, length)`, end to end; files are copied."""
    ends = list(itertools.accumulate(length for _, _, length in rows))
    starts = [0, *ends[:-1]]
    table = Extents.of([(at, Kind.DATA, row[0], row[1]) for at, row in zip(starts, rows, strict=True)], ends[-1])
    layout = Layout((OutFile(table),))
    return plan_layout(layout, "target", "/", "copy", Survey(1, {id(source): "they are made up"}))


@pytest.mark.parametrize("few", [True, False])
def test_a_plan_is_made_in_pieces_of_bounded_size(place: Path, monkeypatch: pytest.MonkeyPatch, few: bool) -> None:
    piece = 4000 if few else 1000
    monkeypatch.setattr(commit, "_PIECE", piece)
    monkeypatch.setattr(commit._pieces, "__defaults__", (piece,))
    monkeypatch.setattr(commit, "_METADATA_PIECE", 300)
    threads: list[int] = []
    monkeypatch.setattr(commit, "in_order", noting(lambda *_arguments: threads.append(1), parallel.in_order))
    said: list[tuple[int, int]] = []
    blob = Blob("metadata", PATTERN[:700])
    with closing(source_of(place, 5000)) as source:
        plan = plan_of(source, (blob, 0, 700), (source, 100, 2500), (blob, 3, 10), (source, 1, 400), (source, 900, 400))
        transaction = NotedTransaction()
        assert len(commit.make(plan, transaction, lambda done, to_do: said.append((done, to_do)))) == 1
        wanted = blob.read(0, 700) + source.read(100, 2500) + blob.read(3, 10) + source.read(1, 400)
        assert transaction.outputs[0].data == wanted + source.read(900, 400)
    assert transaction.log[:2] == [("prepare",), ("share", "target", [])]
    assert transaction.log[-1] == ("finish", "target")
    writes = [step[2:] for step in transaction.log if step[0] == "write"]
    assert writes == [(0, 300), (300, 300), (600, 100), (3200, 10)]
    copies = sorted(step[2:] for step in transaction.log if step[0] == "copy")
    long = [(100, 700, 2500)] if few else [(100, 700, 1000), (1100, 1700, 1000), (2100, 2700, 500)]
    assert copies == sorted([*long, (1, 3210, 400), (900, 3610, 400)])
    # Neighbours are copied together; what is done in one step is said once.
    done = [300, 600, 700, 710, *([4010] if few else [1710, 2710, 4010])]
    assert said == [(0, 4010), *((each, 4010) for each in done)]
    assert bool(threads) != few


def test_without_copies_there_are_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object) -> None:
        pytest.fail("begun")

    monkeypatch.setattr(commit, "in_order", refused)
    monkeypatch.setattr(commit, "_batches", refused)
    transaction = NotedTransaction()
    table = Extents.whole(Blob("metadata", b"abc"))
    plan = plan_layout(Layout((OutFile(table),)), "target", "/", "copy", Survey(1, {}))
    commit.make(plan, transaction, None)
    assert transaction.outputs[0].data == b"abc"
