"""Runs tests against one mistake after the other, each in a process forked from one that has imported what takes long.

The tests run in a copy of the tree. Before the fork pytest and the packages of others are imported, nothing of vmconv.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from support.session import Run

PRELOADED = ("numpy", "pydantic", "construct", "google_crc32c", "isal", "dissect.hypervisor", "hypothesis.strategies")
"""Packages that tests import, directly or not; a package that is not there is left to the tests to miss."""

_COPIED = ("core", "plugins", "tests", "pyproject.toml", "docs", "README.md")

_TESTS = str(Path(__file__).parents[1])

_PR_SET_PDEATHSIG = 1


def preload() -> None:
    """Imports what takes long. Call it once, before the first trial."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    importlib.import_module("numpy.random")
    # A busy machine misses deadlines, and to shrink a failing example takes longer than to find it.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("unshrunk", settings.get_profile("ci"), deadline=None, phases=phases)


class Tree:
    """A copy of the project in which tests run. `original` is the project, or a copy of which tests were run."""

    def __init__(self, original: Path, directory: Path, mounted: Path) -> None:
        self.directory = directory
        self.temporary = directory / "temporary"
        self.mounted = mounted
        """Where the filesystems of the tests lie."""
        self.output = directory / "output"
        ignored = shutil.ignore_patterns(".*", "results")
        for name in _COPIED:
            if (original / name).is_dir():
                shutil.copytree(original / name, directory / name, ignore=ignored)
            else:
                shutil.copy2(original / name, directory / name)
        for made in (self.temporary, self.mounted):
            made.mkdir()

    @contextlib.contextmanager
    def changed(self, module: str, code: str) -> Iterator[None]:
        """Gives a module other code for the time of a block."""
        path = self.directory / module
        whole, times = path.read_text(), path.stat()
        path.write_text(code)
        try:
            yield
        finally:
            path.write_text(whole)
            # Then its bytecode is taken to be right again.
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def test(self, tests: Sequence[str], timeout: float, *, as_it_is: bool = False) -> int | None:
        """Returns the exit status of pytest, negative for a signal; None when the time is over.

        What a killed run leaves behind is removed. With `as_it_is` the bytecode of all modules is kept.
        """
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self._become(tests, keep_bytecode=as_it_is)
        descriptor = os.pidfd_open(child)
        try:
            ended, _, _ = select.select([descriptor], [], [], timeout)
        finally:
            os.close(descriptor)
            # The group, for what the tests have started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            # Also when this process is ended: while the child lives, nothing can be unmounted.
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # Unmounts and removes what is left of a run.
        Run(self.mounted).end()
        shutil.rmtree(self.temporary)
        self.temporary.mkdir()
        return status if ended else None

    def _become(self, tests: Sequence[str], *, keep_bytecode: bool) -> None:
        """Makes this new process the one that runs the tests. Never returns."""
        status: int = pytest.ExitCode.INTERNAL_ERROR
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            output = os.open(self.output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
            for descriptor, name in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(name, descriptor)
            self._enter(keep_bytecode=keep_bytecode)
            options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--assert=plain"]
            options += ["--hypothesis-profile=unshrunk"]
            status = pytest.main([*options, *tests])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _enter(self, *, keep_bytecode: bool) -> None:
        sources = [str(self.directory / "core/src"), *map(str, self.directory.glob("plugins/*/src"))]
        os.chdir(self.directory)
        os.environ |= {
            "PYTHONPATH": ":".join(sources),
            "PYTHONDONTWRITEBYTECODE": "" if keep_bytecode else "1",
            "TMPDIR": str(self.mounted),
            "PYTEST_DEBUG_TEMPROOT": str(self.temporary),
            "VMCONV_REQUIRE": "",
        }
        sys.dont_write_bytecode = not keep_bytecode
        tempfile.tempdir = None
        # Without the tests of the project: those of the copy are run.
        sys.path[:] = sources + [path for path in sys.path if not path.startswith(_TESTS)]
        for name in [name for name in sys.modules if name.startswith("support")]:
            del sys.modules[name]
        importlib.invalidate_caches()
