"""The case of views: how fast a file that was never made is read, beside the file that it is read from."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench import VMCONV, Bench, python
from images import GIB, Place, command, random_raw
from measure import BenchmarkError, Contender, Measured
from report import Expectation

_FORMATS = {"raw": ".raw", "qcow2": ".qcow2", "vhdx": ".vhdx"}
_ITSELF = "the source's file"
_PATIENCE = 30
_MIB = 1 << 20


def views(bench: Bench, place: Place) -> None:
    """A raw disk read as other formats, through a mount and over NBD: from memory and from storage."""
    shelf, point, socket = place.path("shelf"), os.path.join(bench.work, "shown"), place.path("nbd.sock")
    os.mkdir(shelf)
    os.mkdir(point)
    source = os.path.join(shelf, "disk.raw")
    size = min(bench.size, 2 * GIB)
    random_raw(source, size)
    files = {name: os.path.join(point, "disk.raw", name, f"disk{suffix}") for name, suffix in _FORMATS.items()}
    with _running([VMCONV, "mount", shelf, point], lambda: os.path.ismount(point)):
        serve = [VMCONV, "serve", "--persistent", "--as", "vhdx", "--socket", socket, source]
        with _running(serve, lambda: os.path.exists(socket)):
            _same_as_converted(place, source, files)
            for block in (_MIB, _MIB >> 3):
                _read(bench, place, source, files, socket, block, cold=False)
            _read(bench, place, source, files, socket, _MIB, cold=True)
    os.rmdir(point)
    os.unlink(source)
    os.rmdir(shelf)


def _read(
    bench: Bench, place: Place, source: str, files: dict[str, str], socket: str, block: int, *, cold: bool
) -> None:
    places = {_ITSELF: source, **{f"mount, {name}": path for name, path in files.items()}, "NBD, vhdx": socket}
    how = "from storage" if cold else "from memory"
    # On a loop device, what leaves the filesystem's cache is still in that of the file behind it.
    behind = [source, *place.behind] if cold else []
    contenders = [
        Contender(name, python(name, "child_read.py", path, str(block), *behind, target="").command)
        for name, path in places.items()
    ]
    title = f"{os.path.getsize(source) / GIB:.3g} GiB {how}, {block >> 10} KiB at a time"
    measured = bench.measure("views", place, title, contenders)
    for name in places:
        # What a program reads that has time for small pieces is printed, and expected of nobody.
        if name != _ITSELF and block == _MIB:
            _expect(bench, measured, name, f"{name}, {how}: 0.7 of the file's speed")


def _expect(bench: Bench, measured: Measured, name: str, text: str) -> None:
    value = measured.times_faster(name, _ITSELF, "inner")
    bench.expectations.append(Expectation("views", measured.place, text, value, 0.7, "x", at_least=True))


def _same_as_converted(place: Place, source: str, files: dict[str, str]) -> None:
    """Checks that what is shown is what a conversion makes, where blocks are shared as the views expect."""
    for name, path in files.items():
        with place.scratch(f"disk{_FORMATS[name]}") as (made,):
            command(VMCONV, "convert", "-q", source, made)
            if place.kind == "xfs":
                command("cmp", made, path)
            command("qemu-img", "compare", "-f", "raw", "-F", name, source, path)


@contextmanager
def _running(arguments: list[str], is_ready: Callable[[], bool]) -> Iterator[None]:
    """Keeps a program running, from when it is ready."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + _PATIENCE
            while not is_ready():
                if process.poll() is not None or time.monotonic() > until:
                    raise BenchmarkError(f"{' '.join(arguments)}: does not get ready")
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            process.wait()
