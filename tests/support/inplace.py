"""Conversions in place: running them, refusing them, interrupting them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.crash import Stopped, StoppingCalls
from support.disks import MIB, make_disk
from support.inplace_pairs import Source, Target
from support.requirements import another_user
from support.variants import identified
from vmconv import api
from vmconv.errors import PlanError, VmconvError
from vmconv.inplace import undo
from vmconv.inplace.names import JOURNAL, WORKING
from vmconv.inplace.syscalls import Syscalls
from vmconv.model.plan import Plan

Contents = dict[str, str]
"""A digest of each file of a directory."""


def contents(directory: Path) -> Contents:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def copied(directory: Path, to: Path) -> Path:
    """Returns a new directory with the same files, times included."""
    subprocess.run(["cp", "-a", "--sparse=always", directory, to], check=True)
    return to


class Work(NamedTuple):
    """What is stopped: a conversion in place, or the way back from one; it finds its files in `directory`."""

    directory: Path
    before: str
    after: str
    source: Source
    target: Target
    way: str
    """`there`, `there and undoable`, or `back`."""

    def run(self, calls: Syscalls, directory: Path) -> None:
        if self.way == "back":
            undo.undo(str(directory / self.before), calls=calls)
            return
        with pytest.MonkeyPatch.context() as patch:
            for module in ("stay", "share"):
                patch.setattr(f"vmconv.inplace.{module}.Syscalls", lambda: calls)
            # Two runs are to write the same undo file.
            patch.setattr("vmconv.inplace.stay.time.time_ns", lambda: 10**18)
            self.convert(directory, keep_undo=self.way == UNDOABLE)

    def convert(self, directory: Path, *, keep_undo: bool) -> None:
        api.convert(
            str(directory / self.before),
            str(directory / self.after),
            source_format=self.source.format,
            target_format=self.target.format,
            # Two runs are to make the same image.
            options={**self.target.options, **identified((self.target.format, ""))},
            in_place=True,
            keep_undo=keep_undo,
        )


class Edit(NamedTuple):
    """What is stopped: an edit of the metadata of the image `before`, which keeps its name."""

    directory: Path
    before: str
    change: Callable[..., object]
    """Called with the image's path and `keep_undo`."""
    keep_undo: bool

    @property
    def after(self) -> str:
        return self.before

    def run(self, calls: Syscalls, directory: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vmconv.inplace.stay.Syscalls", lambda: calls)
            # Two runs are to make the same image.
            patch.setattr("time.time_ns", lambda: 10**18)
            self.change(directory / self.before, keep_undo=self.keep_undo)


THERE, UNDOABLE, BACK = "there", "there and undoable", "back"

NOBODY = 54321

CLI = [sys.executable, "-c", "from vmconv.cli.main import main; raise SystemExit(main())"]


def run_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*CLI, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def as_nobody(*arguments: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user without a home, in this environment."""
    command = [*another_user(NOBODY), *CLI, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def in_place(source: Path, target: Path, **options: Any) -> Plan:
    """Converts in place and returns the plan of it."""
    plans: list[Plan] = []
    api.convert(str(source), str(target), in_place=True, announce=plans.append, **options)
    return plans[0]


def refused(source: Path, target: Path, error: type[VmconvError] = PlanError, **options: Any) -> VmconvError:
    """Tries a conversion in place that must be refused without a trace, and returns the error."""
    before = contents(source.parent)
    with pytest.raises(error) as caught:
        in_place(source, target, **options)
    assert contents(source.parent) == before
    assert caught.value.hint, caught.value
    return caught.value


def descriptor(disk: Path) -> Path:
    sectors = disk.stat().st_size // 512
    text = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    disk.with_name("front.vmdk").write_text(f'{text}RW {sectors} FLAT "{disk.name}" 0\n')
    return disk


def interrupted(directory: Path) -> Path:
    """Returns the name of a disk whose conversion was stopped in the middle."""
    disk = make_disk(directory / "disk.raw", MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmconv.inplace.stay.Syscalls", lambda: StoppingCalls(8))
        with pytest.raises(Stopped):
            in_place(disk, directory / "new.qcow2")
    assert names(directory) == {"disk.raw" + JOURNAL, "disk.raw" + WORKING}
    return disk


def converted(directory: Path) -> Path:
    disk = make_disk(directory / "disk.raw", MIB)
    in_place(disk, directory / "new.qcow2", keep_undo=True)
    return directory / "new.qcow2"


SIZE = MIB + 512
