"""Which error of a system call is taken for which answer, and that no other is taken for any."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from support.disks import MIB
from vmconv.backends.files import FileTransaction
from vmconv.backends.temporary import Temporary, remove_stale, temporary_name
from vmconv.cli.main import main
from vmconv.errors import AccessError, BackendError, ImageError, PluginError, ReadError
from vmconv.io import discovery, locks
from vmconv.io.directory import Directory
from vmconv.io.opener import Opener
from vmconv.io.physical import PhysicalMap
from vmconv.io.registry import installed
from vmconv.model.extents import Extents
from vmconv.model.sources import File
from vmconv.model.view import View
from vmconv.system import linux
from vmconv.testing import random_bytes

NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)


def failing(number: int, *, only: Callable[..., bool] = lambda *_: True, real: Any = None) -> Callable[..., Any]:
    """Returns what fails with the given error, for the calls that are meant."""

    def fails(*arguments: Any, **named: Any) -> Any:
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    return fails


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    path = tmp_path / "disk.raw"
    path.write_bytes(random_bytes(MIB))
    file = File(str(path), os.open(path, os.O_RDONLY))
    yield file
    file.close()


# -- reading and syncing


@pytest.mark.parametrize("number", [errno.EROFS, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP])
def test_files_without_fsync_have_nothing_to_sync(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    file.sync()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_sync_that_fails_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(ReadError, match=f"^disk.raw: cannot be synced to storage: {os.strerror(number)}$"):
        file.sync()


@pytest.mark.parametrize("whole", [True, False])
def test_storage_that_cannot_be_read_is_named(file: File, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    for call in ("pread", "preadv"):
        monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(ReadError, match=r"^disk.raw: cannot be read at 0x200: Input/output error$"):
        if whole:
            file.read(512, 512)
        else:
            file.read_into(512, memoryview(bytearray(512)))


def test_short_reads_are_continued_and_the_end_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file.read(0, MIB)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, max(1, length // 2), at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][: len(buffers[0]) // 2]], at))
    assert file.read(100, 1000) == content[100:1100]
    buffer = bytearray(1000)
    file.read_into(100, memoryview(buffer))
    assert buffer == content[100:1100]
    with pytest.raises(ImageError, match=r"^disk.raw: ends at 0x100000 where "):
        file.read_into(MIB - 500, memoryview(buffer))


def test_a_file_that_cannot_be_read_is_not_raw(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with pytest.raises(ReadError):
        installed().probe(file)


# -- locks


@pytest.mark.parametrize("number", [*NOT_SUPPORTED, errno.EINVAL, errno.ENOLCK])
def test_without_locks_no_user_is_found(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    locks.share(file)
    assert not locks.is_written(file)
    locks.refuse_users(file)
    locks.claim(file.descriptor)
    locks.release(file)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_locked_image_is_in_use(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    locked = failing(number, only=lambda _, command, *__: command == fcntl.F_OFD_SETLK, real=fcntl.fcntl)
    monkeypatch.setattr(fcntl, "fcntl", locked)
    with pytest.raises(AccessError, match=r"^disk.raw: is open for writing in another process"):
        locks.share(file)
    with pytest.raises(AccessError, match=r"disk.raw: is open in another process$"):
        locks.claim(file.descriptor)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EPERM])
@pytest.mark.parametrize(
    "ask", [locks.share, locks.is_written, locks.refuse_users, lambda file: locks.claim(file.descriptor)]
)
def test_locks_that_fail_are_an_error(
    file: File, monkeypatch: pytest.MonkeyPatch, number: int, ask: Callable[[File], Any]
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    with pytest.raises(AccessError, match=rf"disk.raw: cannot be locked: {os.strerror(number)}$"):
        ask(file)


@pytest.mark.parametrize(("number", "expected"), [(errno.EAGAIN, True), (errno.EACCES, False), (errno.EINVAL, False)])
def test_a_lease_is_busy_or_not_there(file: File, monkeypatch: pytest.MonkeyPatch, number: int, expected: bool) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(number))
    assert linux.is_open_for_writing(file.descriptor) is expected


def test_a_lease_that_fails_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = failing(errno.EIO, only=lambda _, command, *__: command == fcntl.F_SETLEASE, real=fcntl.fcntl)
    monkeypatch.setattr(fcntl, "fcntl", lease)
    with pytest.raises(AccessError, match=r"disk.raw: cannot be checked for writers: Input/output error$"):
        locks.refuse_users(file)


def test_a_lock_that_cannot_be_released_is_no_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO))
    locks.release(file)


def test_a_lease_that_cannot_be_given_back_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end this process with a signal as soon as somebody opens the file for writing."""
    back = failing(errno.EINVAL, only=lambda *call: call[2] == fcntl.F_UNLCK, real=lambda *_: 0)
    monkeypatch.setattr(fcntl, "fcntl", back)
    with pytest.raises(OSError, match="Invalid argument"):
        linux.is_open_for_writing(file.descriptor)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_temporary_files_need_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with Directory.at(str(tmp_path)) as directory:
        file = Temporary(directory, "disk.raw", temporary_name("disk.raw"))
        # Without locks nobody knows whether the run is dead.
        assert remove_stale(directory, ["disk.raw"]) == []
        file.appear(replace=False)
        file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


@pytest.mark.parametrize("name", [None, temporary_name("disk.raw")], ids=["nameless", "named"])
def test_a_temporary_file_that_cannot_be_locked_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with Directory.at(str(tmp_path)) as directory, pytest.raises(AccessError, match="cannot be locked: Input/output"):
        Temporary(directory, "disk.raw", name)
    assert not list(tmp_path.iterdir())


# -- what filesystems know


@pytest.mark.parametrize("number", [*NOT_SUPPORTED, errno.EINVAL])
def test_attributes_may_be_unknown(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "ioctl", failing(number))
    assert not linux.is_nocow(file.descriptor)
    assert linux.generation(file.descriptor) is None
    assert linux.filesystem_id(file.descriptor) == file.stamp.device.to_bytes(8, "little")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("ask", [linux.is_nocow, linux.generation, linux.filesystem_id, linux.extents])
def test_attributes_that_cannot_be_read_are_an_error(
    file: File, monkeypatch: pytest.MonkeyPatch, number: int, ask: Callable[[int], Any]
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        ask(file.descriptor)
    assert caught.value.filename == file.path


@pytest.mark.parametrize("number", [*NOT_SUPPORTED, errno.EBADR, errno.EPERM])
def test_places_may_be_unknown(file: File, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    # The first question is of which filesystem it is.
    fiemap = failing(number, only=lambda _, request, *__: request == 0xC020660B, real=fcntl.ioctl)
    monkeypatch.setattr(fcntl, "ioctl", fiemap)
    assert PhysicalMap().apply(Extents.whole(file)).sources == (file,)


def test_places_that_cannot_be_read_are_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", failing(errno.EIO))
    with pytest.raises(ReadError, match=r"disk.raw: extent map cannot be read: Input/output error$"):
        PhysicalMap().apply(Extents.whole(file))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_directories_may_have_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fsync = failing(number, only=lambda fd: os.path.isdir(f"/proc/self/fd/{fd}"), real=os.fsync)
    monkeypatch.setattr(os, "fsync", fsync)
    with Directory.at(str(tmp_path)) as directory:
        transaction = FileTransaction(directory, force=False, durable=True)
        transaction.create("disk.raw", 512, []).write(0, b"\x01" * 512)
        transaction.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


def test_a_directory_that_cannot_be_synced_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = failing(errno.EIO, only=lambda fd: os.path.isdir(f"/proc/self/fd/{fd}"), real=os.fsync)
    monkeypatch.setattr(os, "fsync", fsync)
    with Directory.at(str(tmp_path)) as directory:
        transaction = FileTransaction(directory, force=False, durable=True)
        transaction.create("disk.raw", 512, []).write(0, b"\x01" * 512)
        with pytest.raises(BackendError, match=r"Input/output error$"):
            transaction.commit()
        transaction.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"nonsense\n",
        b"36 35 98:0 / /\n",
        b"36 35 98:0 / / rw - \n",
        b"\xff\xfe - ext4\n",
    ],
)
def test_a_table_of_mounts_may_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: bytes) -> None:
    (tmp_path / "mountinfo").write_bytes(table)
    redirect(monkeypatch, tmp_path / "mountinfo")
    assert linux.mount_of(str(tmp_path)).point == "/"


def test_there_may_be_no_table_of_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, tmp_path / "missing")
    assert linux.mount_of(str(tmp_path))[:2] == ("unknown filesystem", "/")


@pytest.mark.parametrize("name", ["a b", "a\tb", "a\nb", "a\\b", "a\\040b", "\udcff"])
def test_names_of_mount_points_may_be_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    point = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    os.mkdir(point)
    escaped = point.replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011").replace(b"\n", b"\\012")
    (tmp_path / "mountinfo").write_bytes(
        b"22 1 8:1 / / rw - ext4 /dev/sda rw\n" + b"36 22 98:0 / " + escaped + b" rw shared:7 - xfs /dev/sdb rw\n"
    )
    redirect(monkeypatch, tmp_path / "mountinfo")
    assert linux.mount_of(os.fsdecode(point) + "/file")[:2] == ("xfs", os.fsdecode(point))


def redirect(monkeypatch: pytest.MonkeyPatch, table: Path) -> None:
    """Makes a file the kernel's table of mounts."""
    monkeypatch.setattr(linux, "open", lambda _, mode: table.open(mode), raising=False)


# -- what is looked for


def test_a_directory_of_plugins_that_cannot_be_listed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error"):
        discovery.entry_points("vmconv")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EACCES])
def test_a_missing_path_has_no_plugins(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "listdir", failing(number))
    assert discovery.entry_points("vmconv") == []


def test_the_version_is_that_of_importlib_metadata() -> None:
    for name in ("vmconv", "vmconv-raw", "numpy", "cryptography"):
        assert discovery.version(name) == metadata.version(name)
    assert discovery.version("VMCONV_raw") == metadata.version("vmconv-raw")


def test_a_distribution_that_is_not_installed_has_no_version() -> None:
    with pytest.raises(PluginError, match="distribution 'vmconv-none' is not installed"):
        discovery.version("vmconv-none")


@pytest.mark.parametrize(("number", "found"), [(errno.EACCES, True), (errno.ENOENT, True), (errno.EMFILE, False)])
def test_unreadable_candidates_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, found: bool
) -> None:
    for name in ("a.vdi", "b.vdi", "origin.vdi"):
        (tmp_path / name).write_bytes(bytes(512))
    with Opener(installed(), allow_external=[str(tmp_path)]) as opener:
        origin = opener.file(str(tmp_path / "origin.vdi"))
        real = os.open
        only = lambda path, *_: str(path).endswith("a.vdi")  # noqa: E731
        monkeypatch.setattr("vmconv.io.opener.os.open", failing(number, only=only, real=real))
        if found:
            assert [os.path.basename(path) for path, _ in opener.search(origin, ".vdi")] == ["b.vdi"]
        else:
            with pytest.raises(AccessError, match=r"a.vdi: cannot be opened: Too many open files"):
                list(opener.search(origin, ".vdi"))


# -- sending


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOVERFLOW, errno.EIO, errno.EPERM])
def test_files_without_sendfile_are_read_and_written(
    file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "sendfile", failing(number))
    with (tmp_path / "out").open("wb") as out:
        View(Extents.whole(file)).send(out.fileno(), 0, MIB)
    assert (tmp_path / "out").read_bytes() == file.read(0, MIB)


def test_a_pipe_that_does_not_block_is_waited_for(file: File) -> None:
    import threading

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    waited = []

    def wait(descriptor: int) -> None:
        import select

        waited.append(descriptor)
        select.select([], [descriptor], [])

    def send() -> None:
        View(Extents.whole(file)).send(writing, 0, MIB, wait)
        os.close(writing)

    sender = threading.Thread(target=send)
    sender.start()
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == file.read(0, MIB)
    sender.join()
    assert waited


def test_a_write_that_writes_nothing_does_not_last_for_ever(
    file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sendfile", failing(errno.EINVAL))
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with (tmp_path / "out").open("wb") as out, pytest.raises(OSError, match=r"nothing was written"):
        View(Extents.whole(file)).send(out.fileno(), 0, MIB)


def test_an_error_is_no_answer_of_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).write_bytes(bytes(512))
    monkeypatch.setattr("vmconv.io.opener.File", failing(errno.EIO))
    assert main(["compare", str(tmp_path / "a.raw"), str(tmp_path / "b.raw")]) == 2
    assert capsys.readouterr().err == f"vmconv: {tmp_path}/a.raw: Input/output error\n"
