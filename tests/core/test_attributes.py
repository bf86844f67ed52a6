"""Who may do what with a file, decided from numbers alone (`vmconv.io.attributes`)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmconv.io import attributes

ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, GROUP_OBJ, MASK, OTHER = 0x01, 0x04, 0x10, 0x20
"""Tags of entries (linux/posix_acl.h)."""
NAMED_USER = 0x02

Files = Callable[..., int]


def acl_of(*entries: tuple[int, int]) -> bytes:
    """Returns an access control list of entries `(tag, permissions)`."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, bits, 0xFFFFFFFF) for tag, bits in entries)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    """Returns a function that gives descriptors of files with certain owners, modes and lists."""
    known: dict[int, SimpleNamespace] = {}

    def make(mode: int, uid: int = 1, gid: int = 2, **lists: bytes) -> int:
        descriptor = 1000 + len(known)
        known[descriptor] = SimpleNamespace(st_mode=0o100000 | mode, st_uid=uid, st_gid=gid, lists=lists)
        return descriptor

    names = {ACL: "acl", DEFAULT_ACL: "default"}
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: known.get(descriptor) or real(descriptor))
    monkeypatch.setattr(attributes, "_attribute", lambda fd, name: known[fd].lists.get(names[name]))
    return make


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "listed", "reads"),
    [
        (0o600, 1, 2, False, True),
        (0o000, 0, 9, False, True),
        (0o640, 7, 2, False, True),
        (0o600, 7, 2, False, False),
        (0o604, 7, 2, False, True),
        (0o640, 7, 3, False, False),
        (0o640, 7, 1, False, False),
        (0o604, 7, 3, False, True),
        (0o622, 7, 2, False, False),
        (0o644, 7, 2, True, False),
        (0o600, 1, 3, True, True),
    ],
)
def test_the_mode_of_a_file_decides_its_readers(
    files: Files, mode: int, uid: int, gid: int, listed: bool, reads: bool
) -> None:
    source = files(mode, **({"acl": acl_of((OTHER, 0))} if listed else {}))
    reader: Any = SimpleNamespace(st_uid=uid, st_gid=gid)
    assert attributes.lets_read(source, reader) is reads


@pytest.mark.parametrize(
    ("mode", "gid", "limit"),
    [
        (0o777, 2, 0o77),
        (0o640, 2, 0o40),
        (0o604, 2, 0o04),
        (0o640, 3, 0o00),
        (0o664, 3, 0o44),
        (0o646, 1, 0o44),
        (0o675, 3, 0o55),
        (0o4711, 2, 0o11),
    ],
)
def test_no_user_gets_more_access_than_to_the_source(files: Files, mode: int, gid: int, limit: int) -> None:
    assert attributes._limit(files(mode), gid) == limit
    assert attributes._limit(files(mode, acl=acl_of((OTHER, 7))), gid) == 0


@pytest.mark.parametrize(
    ("entries", "mode", "group"),
    [
        ([(USER_OBJ, 6), (GROUP_OBJ, 4), (OTHER, 0)], 0o640, 4),
        ([(USER_OBJ, 7), (GROUP_OBJ, 7), (OTHER, 7)], 0o666, 7),
        ([(USER_OBJ, 6), (NAMED_USER, 6), (GROUP_OBJ, 4), (MASK, 6), (OTHER, 4)], 0o664, 4),
        ([(USER_OBJ, 6), (GROUP_OBJ, 6), (MASK, 4), (OTHER, 0)], 0o640, 4),
        ([(USER_OBJ, 4), (MASK, 4)], 0o440, 0),
        ([], 0o600, 0),
    ],
)
def test_a_directory_s_list_gives_new_files_their_mode(
    files: Files, entries: list[tuple[int, int]], mode: int, group: int
) -> None:
    assert attributes._wished(files(0o755, default=acl_of(*entries))) == (mode, group)


@pytest.mark.parametrize(("mask", "mode", "group"), [(0o022, 0o644, 4), (0, 0o666, 6), (0o077, 0o600, 0)])
def test_without_a_list_the_umask_does(files: Files, mask: int, mode: int, group: int) -> None:
    before = os.umask(mask)
    try:
        assert attributes._umask() == mask
        assert attributes._wished(files(0o755)) == (mode, group)
    finally:
        os.umask(before)


def test_an_unknown_umask_is_the_strictest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tvmconv\n")
    monkeypatch.setattr("builtins.open", lambda _path, **more: (tmp_path / "status").open(**more))
    assert attributes._umask() == 0o077


@pytest.mark.parametrize(
    ("target", "refused", "calls", "given"),
    [
        ((1, 2), set(), [], True),
        ((5, 6), set(), [(1, 2)], True),
        ((1, 6), {(1, 2)}, [(1, 2), (-1, 2)], True),
        ((5, 6), {(1, 2)}, [(1, 2), (-1, 2)], False),
        ((5, 6), {(1, 2), (-1, 2)}, [(1, 2), (-1, 2)], False),
    ],
    ids=["alike", "given", "group", "group-only", "refused"],
)
def test_owner_and_group_are_given_as_far_as_they_can_be(
    monkeypatch: pytest.MonkeyPatch,
    target: tuple[int, int],
    refused: set[tuple[int, int]],
    calls: list[tuple[int, int]],
    given: bool,
) -> None:
    now, real = list(target), os.fstat
    asked: list[tuple[int, int]] = []

    def chown(_descriptor: int, uid: int, gid: int) -> None:
        asked.append((uid, gid))
        if (uid, gid) in refused:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        now[:] = [now[0] if uid == -1 else uid, gid]

    monkeypatch.setattr(os, "fchown", chown)
    monkeypatch.setattr(
        os, "fstat", lambda fd: SimpleNamespace(st_uid=now[0], st_gid=now[1]) if fd == 1000 else real(fd)
    )
    wanted: Any = SimpleNamespace(st_uid=1, st_gid=2)
    assert attributes._give(1000, wanted) is given
    assert asked == calls


NONE = [errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES]


@pytest.mark.parametrize("number", [errno.EBADF, errno.EIO, *NONE])
def test_a_directory_that_may_only_be_entered_has_attributes_all_the_same(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    asked: list[int | str] = []

    def getxattr(place: int | str, _name: str) -> bytes:
        asked.append(place)
        if place == 5:
            raise OSError(number, os.strerror(number))
        return b"list"

    monkeypatch.setattr(os, "getxattr", getxattr)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            attributes._attribute(5, ACL)
    else:
        assert attributes._attribute(5, ACL) == (None if number in NONE else b"list")
    # Opened by O_PATH, it has no attributes but by its path.
    assert asked == ([5, "/proc/self/fd/5"] if number == errno.EBADF else [5])
