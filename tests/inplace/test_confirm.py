"""A file is checked after the commit of a change in place, before it gets its name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.disks import MIB, make_disk
from support.inplace import in_place, names
from vmconv import api
from vmconv.errors import VerifyError
from vmconv.inplace.journalled import Journalled
from vmconv.inplace.names import JOURNAL, WORKING
from vmconv.inplace.syscalls import Syscalls

BLOCK = 4096


class WrongCalls(Syscalls):
    """Errs in one way once a change is committed."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong
        self.committed = False

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        if self.wrong == "punches a block too much":
            super().punch(descriptor, offset, length + BLOCK)
        elif self.wrong == "punches too much":
            super().punch(descriptor, offset, length + 2 * MIB)
        elif self.wrong != "punches nothing":
            super().punch(descriptor, offset, length)

    def truncate(self, descriptor: int, size: int) -> None:
        super().truncate(descriptor, size + (BLOCK if self.committed and self.wrong == "truncates badly" else 0))

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if not (self.committed and self.wrong == "loses writes"):
            super().write(descriptor, data, offset)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(what: str) -> None:
        calls = WrongCalls(what)
        commit = Journalled._commit

        def committed(self: Journalled, path: str) -> None:
            commit(self, path)
            calls.committed = True

        monkeypatch.setattr(Journalled, "_commit", committed)
        monkeypatch.setattr("vmconv.inplace.stay.Syscalls", lambda: calls)

    return use


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("punches a block too much", "has lost its data at 0x10000;"),
        ("punches too much", "has lost its data at 0x"),
        ("truncates badly", "bytes instead of"),
    ],
    ids=["metadata", "payload", "truncate"],
)
def test_a_conversion_that_is_done_wrongly_after_its_commit_is_no_success(
    ext4_dir: Path, wrong: Callable[[str], None], what: str, said: str
) -> None:
    disk, target = ext4_dir / "disk.raw", ext4_dir / "new.qcow2"
    disk.write_bytes(os.urandom(8 * MIB))
    api.convert(str(disk), str(target))
    disk.unlink()
    wrong(what)
    with pytest.raises(VerifyError, match=said) as error:
        in_place(target, ext4_dir / "new.vhdx")
    assert f"is committed, and the disk is {target}{WORKING} now" in str(error.value)
    assert names(ext4_dir) == {f"new.qcow2{WORKING}", f"new.qcow2{JOURNAL}"}


@pytest.mark.parametrize(
    ("what", "said", "format_name"),
    [
        ("loses writes", "has other bytes than the journal at 0x", "raw"),
        ("punches nothing", "is not zero behind 0x", "raw"),
        # A part of a block of the disk, which a guest reads.
        ("punches nothing", "is not zero behind 0x", "vdi"),
    ],
    ids=["write", "punch-raw", "punch-vdi"],
)
def test_a_sync_that_is_done_wrongly_after_its_commit_is_no_success(
    ext4_dir: Path, tmp_path: Path, wrong: Callable[[str], None], what: str, said: str, format_name: str
) -> None:
    disk, target = tmp_path / "disk.raw", ext4_dir / "target"
    disk.write_bytes(os.urandom(8 * MIB))
    api.sync(str(disk), str(target), target_format=format_name)
    with disk.open("r+b") as file:
        file.seek(MIB + 512)
        file.write(os.urandom(MIB // 2))
        file.seek(5 * MIB + 512)
        file.write(bytes(MIB // 2))
    subprocess.run(["fallocate", "--dig-holes", disk], check=True)
    wrong(what)
    with pytest.raises(VerifyError, match=said):
        api.sync(str(disk), str(target), target_format=format_name)
    assert not target.exists()


def test_a_change_that_was_lost_is_written_again_by_recovery(
    ext4_dir: Path, tmp_path: Path, wrong: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, target = make_disk(tmp_path / "disk.raw", 8 * MIB), ext4_dir / "target"
    api.sync(str(disk), str(target), target_format="raw")
    with disk.open("r+b") as file:
        file.write(os.urandom(BLOCK))
    wrong("loses writes")
    with pytest.raises(VerifyError):
        api.sync(str(disk), str(target), target_format="raw")
    monkeypatch.undo()
    api.recover(str(target))
    assert target.read_bytes() == disk.read_bytes()
