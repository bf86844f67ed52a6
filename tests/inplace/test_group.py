"""The journal of a machine that is converted in place: what is read back, and what is refused or ignored."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import vmconv
from vmconv.backends.targets import open_directory
from vmconv.errors import ImageError, PlanError, VmconvError
from vmconv.inplace import group
from vmconv.inplace.group import Changing, Group, Small
from vmconv.inplace.names import GROUP, UNDO
from vmconv.inplace.syscalls import Syscalls

GOOD = Group(
    (("a.vmdk", "a.qcow2"), ("b.vmdk", "b.qcow2")), (Small("n.fd", b"12"), Small("m.xml", b"<m/>")), 0o640, False
)


def body(content: bytes = b"12<m/>", **changes: Any) -> bytes:
    values = {"disks": [["a", "b"]], "files": [["n", 2], ["m", 4]], "mode": 0o640, "keep_undo": False, **changes}
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + content


def test_a_group_is_read_back() -> None:
    assert group.parse(GOOD.encoded(), "j") == GOOD
    assert GOOD.entry == f"m.xml{GROUP}"
    assert GOOD.names == {"a.vmdk", "a.qcow2", "b.vmdk", "b.qcow2", "n.fd", "m.xml"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"disks": [["../a", "b"]]}, "disks at 0x"),
        ({"disks": [["a", "/etc/passwd"]]}, "disks at 0x"),
        ({"disks": [["a"]]}, "an old and a new name"),
        ({"disks": 7}, "a list of at most"),
        ({"files": [["n", 2], ["..", 4]]}, "name of a file in the same directory"),
        ({"files": [["n", 2], ["n", 4]]}, "different names"),
        ({"files": [["n", -1], ["m", 7]]}, "a number from 0"),
        ({"files": [["n", 2], ["m", 5]]}, "have not the 6 bytes"),
        ({"files": []}, "have not the 6 bytes"),
        ({"files": ["n"]}, "a name and a size"),
        ({"mode": 0o4755}, "a number from 0 to 511"),
        ({"keep_undo": 1}, "true or false"),
        ({"more": 1}, "is unknown"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_damaged_group_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        group.parse(body(**changes), "j")


def made(directory: Path) -> Path:
    """Makes the journal of a run that was killed before its first disk."""
    with open_directory(str(directory)) as place:
        changing = Changing(place, Group((("a.raw", "a.qcow2"),), (Small("m.xml", b"<m/>"),), 0o600, False), Syscalls())
        changing.begin()
        with pytest.raises(VmconvError, match="is running"):
            vmconv.recover(directory / "m.xml")
        changing.close()
    return directory / f"m.xml{GROUP}"


@pytest.mark.parametrize("name", ["m.xml", f"m.xml{GROUP}", "a.raw", "a.qcow2"])
def test_any_of_its_names_finds_a_group(name: str, xfs_dir: Path) -> None:
    journal = made(xfs_dir)
    (xfs_dir / "a.raw").write_bytes(bytes(4096))
    assert vmconv.recover(xfs_dir / name).forward is False
    assert not journal.exists() and (xfs_dir / "a.raw").exists()


def test_a_torn_journal_is_removed(xfs_dir: Path) -> None:
    journal = made(xfs_dir)
    journal.write_bytes(journal.read_bytes()[:-3])
    assert vmconv.recover(xfs_dir / "m.xml").forward is False
    assert not journal.exists()


def test_a_planted_journal_is_not_followed(xfs_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = made(xfs_dir)
    (xfs_dir / "else").mkdir()
    moved = xfs_dir / "else" / journal.name
    journal.rename(moved)
    # As if committed: following it would make m.xml.
    content = moved.read_bytes()
    moved.write_bytes(content + content[72:104])
    with pytest.raises(VmconvError, match="no mark of this user's vmconv for this directory"):
        vmconv.recover(xfs_dir / "else" / "m.xml")
    with pytest.raises(VmconvError):
        vmconv.info(xfs_dir / "else" / "m.xml")
    assert "is ignored" in caplog.text
    assert not (xfs_dir / "else" / "m.xml").exists()
    assert vmconv.recover(xfs_dir / "else" / "m.xml", trust=True).forward is True
    assert (xfs_dir / "else" / "m.xml").read_bytes() == b"<m/>"


@pytest.mark.parametrize("keep", [False, True])
def test_a_completed_group_keeps_undo_files_if_wanted(xfs_dir: Path, keep: bool) -> None:
    wanted = Group((("a.raw", "a.qcow2"),), (Small("m.xml", b"<m/>"),), 0o600, keep)
    undo = xfs_dir / f"a.qcow2{UNDO}"
    undo.touch()
    with open_directory(str(xfs_dir)) as place:
        changing = Changing(place, wanted, Syscalls())
        changing.begin()
        with changing.written() as (transaction, _):
            changing.finish(transaction)
        changing.close()
    assert (xfs_dir / "m.xml").read_bytes() == b"<m/>"
    assert {path.name for path in xfs_dir.iterdir()} == {"m.xml", *([undo.name] if keep else [])}


def test_a_second_run_does_not_begin_beside_a_journal(xfs_dir: Path) -> None:
    made(xfs_dir)
    with open_directory(str(xfs_dir)) as place, pytest.raises(PlanError, match="is in the way"):
        Changing(place, GOOD, Syscalls()).begin()
