"""The case of views: how fast a file that was never made is read, beside the file that it is read from."""

from __future__ import annotations

import os
import shutil
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
_IMAGES = 200


def views(bench: Bench, place: Place) -> None:
    """A raw disk read as other formats, through a mount and over NBD: from memory and from storage."""
    shelf, point, socket = place.path("shelf"), os.path.join(bench.work, "shown"), place.path("nbd.sock")
    os.mkdir(shelf)
    # A failure on the filesystem before may have left it.
    os.makedirs(point, exist_ok=True)
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
    os.unlink(source)
    _listed(bench, place, shelf, point)
    os.rmdir(point)
    os.rmdir(shelf)


def _listed(bench: Bench, place: Place, shelf: str, point: str) -> None:
    """Measures a new mount of many images, and a program that looks at each file in it."""
    names = [os.path.join(shelf, f"disk{number:03}.qcow2") for number in range(_IMAGES)]
    command("qemu-img", "create", "-q", "-f", "qcow2", names[0], "64M")
    command("qemu-io", "-c", "write -q -P 1 0 1M", names[0])
    for name in names[1:]:
        shutil.copy(names[0], name)
    script = (
        f'{VMCONV} mount --fork "$1" "$2" && files=$(find "$2" -type f | wc -l); fusermount3 -u "$2"; '
        f'[ "$files" -ge {_IMAGES * len(_FORMATS)} ]'
    )
    title = f"{_IMAGES} qcow2 images mounted, find -type f"
    contender = Contender("mount and find", ["sh", "-c", script, "sh", shelf, point])
    measured = bench.measure("views", place, title, [contender], 3)
    bench.at_most(measured, f"{_IMAGES} images: mount and find -type f", measured.median(contender.name), 2)
    for name in names:
        os.unlink(name)


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
            # Each VHDX has ids of its own.
            if place.kind == "xfs" and name != "vhdx":
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
