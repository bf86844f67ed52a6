"""Real filesystems for the tests, and the rule that what a test run requires is never skipped.

`VMCONV_REQUIRE` names what must not be missing, separated by commas: `reflink` (loop-mounted XFS and Btrfs), `oracle`
(programs and libraries that we did not write: QEMU and qemu-img, libvmdk, libvhdi, dissect, a kernel), `fuse`,
`fuzz` (atheris), `corpus`, `namespaces` (of the network, for the fleet), `chromium`, `swift` (OpenStack Swift on a
filesystem of its own). A test that needs one of them fails instead of being skipped.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from support.disks import QemuImg
from support.mounts import Mounts, quick_directory
from support.requirements import CORPUS, missing, oracle_program
from support.session import Run
from support.swift import Swift
from support.times import Times
from support.tried import TRIED

# Not where pytest removes what earlier sessions left behind, which may include mounts.
RUN = Run(Path(tempfile.gettempdir()))
atexit.register(RUN.end)
# Nothing of the user's own state is read or made.
os.environ["XDG_STATE_HOME"] = str(RUN.state)


# Programs that tests start inherit what is ignored (by nohup, or in a script's background), and not what is handled.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# No test depends on how busy the machine is.
_PROFILE = settings.get_profile("ci" if os.environ.get("CI") else "default")
settings.register_profile("vmconv", _PROFILE, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmconv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--times", type=int, metavar="COUNT", help="show the tests' time by room, and the COUNT tests that take most"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not (config.option.basetemp or config.option.collectonly or "PYTEST_DEBUG_TEMPROOT" in os.environ):
        # Workers never come here: they get a folder below that of the process that starts them.
        config.option.basetemp = quick_directory(RUN.directory)
    if config.option.times is not None:
        config.pluginmanager.register(Times())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        tried = ", ".join(f"{count} {what}" for what, count in TRIED.items())
        terminalreporter.write_line(f"changes in place were stopped by {tried}")


@pytest.fixture(scope="session")
def mounts() -> Iterator[Mounts]:
    made = Mounts(RUN.directory)
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


@pytest.fixture(scope="session")
def swift() -> Iterator[Swift]:
    """A running OpenStack Swift, for the whole session: a test that ends one of its servers starts it again."""
    directory = RUN.directory / "swift"
    directory.mkdir()
    made = Swift(directory)
    yield made
    made.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        missing("chromium", "chromium is not installed")
    with playwright.sync_playwright() as driver:
        # Tests run as root, whom Chromium gives no sandbox.
        made = driver.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield made
        made.close()
