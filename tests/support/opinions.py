"""Other people's readers of disk images: each is a program of its own that prints a disk's size and the sum of it."""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.disks import MIB
from support.variants import Variant, title

# `read(offset, length)` is defined by what comes before. Pieces of 1 MiB at their own offsets: dissect 3.21 takes what
# follows a block of VDI, and a range of a Parallels disk's parent, for more of it when more is asked for at once.
# Pieces of zeros are compared and not hashed, which would take most of the time for a sparse disk.
_SUM = """
digest, zeros = hashlib.sha256(), bytes(1 << 20)
for at in range(0, size, 1 << 20):
    wanted = min(1 << 20, size - at)
    piece = read(at, wanted)
    if len(piece) != wanted or not zeros.startswith(piece):
        digest.update(b"%d+%d " % (at, len(piece)) + piece)
print(size, digest.hexdigest())
"""

_EACH = """
import gc, sys
program = compile(sys.argv[1], "reader", "exec")
for line in sys.stdin:
    sys.argv[1:] = [line.rstrip("\\n")]
    print("is", end=" ")
    try:
        exec(program, names := {})
    except Exception as exc:
        print("not read:", type(exc).__name__, str(exc).replace("\\n", " "))
    # So that the image is closed: dissect's objects refer to each other.
    names.clear()
    gc.collect()
    sys.stdout.flush()
"""

_PATIENCE = 600
"""Seconds without an answer after which a reader counts as hanging."""

_LIBYAL = """
import hashlib, sys, {module}
disk = {module}.{type}()
disk.open(sys.argv[1])
{more}
size = disk.get_media_size()
read = lambda offset, length: disk.read_buffer_at_offset(length, offset)
"""

_DISSECT = """
import hashlib, pathlib, sys
from dissect.hypervisor.disk.{module} import {type}
disk = {type}({argument})
{more}
size = disk.size
def read(offset, length):
    disk.seek(offset)
    return disk.read(length)
"""


class Reader(NamedTuple):
    """A reader of one format: `program` is run by `python`, and `module` is what it needs."""

    name: str
    python: str
    module: str
    program: str
    unit: int = 512
    """Bytes that the size of a disk must be whole multiples of for this reader to read its end."""

    def what_is_missing(self) -> str | None:
        """Returns why this reader cannot run, or None."""
        return _missing(self.python, self.module)

    def sum_of(self, image: Path) -> tuple[int, str]:
        """Returns the size of the disk in an image, bytes, and what the function `sum_of` returns for its content."""
        (found,) = self.sums_of([image])
        assert not isinstance(found, str), f"{self.name}: {image.name}: {found}"
        return found

    def sums_of(self, images: Sequence[Path]) -> list[tuple[int, str] | str]:
        """Returns for each image what `sum_of` does, or what the reader says instead."""
        return [_running(self).sum_of(image) for image in images]


@functools.cache
def _missing(python: str, module: str) -> str | None:
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


class _Running:
    """The process of a reader, which reads images until the tests end: its start takes longer than most images."""

    def __init__(self, reader: Reader) -> None:
        self._name = reader.name
        command = [reader.python, "-c", _EACH, reader.program + _SUM]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        atexit.register(self._end)

    def sum_of(self, image: Path) -> tuple[int, str] | str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{image}\n".encode())
        other = b""
        while True:
            assert select.select([self._process.stdout], [], [], _PATIENCE)[0], f"{self._name} hangs at {image}"
            line = self._process.stdout.readline()
            assert line, f"{self._name} ended at {image}: {other.decode()}"
            if line.startswith(b"is "):
                break
            other += line
        said = line.decode().removeprefix("is ").strip()
        return (int(said.split()[0]), said.split()[1]) if said[0].isdigit() else said

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


_running = functools.cache(_Running)


def _libyal(name: str, kind: str, more: str = "") -> Reader:
    """Returns a reader of Debian's bindings, which are for the system's Python."""
    module = name.replace("lib", "py")
    return Reader(name, "/usr/bin/python3", module, _LIBYAL.format(module=module, type=kind, more=more))


def _dissect(
    module: str, kind: str, argument: str = "open(sys.argv[1], 'rb')", more: str = "", unit: int = 512
) -> Reader:
    program = _DISSECT.format(module=module, type=kind, argument=argument, more=more)
    return Reader("dissect", sys.executable, f"dissect.hypervisor.disk.{module}", program, unit)


_PATH = "pathlib.Path(sys.argv[1])"
_OPEN = "disk = disk.open()"

READERS: dict[str, tuple[Reader, ...]] = {
    "parallels": (_dissect("hdd", "HDS"),),
    "qcow2": (_libyal("libqcow", "file"), _dissect("qcow2", "QCow2", _PATH, _OPEN)),
    "vdi": (_dissect("vdi", "VDI", more=_OPEN),),
    "vhd": (_libyal("libvhdi", "file"), _dissect("vhd", "VHD")),
    "vhdx": (_libyal("libvhdi", "file"), _dissect("vhdx", "VHDX", _PATH)),
    # dissect 3.21 asks for whole 8 KiB of a VMDK, and fails when the disk has less.
    "vmdk": (
        _libyal("libvmdk", "handle", "disk.open_extent_data_files()"),
        _dissect("vmdk", "VMDK", _PATH, unit=8192),
    ),
}

OTHER_OPTIONS: list[Variant] = [
    ("parallels", "cluster_size=4K"),
    ("parallels", "cluster_size=64K"),
    ("parallels", "cluster_size=8M"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "compat=0.10"),
    ("qcow2", "refcount_bits=1"),
    ("qcow2", "compress=on"),
    ("qcow2", "compress=on,cluster_size=2M"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "logical_sector_size=4096"),
    ("vmdk", "zeroed_grain=on"),
]
"""Options besides subformats that change where things are in an image.

qcow2's compression_type=zstd is not among them: libqcow refuses it, and dissect 3.21 needs another library for it. Its
extended_l2 is not among them: libqcow refuses it, and dissect 3.21 fails on QEMU's own images with it.
"""

Opinion = tuple[Variant, Reader]


def opinions(wanted: list[Variant]) -> list[Opinion]:
    return [(variant, reader) for variant in wanted for reader in READERS.get(variant[0], ())]


def opinion_title(one: Opinion) -> str:
    return f"{title(one[0])}-{one[1].name}"


def sum_of(raw: Path, size: int) -> str:
    """Returns a sum over a raw disk with zeros behind it, `size` bytes in all: over each piece that has other bytes."""
    digest, zeros = hashlib.sha256(), bytes(MIB)
    with raw.open("rb") as file:
        at = 0
        while (at := _next_data(file.fileno(), at) // MIB * MIB) < size:
            wanted = min(MIB, size - at)
            piece = os.pread(file.fileno(), wanted, at).ljust(wanted, b"\0")
            if not zeros.startswith(piece):
                digest.update(b"%d+%d " % (at, wanted) + piece)
            at += MIB
    return digest.hexdigest()


def _next_data(descriptor: int, at: int) -> int:
    """Returns the first offset from `at` on that is not in a hole; reading holes would take most of the time."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return 1 << 62
        raise
