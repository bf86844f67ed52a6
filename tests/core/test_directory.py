"""A directory that is named once, and what a file that takes another's place carries."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmconv.errors import AccessError
from vmconv.io import attributes
from vmconv.io.directory import Directory
from vmconv.model.sources import File
from vmconv.system import linux

ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
BOB = 1234


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory.at(str(tmp_path)) as found:
        yield found


# The directory


def test_all_happens_in_the_directory_that_was_opened(tmp_path: Path) -> None:
    """Its owner has exchanged it for another one meanwhile."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "disk").write_bytes(b"own")
    with Directory.at(str(tmp_path / "own")) as found:
        (tmp_path / "own").rename(tmp_path / "moved")
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "disk").write_bytes(b"victim")
        os.close(found.create("new"))
        found.link("new", "other")
        found.rename("disk", "renamed", replace=False)
        found.unlink("new")
        found.sync()
        assert found.names() == ["other", "renamed"]
        assert not found.is_same(str(tmp_path / "own"))
        assert found.real() == str(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["disk"]
    assert (tmp_path / "own" / "disk").read_bytes() == b"victim"


def test_the_directory_of_a_file_is_the_one_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    (tmp_path / "link").symlink_to("disk")
    file = File(str(tmp_path / "link"), os.open(tmp_path / "link", os.O_RDONLY))
    with Directory.of(file) as found:
        assert found.path == str(tmp_path)
        assert found.holds("disk", file.descriptor)
        assert not found.holds("link", file.descriptor)
    (tmp_path / "disk").rename(tmp_path / "moved")
    (tmp_path / "disk").write_bytes(b"another")
    with pytest.raises(AccessError, match="was moved or replaced"):
        Directory.of(file)
    file.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b"])
def test_only_plain_names_are_taken(directory: Directory, name: str) -> None:
    for call in (directory.create, directory.unlink, directory.open, directory.status):
        with pytest.raises(ValueError, match="not a plain name"):
            call(name)
    with pytest.raises(ValueError, match="not a plain name"):
        directory.rename("disk", name, replace=True)
    with pytest.raises(ValueError, match="not a plain name"):
        directory.link(name, "disk")


def test_a_special_file_is_not_opened(tmp_path: Path, directory: Directory) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("pipe", "folder"):
        with pytest.raises(AccessError, match=f"{name}: is not a regular file"):
            directory.open(name)
    with pytest.raises(OSError, match="symbolic links"):
        directory.open("link")


def test_errors_name_the_whole_path(tmp_path: Path, directory: Directory) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        directory.open("gone")
    assert caught.value.filename == str(tmp_path / "gone")
    directory.create("one")
    directory.create("two")
    with pytest.raises(FileExistsError) as exists:
        directory.rename("one", "two", replace=False)
    assert (exists.value.filename, exists.value.filename2) == (str(tmp_path / "one"), str(tmp_path / "two"))
    with pytest.raises(FileExistsError):
        directory.create("two")


def test_the_umask_takes_nothing(tmp_path: Path, directory: Directory) -> None:
    before = os.umask(0o777)
    try:
        os.close(directory.create("private"))
        os.close(directory.create("shared", 0o640))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o640


# What takes another file's place


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Returns an access control list of entries `(tag, permissions, id)`."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY_IN_PARTICULAR = 0xFFFFFFFF


def with_bob(mask: int, other: int) -> bytes:
    """Returns a list that lets one more user read and write."""
    rest = [(tag, bits, NOBODY_IN_PARTICULAR) for tag, bits in ((4, 4), (0x10, mask), (0x20, other))]
    return acl((1, 6, NOBODY_IN_PARTICULAR), (2, 6, BOB), *rest)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pair(folder: Path) -> tuple[Path, Path]:
    old, new = folder / "old", folder / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    new.chmod(0o600)
    return old, new


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_replacement_keeps_the_attributes_of_the_file(ext4_dir: Path) -> None:
    old, new = pair(ext4_dir)
    os.setxattr(old, "user.note", b"kept")
    os.setxattr(old, ACL, with_bob(6, 0))
    os.chown(old, BOB, 4321)
    with opened(old) as source, opened(new) as target:
        linux.set_inode_flags(source, linux.inode_flags(source) | 0x40)
        assert attributes.carry(source, target) == ()
        assert linux.inode_flags(target) & 0x40
    assert (mode(new), new.stat().st_uid, new.stat().st_gid) == (0o660, BOB, 4321)
    assert os.getxattr(new, ACL) == os.getxattr(old, ACL)
    assert os.getxattr(new, "user.note") == b"kept"


@pytest.mark.parametrize("bits", [0o4755, 0o2755, 0o1755, 0o7777])
def test_bits_that_give_power_are_not_carried(tmp_path: Path, bits: int) -> None:
    old, new = pair(tmp_path)
    old.chmod(bits)
    with opened(old) as source, opened(new) as target:
        attributes.carry(source, target)
    assert mode(new) == bits & 0o777


def test_a_list_that_the_directory_gives_to_new_files_is_not_kept(ext4_dir: Path) -> None:
    old = ext4_dir / "old"
    old.write_bytes(b"old")
    old.chmod(0o640)
    os.setxattr(ext4_dir, DEFAULT_ACL, with_bob(6, 4))
    new = ext4_dir / "new"
    os.close(os.open(new, os.O_CREAT | os.O_RDWR, 0o600))
    assert os.getxattr(new, ACL)
    with opened(old) as source, opened(new) as target:
        attributes.carry(source, target)
    assert mode(new) == 0o640
    with pytest.raises(OSError, match="No data"):
        os.getxattr(new, ACL)


@pytest.mark.parametrize("fails", ["fchown", "setxattr"])
def test_attributes_that_cannot_be_carried_leave_access_to_the_owner_only(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    old, new = pair(ext4_dir)
    os.setxattr(old, ACL, with_bob(6, 4))
    os.chown(old, BOB, BOB)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with opened(old) as source, opened(new) as target:
        monkeypatch.setattr(os, fails, refused)
        missing = attributes.carry(source, target)
    assert missing == {"fchown": ("owner and group",), "setxattr": ("access control list",)}[fails]
    assert mode(new) == 0o600 or not mode(new) & 0o077


NO_CALL = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)
"""Answers of filesystems without a call."""
DENIED = (errno.EPERM, errno.EACCES)
ANSWERS = [
    (os, "fchown", (*NO_CALL, *DENIED), ("owner and group",)),
    (
        os,
        "setxattr",
        (*NO_CALL, *DENIED, errno.ENOSPC, errno.EDQUOT, errno.ERANGE, errno.E2BIG),
        ("access control list",),
    ),
    (os, "listxattr", (*NO_CALL, *DENIED), ()),
    (os, "removexattr", (*NO_CALL, errno.ENODATA), ()),
    (linux, "inode_flags", (*NO_CALL, *DENIED), ()),
]


@pytest.mark.parametrize(("module", "call", "answers", "missing"), ANSWERS, ids=[each[1] for each in ANSWERS])
def test_only_certain_answers_say_that_something_cannot_be_carried(
    ext4_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    call: str,
    answers: tuple[int, ...],
    missing: tuple[str, ...],
) -> None:
    old, new = pair(ext4_dir)
    if call == "setxattr":
        os.setxattr(old, ACL, with_bob(6, 4))
    if call == "fchown":
        os.chown(old, BOB, BOB)
    told = [0]

    def refused(*_: object) -> None:
        raise OSError(told[0], os.strerror(told[0]))

    with opened(old) as source, opened(new) as target:
        monkeypatch.setattr(module, call, refused)
        for number in answers:
            told[0] = number
            assert attributes.carry(source, target) == missing
        told[0] = errno.EIO
        with pytest.raises(OSError, match="Input/output error"):
            attributes.carry(source, target)


# A new file


CONFINED = [
    # umask, mode of the source, mode of the new file
    (0o022, 0o644, 0o644),
    (0o022, 0o600, 0o600),
    (0o022, 0o640, 0o640),
    (0o022, 0o444, 0o644),
    (0o077, 0o644, 0o600),
    (0o000, 0o604, 0o604),
    (0o777, 0o644, 0o000),
]


@pytest.mark.parametrize(("mask", "given", "wanted"), CONFINED)
def test_a_new_file_is_readable_only_to_users_who_can_read_its_source(
    tmp_path: Path, directory: Directory, mask: int, given: int, wanted: int
) -> None:
    old, new = pair(tmp_path)
    old.chmod(given)
    before = os.umask(mask)
    try:
        with opened(old) as source, opened(new) as target:
            attributes.confine(directory.descriptor, [source], target)
    finally:
        os.umask(before)
    assert mode(new) == wanted


def test_all_sources_count(tmp_path: Path, directory: Directory) -> None:
    old, new = pair(tmp_path)
    base = tmp_path / "base"
    base.write_bytes(b"base")
    old.chmod(0o644)
    base.chmod(0o600)
    with opened(old) as source, opened(base) as other, opened(new) as target:
        attributes.confine(directory.descriptor, [source, other], target)
    assert mode(new) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize(("given", "wanted"), [(0o640, 0o600), (0o644, 0o644), (0o604, 0o600)])
def test_another_group_s_members_are_others(tmp_path: Path, directory: Directory, given: int, wanted: int) -> None:
    old, new = pair(tmp_path)
    old.chmod(given)
    os.chown(old, -1, 4321)
    with opened(old) as source, opened(new) as target:
        attributes.confine(directory.descriptor, [source], target)
    assert mode(new) == wanted


@pytest.mark.parametrize(("given", "bob"), [(0o600, False), (0o640, False), (0o644, True)])
def test_readers_allowed_by_the_directory_must_be_able_to_read_the_source(
    ext4_dir: Path, given: int, *, bob: bool
) -> None:
    old = ext4_dir / "old"
    old.write_bytes(b"old")
    old.chmod(given)
    os.setxattr(ext4_dir, DEFAULT_ACL, with_bob(6, 4))
    new = ext4_dir / "new"
    with Directory.at(str(ext4_dir)) as directory:
        os.close(directory.create("new"))
        with opened(old) as source, opened(new) as target:
            attributes.confine(directory.descriptor, [source], target)
    assert mode(new) == {0o600: 0o600, 0o640: 0o640, 0o644: 0o644}[given]
    assert (ACL in os.listxattr(new)) is bob


def test_a_source_with_a_list_is_its_owner_s_alone(ext4_dir: Path) -> None:
    old, new = pair(ext4_dir)
    os.setxattr(old, ACL, with_bob(6, 4))
    with Directory.at(str(ext4_dir)) as directory, opened(old) as source, opened(new) as target:
        attributes.confine(directory.descriptor, [source], target)
    assert mode(new) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_users_other_than_root_can_give_only_own_files(tmp_path: Path) -> None:
    code = (
        "import os, sys; from vmconv.io import attributes; found = [os.stat(path) for path in sys.argv[1:]]\n"
        "os.setgroups([77]); os.setgid(1000); os.setuid(1000)\n"
        "print(*map(attributes.can_give, found))"
    )
    paths = []
    for number, (uid, gid) in enumerate([(1000, 1000), (1000, 77), (1000, 78), (1001, 1000)]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(b"")
        os.chown(paths[-1], uid, gid)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.split() == ["True", "True", "False", "False"]


def test_a_directory_is_closed_once(tmp_path: Path) -> None:
    """Closed again it closes nothing that got its number meanwhile, and no standard stream."""
    directory = Directory.at(str(tmp_path))
    number = directory.descriptor
    directory.close()
    assert directory.descriptor < 0
    with opened(Path("/dev/null")) as other:
        assert other == number
        directory.close()
        assert os.fstat(other).st_rdev


@pytest.mark.parametrize(("value", "missing"), [(b"1", ()), (b"2", ("extended attributes",))])
def test_equal_attributes_need_no_permission_to_set_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes, missing: tuple[str, ...]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name, content in (("source", value), ("target", b"1")):
        (tmp_path / name).touch()
        os.setxattr(tmp_path / name, "user.origin", content)
    monkeypatch.setattr(os, "setxattr", refuse)
    with opened(tmp_path / "source") as source, opened(tmp_path / "target") as target:
        assert attributes.carry(source, target) == missing


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT])
def test_a_scratch_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    if number is not None:
        monkeypatch.setattr(Directory, "create_unnamed", refusing(number))
    with Directory.at(str(tmp_path)) as directory:
        descriptor = directory.create_scratch()
    try:
        assert os.pwrite(descriptor, b"written", 0) == len(b"written")
        assert os.pread(descriptor, 9, 0) == b"written"
        assert os.fstat(descriptor).st_nlink == 0
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
    finally:
        os.close(descriptor)
    assert list(tmp_path.iterdir()) == []


def test_a_full_filesystem_is_not_one_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Directory, "create_unnamed", refusing(errno.ENOSPC))
    with Directory.at(str(tmp_path)) as directory, pytest.raises(OSError, match="No space left"):
        directory.create_scratch()


def refusing(number: int) -> Callable[[Directory], int]:
    def refuse(_directory: Directory) -> int:
        raise OSError(number, os.strerror(number))

    return refuse
