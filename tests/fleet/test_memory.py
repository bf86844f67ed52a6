"""A node at rest has little memory: benchmarks/fleet measures how much."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmconv_fleet import config as settings
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.node import daemon, memory
from vmconv_fleet.testing import PATIENCE, Driven, Lab, wait_until

HEAVY = (
    *("anyio", "asyncio", "authlib", "fastapi", "jinja2", "numpy", "prometheus_client", "pydantic", "starlette"),
    *("importlib.metadata", "ssl", "tarfile", "uvicorn", "vmconv.io.registry", "vmconv_fleet.api", "zipfile"),
    *("bz2", "lzma", "shutil", "vmconv_fleet.catalogue.inspection"),
    *(
        "vmconv_fleet.catalogue.kinds",
        "vmconv_fleet.console",
        "vmconv_fleet.jobs.arguments",
        "vmconv_fleet.oidc.provider",
    ),
)
"""Modules that take much memory with all that they import, mostly more than a megabyte."""


def test_a_node_at_rest_has_imported_nothing_heavy(lab: Lab, drive: Callable[..., Driven], tmp_path: Path) -> None:
    config = replace(lab.add(), datastores={"ds": str(tmp_path)})
    settings.save(config)
    node, other = drive(config), drive(lab.add())
    wait_until(lambda: node.ask("state")["neighbours"] and other.ask("state")["neighbours"], PATIENCE, "neighbours")
    wait_until(lambda: '"scanned"' in node.log(), PATIENCE, "its datastore is scanned")
    modules = node.ask("modules")["modules"]
    assert "vmconv_fleet.node.daemon" in modules
    assert [name for name in HEAVY if name in modules] == []


def test_the_names_of_heavy_modules_exist() -> None:
    assert kinds.__name__ in HEAVY
    script = "import importlib.util, sys; print([name for name in sys.argv[1:] if not importlib.util.find_spec(name)])"
    done = subprocess.run([sys.executable, "-c", script, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Quiet:
    """Signals of which none comes for a while."""

    def __init__(self, times: int) -> None:
        self.times = times

    def next(self, _timeout: float) -> int | None:
        self.times -= 1
        return signal.SIGTERM if self.times < 0 else None


def test_a_daemon_gives_memory_back_as_long_as_nothing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []
    monkeypatch.setattr(daemon, "release", lambda: released.append(True))
    assert daemon._next(Quiet(3)) == signal.SIGTERM  # type: ignore[arg-type]
    assert len(released) == 3


class Library:
    """The C library of a test: it notes its calls."""

    def __init__(self, *missing: str) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self._missing = missing

    def __call__(self, name: None) -> Library:
        assert name is None
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in self._missing:
            raise AttributeError(name)

        def called(*values: Any) -> None:
            self.calls.append((name, tuple(getattr(one, "value", one) for one in values)))

        return called


def test_heaps_are_bounded_and_freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", library)
    memory.bound_heaps()
    memory.release()
    # M_ARENA_MAX of malloc.h; two heaps.
    assert library.calls == [("mallopt", (-8, 2)), ("malloc_trim", (0,))]


def test_another_c_library_than_glibc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Library("mallopt", "malloc_trim"))
    memory.bound_heaps()
    memory.release()

    def none(_name: None) -> None:
        raise OSError("no C library")

    monkeypatch.setattr(ctypes, "CDLL", none)
    memory.bound_heaps()
    memory.release()


def test_freed_heap_is_really_given_back() -> None:
    """In a process of its own: glibc keeps what is free between pieces in use."""
    script = """
import ctypes
from vmconv_fleet.node.memory import release
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) << 12
pieces = [libc.malloc(4000) for _ in range(4000)]
for piece in pieces:
    ctypes.memset(piece, 1, 4000)
for piece in pieces[:-1]:
    libc.free(piece)
before = resident()
release()
print(before - resident() > 8_000_000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
