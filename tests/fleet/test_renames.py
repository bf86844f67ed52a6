"""Somebody renames directories below a datastore while a node works there: nothing outside is made, read or removed.

Each run is disturbed before one of its calls that use a path: a directory of the datastore becomes a link that leads
out of it, until the end or for this call alone. Which calls are tried does not depend on luck.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import domains
from vmconv.plugin import VmconvError
from vmconv_fleet.catalogue import inspection
from vmconv_fleet.jobs import conversion
from vmconv_fleet.jobs.disks import DiskConversion
from vmconv_fleet.jobs.journal import JobJournal
from vmconv_fleet.jobs.machines import MachineConversion
from vmconv_fleet.jobs.task import Task

INSIDE, OUTSIDE = b"INSIDE--", b"OUTSIDE-"
"""The contents of files with the same name."""

_AUDITED = frozenset({"open", "os.chdir", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.scandir"})


class Renamer:
    """Makes `sub` a link out of the datastore before call number `at`, and with `once` a directory again after it."""

    def __init__(self, base: Path, at: int, *, once: bool) -> None:
        self.sub, self.kept, self.outside = base / "ds/sub", base / "ds/.kept", base / "outside"
        self.at, self.once = at, once
        self.calls = 0
        self._busy = False

    def start(self) -> None:
        sys.addaudithook(lambda event, arguments: self._reached(arguments[0]) if event in _AUDITED else None)

    def _reached(self, path: object) -> None:
        # Modules and devices are of no interest; /proc leads to open files and directories.
        near = isinstance(path, str) and (not path.startswith("/") or path.startswith((str(self.sub), "/proc/")))
        if self._busy or not near:
            return
        self._busy = True
        if self.calls == self.at:
            self.sub.rename(self.kept)
            self.sub.symlink_to(self.outside)
        elif self.calls == self.at + 1 and self.once:
            self.sub.unlink()
            self.kept.rename(self.sub)
        self.calls += 1
        self._busy = False


def task(base: Path, name: str, **more: Any) -> Task:
    values: dict[str, Any] = {
        "job": "j1",
        "root": str(base / "ds"),
        "name": f"sub/{name}",
        "roots": [str(base / "ds")],
        "format": "qcow2",
        "options": {},
        "target": None,
        "target_root": None,
        "naming": "{stem}{suffix}",
        "zero_copy": "auto",
        "journal": str(base / "j1.json"),
        "dry_run": False,
        "removable": False,
        "is_machine": False,
        "disk_format": None,
        "disk_options": {},
        "strict": False,
        "keep": [],
        "uuid": "guest",
        "new_identity": False,
        "bandwidth": [],
        "owners": [],
    }
    return Task(**values | more)


def convert_disk(base: Path) -> None:
    DiskConversion(task(base, "d.raw", removable=True), JobJournal(str(base / "j1.json"))).run()


def convert_machine(base: Path) -> None:
    options = {"is_machine": True, "format": "vmx", "removable": False}
    MachineConversion(task(base, "shop.xml", **options), JobJournal(str(base / "j1.json"))).run()


def plan_machine(base: Path) -> None:
    options = {"is_machine": True, "format": "vmx", "dry_run": True}
    MachineConversion(task(base, "shop.xml", **options), JobJournal(str(base / "j1.json"))).run()


def recover(base: Path) -> None:
    """Tells whether a job made its target, as the next start of a node does."""
    JobJournal(str(base / "j1.json")).made()


def scan(base: Path) -> None:
    for kind, identifier, body in inspection._Inspection({"ds": str(base / "ds")}, {}).records("ds"):
        inspection._print(kind, identifier, body)


def make(base: Path) -> None:
    for directory, content in ((base / "ds/sub", INSIDE), (base / "outside", OUTSIDE)):
        directory.mkdir(parents=True)
        (directory / "d.raw").write_bytes(content * 512 + bytes(60 << 10))
        domains.shop(directory)
        (directory / "shop.raw").write_bytes(content * 512 + bytes(60 << 10))
    (base / "outside/only-outside.raw").write_bytes(OUTSIDE * 512)


def contents(directory: Path) -> Mapping[str, tuple[int, bytes]]:
    files = (path for path in sorted(directory.rglob("*")) if not path.is_dir())
    return {str(path.relative_to(directory)): (path.stat().st_ino, path.read_bytes()) for path in files}


def in_child(work: Callable[[Path], None], base: Path, renamer: Renamer) -> tuple[int, str]:
    """Runs the work in a process of its own. Returns how many of its calls were counted, and what it printed."""
    said, tell = base / "said", base / "calls"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            sys.stdout = os.fdopen(1, "w")
            renamer.start()
            try:
                work(base)
            except (VmconvError, OSError) as exc:
                print(exc)
            sys.stdout.flush()
            renamer._busy = True
            tell.write_text(str(renamer.calls))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int(tell.read_text()), said.read_text()


@pytest.mark.parametrize("once", [False, True], ids=["stays", "once"])
@pytest.mark.parametrize(
    ("work", "step"),
    [(convert_disk, 1), (convert_machine, 5), (plan_machine, 2), (scan, 2)],
    ids=["convert", "machine", "plan", "scan"],
)
def test_nothing_outside_is_made_read_or_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], None], step: int, once: bool
) -> None:
    monkeypatch.setattr(conversion.Conversion, "_watch_input", lambda self: self._go.set())
    calls, done = 0, 0
    # The first run is not disturbed.
    for at in itertools.count(-1, step):
        base = tmp_path / "base"
        make(base)
        before = contents(base / "outside")
        count, said = in_child(work, base, Renamer(base, at, once=once))
        assert contents(base / "outside") == before, at
        assert "only-outside" not in said, at
        inside = contents(base / "ds")
        assert not [name for name, (_, content) in inside.items() if OUTSIDE in content], at
        assert any(INSIDE in content for name, (_, content) in inside.items() if "d.raw" in name or "d.qcow2" in name)
        done += '"event": "done"' in said or '"event": "plan"' in said or '"kind": "datastore"' in said
        shutil.rmtree(base)
        calls = max(calls, count)
        if at >= calls:
            break
    assert calls > 4
    assert done
