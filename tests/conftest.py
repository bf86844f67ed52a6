"""Real filesystems for the tests, and the rule that what a test run requires is never skipped.

`VMCONV_REQUIRE` names what must not be missing, separated by commas: `reflink` (loop-mounted XFS and Btrfs), `oracle`
(programs and libraries that we did not write: QEMU and qemu-img, libvmdk, libvhdi, dissect, a kernel), `fuse`,
`fuzz` (atheris), `corpus`, `namespaces` (of the network, for the fleet), `chromium`. A test that needs one of them
fails instead of being skipped.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from support.disks import QemuImg
from support.tried import TRIED

pytest.register_assert_rewrite("vmconv.testing")

REQUIRED = frozenset(filter(None, os.environ.get("VMCONV_REQUIRE", "").split(",")))
FILESYSTEM_SIZE = 4 << 30
# Nothing of the user's own state is read or made.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="vmconv-tests-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
CORPUS = Path(os.environ.get("VMCONV_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))


def missing(what: str, reason: str) -> None:
    """Skips the test, or fails it when this run requires what is missing."""
    if what in REQUIRED:
        pytest.fail(f"{reason}, and VMCONV_REQUIRE asks for {what}")
    pytest.skip(reason)


def oracle_module(name: str) -> ModuleType:
    """Returns a module that we did not write, to ask for a second opinion."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        missing("oracle", f"{name}: {exc}")
        raise


def oracle_program(name: str) -> str:
    """Returns the path of a program that we did not write, to ask for a second opinion."""
    program = shutil.which(name)
    if program is None:
        missing("oracle", f"{name} is not installed")
    return str(program)


@cache
def another_user(number: int) -> tuple[str, ...]:
    """Returns what to put in front of a command to run it as this user; skips where such a user cannot run Python."""
    prefix = ("setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups")
    done = subprocess.run([*prefix, sys.executable, "-c", "import vmconv, numpy"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"other users may not read what is installed below {sys.prefix}")
    return prefix


class Mounts:
    """Loop-mounted filesystems, made when they are first asked for and kept for the session."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[str, Path | str] = {}

    def get(self, kind: str) -> Path:
        """Returns the mount point of a filesystem of this kind; skips with the reason where none can be had."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        made = self._made[kind]
        if isinstance(made, str):
            missing("reflink", made)
        assert isinstance(made, Path)
        return made

    def _make(self, kind: str) -> Path | str:
        if os.geteuid() != 0:
            return "mounting a loop device needs root"
        maker = f"mkfs.{kind}"
        if not shutil.which(maker):
            return f"{maker} is not installed"
        image, point = self._directory / f"{kind}.img", self._directory / kind
        point.mkdir()
        with image.open("wb") as file:
            file.truncate(FILESYSTEM_SIZE)
        flags = {"xfs": ["-q", "-m", "reflink=1"], "btrfs": ["-q"], "ext4": ["-q", "-F"]}[kind]
        for command in ([maker, *flags, str(image)], ["mount", "-o", "loop", str(image), str(point)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(command)}: {done.stderr.strip()}"
        return point

    def close(self) -> None:
        for point in self._made.values():
            if isinstance(point, Path):
                subprocess.run(["umount", str(point)], check=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        tried = ", ".join(f"{count} {what}" for what, count in TRIED.items())
        terminalreporter.write_line(f"changes in place were stopped by {tried}")


@pytest.fixture(scope="session")
def mounts() -> Iterator[Mounts]:
    # Not where pytest removes what earlier sessions left behind: one that was killed leaves its mounts too.
    with tempfile.TemporaryDirectory(prefix="vmconv-tests-") as directory:
        made = Mounts(Path(directory))
        yield made
        made.close()


def _directory(mounts: Mounts, kind: str) -> Iterator[Path]:
    directory = mounts.get(kind) / "test"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["xfs", "btrfs"])
def reflink_dir(mounts: Mounts, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on a filesystem that shares blocks; the test runs once on each kind."""
    yield from _directory(mounts, request.param)


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def any_dir(mounts: Mounts, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on a filesystem of each kind: what needs nothing of storage has to work on all."""
    yield from _directory(mounts, request.param)


@pytest.fixture
def xfs_dir(mounts: Mounts) -> Iterator[Path]:
    """An empty directory on XFS."""
    yield from _directory(mounts, "xfs")


@pytest.fixture
def btrfs_dir(mounts: Mounts) -> Iterator[Path]:
    """An empty directory on Btrfs."""
    yield from _directory(mounts, "btrfs")


@pytest.fixture
def ext4_dir(mounts: Mounts) -> Iterator[Path]:
    """An empty directory on ext4, which cannot share blocks."""
    yield from _directory(mounts, "ext4")


@pytest.fixture(scope="session")
def qemu_img() -> QemuImg:
    """Runs `qemu-img` with the given arguments; fails the test unless it returns one of the codes in `ok`."""
    program = oracle_program("qemu-img")

    def run(*arguments: str | Path, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        command = [program, *(str(argument) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in ok, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The directory of real images with their manifest."""
    if not (CORPUS / "expected.tsv").exists():
        missing("corpus", f"no corpus at {CORPUS}")
    return CORPUS
