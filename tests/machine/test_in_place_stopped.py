"""A machine's conversion in place that is stopped or fails anywhere leaves the old machine, or makes the new one."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import vmconv
from support.crash import KILLED, failing_at, in_child, killed_at
from support.disks import MIB, make_disk
from support.toy_machines import machine, names
from vmconv.errors import AccessError, VmconvError
from vmconv.inplace.names import GROUP

pytestmark = pytest.mark.usefixtures("toys")

NEW = ["new-disk1.qcow2", "new-disk2.qcow2", "new.toy", "web.toy"]


MOST = 110
"""More calls than a conversion makes."""


class Work:
    """A machine of two disks on ext4, converted in place in copies of its directory."""

    def __init__(self, directory: Path) -> None:
        self.original = directory / "original"
        machine(self.original, disks=[{"file": "system.raw"}, {"file": "data.qcow2"}])
        (self.original / "old.vmdk").unlink()
        make_disk(self.original / "system.raw", 1 * MIB)
        (self.original / "data.qcow2").unlink()
        vmconv.convert(self.original / "system.raw", self.original / "data.qcow2")
        self.before = self.contents(self.original)
        self.directory = directory / "work"
        self.fresh()
        self.convert()
        self.after = self.contents(self.directory)
        assert sorted(self.after) == NEW

    def fresh(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(self.original, self.directory)

    def convert(self) -> None:
        vmconv.machine_convert(
            self.directory / "web.toy", self.directory / "new.toy", disk_format="qcow2", in_place=True
        )

    @staticmethod
    def contents(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    def outcome(self) -> str:
        found = self.contents(self.directory)
        assert found in (self.before, self.after), names(self.directory)
        return "before" if found == self.before else "after"


@pytest.fixture
def work(ext4_dir: Path) -> Work:
    return Work(ext4_dir)


def recover(work: Work, name: str) -> None:
    vmconv.recover(work.directory / name)


def retry(work: Work) -> None:
    """Converts again, as a user does."""
    try:
        work.convert()
    except VmconvError as exc:
        # It is complete already, or was completed now.
        assert work.outcome() == "after", exc


WAYS: tuple[Callable[[Work], None], ...] = (
    lambda work: recover(work, "new.toy"),
    lambda work: recover(work, "system.raw"),
    retry,
)


def test_a_killed_conversion_is_turned_back_or_completed(work: Work) -> None:
    outcomes = []
    for number in itertools.count():
        work.fresh()
        if (code := in_child(work.convert, killed_at(number))) != KILLED:
            break
        way = WAYS[number % len(WAYS)]
        try:
            way(work)
        except AccessError as exc:
            assert "does not exist" in str(exc)
        outcome = work.outcome()
        if way is retry:
            assert outcome == "after", number
        else:
            outcomes.append(outcome)
    assert code == 0 and number > 50
    assert outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"before", "after"}


def test_a_failing_call_leaves_the_old_machine_or_says_how_to_complete_the_new_one(
    work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = 0
    for number in range(MOST):
        work.fresh()
        code = in_child(work.convert, failing_at(number))
        said = capfd.readouterr().err
        failed += code
        if code == 0:
            assert work.outcome() == "after", number
            continue
        assert code == 1, said
        if any(name.endswith((GROUP, ".vmconv-journal")) for name in names(work.directory)):
            assert "vmconv recover" in said, said
            recover(work, "new.toy")
            work.outcome()
        else:
            # The last call of all makes it durable that the journal is gone: then the machine is the new one.
            assert work.outcome() == ("after" if "vmconv recover" in said else "before"), (number, said)
    assert 50 < failed < MOST - 5


@pytest.mark.parametrize("conversion", [55, 88])
def test_a_killed_recovery_is_repeated(conversion: int, work: Work) -> None:
    """The conversion is killed while a disk is changed, or while it is completed; so is its first recovery."""
    for number in range(0, MOST, 6):
        work.fresh()
        assert in_child(work.convert, killed_at(conversion)) == KILLED
        code = in_child(partial(recover, work, "new.toy"), killed_at(number))
        try:
            recover(work, "new.toy")
        except AccessError as exc:
            # The first one had turned all back, and lacked only the sync of that.
            assert "does not exist" in str(exc)
        work.outcome()
        if code != KILLED:
            break
    assert code == 0 and number > 0
