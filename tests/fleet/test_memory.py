"""A node at rest has little memory: benchmarks/fleet measures how much."""

from __future__ import annotations

import ctypes
import mmap
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vmconv_fleet import config as settings
from vmconv_fleet.catalogue import kinds
from vmconv_fleet.node import daemon, memory
from vmconv_fleet.testing import PATIENCE, Driven, Lab, wait_until

HEAVY = (
    *("anyio", "asyncio", "authlib", "fastapi", "jinja2", "numpy", "prometheus_client", "pydantic", "starlette"),
    *("ssl", "tarfile", "uvicorn", "vmconv.io", "vmconv_fleet.api", "vmconv_fleet.catalogue.inspection"),
    *(
        "vmconv_fleet.catalogue.kinds",
        "vmconv_fleet.console",
        "vmconv_fleet.jobs.arguments",
        "vmconv_fleet.oidc.provider",
    ),
)
"""Modules of more than a megabyte, with all that they import."""


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


RESIDENT = """
import re, sys
import zenoh
from vmconv_fleet.node.memory import release

def resident():
    with open("/proc/self/smaps", encoding="utf-8") as file:
        text = file.read()
    mapping = re.search(r"^\\S+ r-xp .*zenoh.*\\n(?:[A-Z].*\\n)*?Rss: +(\\d+) kB", text, re.MULTILINE)
    return int(mapping[1])

before = resident()
release()
print(before, resident())
zenoh.Config().get_json("mode")
print(resident())
"""


def test_released_pages_are_read_again_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    before, after, later = map(int, done.stdout.split())
    assert after < before // 2
    assert later > after


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


def test_mappings_with_pages_of_their_own_are_kept(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    path = tmp_path / "library"
    path.write_bytes(b"a" * 2 * page)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 2 * page, mmap.MAP_PRIVATE) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        mapped[:1] = b"b"
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        assert protect(ctypes.c_void_p(address), ctypes.c_size_t(2 * page), mmap.PROT_READ) == 0
        memory.release()
        assert mapped[:2] == b"ba"
        kept = [start for start, _end in memory._unwritten(frozenset(memory._files()))]
        assert address not in kept
