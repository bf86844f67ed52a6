"""The backends that come with vmconv pass the kit on the filesystems they are for."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import inspect
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmconv.backends.copy import CopyBackend
from vmconv.backends.files import FileOutput, FileTransaction
from vmconv.backends.reflink import ReflinkBackend
from vmconv.backends.temporary import Temporary
from vmconv.interface.backend import Access, Transaction
from vmconv.io.directory import Directory
from vmconv.model.plan import ShareSteps
from vmconv.model.sources import Decoded, File
from vmconv.system import linux
from vmconv.testing import BackendTests
from vmconv.testing.memory import MemoryBackend


class TestReflinkOnXfs(BackendTests):
    backend = ReflinkBackend()
    shares = True

    @pytest.fixture
    def directory(self, xfs_dir: Path) -> Iterator[str]:
        yield str(xfs_dir)


class TestReflinkOnBtrfs(BackendTests):
    backend = ReflinkBackend()
    shares = True

    @pytest.fixture
    def directory(self, btrfs_dir: Path) -> Iterator[str]:
        yield str(btrfs_dir)


class TestCopyOnExt4(BackendTests):
    backend = CopyBackend()
    shares = False

    @pytest.fixture
    def directory(self, ext4_dir: Path) -> Iterator[str]:
        yield str(ext4_dir)


class TestCopy(BackendTests):
    backend = CopyBackend()
    shares = False


class TestMemory(BackendTests):
    backend = MemoryBackend()
    shares = True

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[str]:
        yield str(tmp_path)
        self.backend.files.clear()

    def read_back(self, path: str) -> bytes:
        file = self.backend.files[path]
        data: bytes = file.read(0, file.size)
        return data

    def names(self, directory: str) -> list[str]:
        return sorted(os.path.basename(path) for path in self.backend.files)


class _Unsynced(CopyBackend):
    """Never waits for storage."""

    def begin(self, directory: Directory, **options: Any) -> Transaction:
        return super().begin(directory, **{**options, "durable": False})


class _OneByOne(CopyBackend):
    """Gives each file its name by itself."""

    def begin(self, directory: Directory, **options: Any) -> Transaction:
        transaction = super().begin(directory, **options)
        assert isinstance(transaction, FileTransaction)

        def commit() -> None:
            for output in transaction._outputs:
                output.temporary.appear(replace=transaction.force)

        transaction.commit = commit  # type: ignore[method-assign]
        return transaction


class _Open(CopyBackend):
    """Lets everybody read what it makes."""

    def begin(self, directory: Directory, **options: Any) -> Transaction:
        return super().begin(directory, **{**options, "access": Access(mode=0o644)})


WRONG: dict[str, CopyBackend] = {
    "test_committed_files_were_synced": _Unsynced(),
    "test_a_set_of_a_killed_process_is_complete_or_absent": _OneByOne(),
    "test_a_new_file_grants_no_more_access_than_its_sources": _Open(),
    "test_a_replaced_file_passes_its_mode_on": _Open(),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_kit_finds_a_backend_that_breaks_a_promise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = file_of(tmp_path, b"source")
    given = {"directory": str(tmp_path), "source": source, "force": False, "monkeypatch": monkeypatch}
    for backend, right in ((CopyBackend(), True), (WRONG[name], False)):
        kit = BackendTests()
        monkeypatch.setattr(BackendTests, "backend", backend, raising=False)
        with ExitStack() as kit._stack:
            test = getattr(kit, name)
            arguments = {each: given[each] for each in inspect.signature(test).parameters}
            with nullcontext() if right else pytest.raises(AssertionError):
                test(**arguments)
        for path in tmp_path.iterdir():
            if path.name != "source":
                path.unlink()
    source.close()


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_transaction_waits_for_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with Directory.at(str(tmp_path)) as directory:
        make_one(CopyBackend().begin(directory, durable=durable))
    assert (tmp_path / "target").read_bytes() == b"bytes"
    assert bool(synced) == (str(tmp_path) in synced) == durable


def make_one(transaction: Transaction) -> None:
    output = transaction.create("target", 5, [])
    output.share(no_steps())
    output.write(0, b"bytes")
    output.finish()
    transaction.commit()


def test_partial_writes_of_the_kernel_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwrite(fd, b"".join(parts)[:5], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data)[:2], offset))
    source = Decoded(
        "letters", file_of(tmp_path, b"encoded"), unit=4, count=4, decode=letters, reason="they are made up"
    )
    with opened(tmp_path / "target", 14) as output:
        output.copy(source, 1, 0, 14)
    assert (tmp_path / "target").read_bytes() == b"AAABBBBCCCCDDD"


_MIB = 1 << 20


@pytest.mark.parametrize("durable", [True, False])
def test_durable_copies_bypass_the_page_cache(any_dir: Path, durable: bool) -> None:
    data = os.urandom(5 * _MIB + 777)
    source = file_of(any_dir, data)
    target = copied(any_dir, source, 3 * 4096, len(data), durable=durable)
    # Read past the cache too: what it holds of the target is what was written through it.
    kept = pages_in_memory(target, 3 * 4096, 5 * _MIB)
    assert target.read_bytes()[3 * 4096 :] == data
    if durable and any_dir.parent.name != "btrfs":
        assert kept == 0
    elif not durable:
        assert kept == 5 * _MIB // mmap.PAGESIZE


@pytest.mark.parametrize("offset", [0, 512, 4096])
def test_decoded_payload_is_written_past_the_page_cache(ext4_dir: Path, offset: int) -> None:
    source = Decoded("sectors", file_of(ext4_dir, b""), unit=65536, count=40, decode=sectors, reason="made up")
    length = 40 * 65536 - 100
    target = ext4_dir / "target"
    with closing(source.file), opened(target, offset + length) as output:
        output.copy(source, 0, offset, length)
    kept = pages_in_memory(target, 4096, 2 * _MIB)
    assert target.read_bytes()[offset:] == b"".join(sectors(0, 40))[:length]
    assert (kept == 0) == (offset % 4096 == 0)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOTTY])
def test_a_filesystem_that_finds_no_room_beforehand_is_written_through_the_cache(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(linux, "allocate", raising(number))
    data = os.urandom(2 * _MIB)
    assert copied(ext4_dir, file_of(ext4_dir, data), 0, len(data)).read_bytes() == data


def test_no_room_is_an_error_before_anything_is_written(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "allocate", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        copied(ext4_dir, file_of(ext4_dir, bytes(2 * _MIB)), 0, 2 * _MIB)


def test_storage_with_larger_blocks_is_written_through_the_cache(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    refused: list[int] = []

    def strict(descriptor: int, part: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if refused or offset:
                refused.append(offset)
                raise OSError(errno.EINVAL, "Invalid argument")
            # The first call is taken in part, as by storage that is nearly full.
            return pwrite(descriptor, part[:8192], offset)
        return pwrite(descriptor, part, offset)

    monkeypatch.setattr(os, "pwrite", strict)
    data = os.urandom(9 * _MIB)
    assert copied(ext4_dir, file_of(ext4_dir, data), 0, len(data)).read_bytes() == data
    assert refused == [8192]


def file_of(directory: Path, data: bytes) -> File:
    path = directory / "source"
    path.write_bytes(data)
    return File(str(path), os.open(path, os.O_RDONLY))


@contextmanager
def opened(path: Path, size: int, *, durable: bool = True) -> Iterator[FileOutput]:
    with Directory.at(str(path.parent)) as directory:
        file = Temporary(directory, path.name)
        output = FileOutput(file, size, kernel_copies=False, durable=durable)
        try:
            output.share(no_steps())
            yield output
            output.finish()
            file.appear(replace=False)
        finally:
            output.close()


def copied(directory: Path, source: File, offset: int, length: int, *, durable: bool = True) -> Path:
    with closing(source), opened(directory / "target", offset + length, durable=durable) as output:
        output.copy(source, 0, offset, length)
    return directory / "target"


def pages_in_memory(path: Path, offset: int, length: int) -> int:
    """Returns how many pages of a range of a file the page cache holds (man 2 mincore)."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found = ctypes.create_string_buffer(length // mmap.PAGESIZE)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = library.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
        assert library.mincore(address, length, found) == 0
        library.munmap(address, length)
    finally:
        os.close(descriptor)
    return sum(byte & 1 for byte in found.raw)


def raising(number: int) -> Callable[..., None]:
    def refuse(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def sectors(first: int, count: int) -> list[bytes]:
    return [bytes([number + 1]) * 65536 for number in range(first, first + count)]


def letters(first: int, count: int) -> list[bytes]:
    return [bytes([65 + number]) * 4 for number in range(first, first + count)]


def no_steps() -> ShareSteps:
    empty = np.empty(0, dtype=np.int64)
    return ShareSteps((), empty.astype(np.int32), empty, empty, empty)
