"""Builds what is converted: loop-mounted filesystems, and images whose bytes are in no way made by vmconv."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from measure import BenchmarkError

GIB = 1 << 30
TIB = 1 << 40
CLUSTER = 1 << 16

_FICLONERANGE = 0x4020940D
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
# Small: the peak memory of a child is never less than what this program had when it started it.
_PIECE = 4 << 20
_SEED = 20
_FLAGS = {"xfs": ["-q", "-m", "reflink=1"], "btrfs": ["-q"], "ext4": ["-q", "-F"]}

# The qcow2 header, version 3: magic, version, backing file (offset, size), cluster bits, size, crypt method, L1 (size,
# offset), refcount table (offset, clusters), snapshots (count, offset), features (3), refcount order, header length.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_COPIED = 1 << 63


class Place:
    """A directory in which programs are measured; `kind` is the name of its filesystem in the report."""

    def __init__(self, kind: str, directory: str) -> None:
        self.kind = kind
        self.directory = directory
        # What is behind the loop device, if there is one: it has a page cache of its own.
        self.behind: list[str] = []

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def settle(self) -> None:
        """Waits until nothing is left to do from the runs before."""
        command("sync", "-f", self.directory)
        time.sleep(0.1)

    @contextmanager
    def scratch(self, *names: str) -> Iterator[list[str]]:
        """Yields paths for files that are gone when the block ends."""
        paths = [self.path(name) for name in names]
        try:
            yield paths
        finally:
            for path in paths:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            self.settle()


class Filesystem(Place):
    """A new filesystem in a sparse file, mounted while the `with` block runs."""

    def __init__(self, kind: str, parent: str, size: int) -> None:
        super().__init__(kind, os.path.join(parent, kind))
        self._image = os.path.join(parent, f"{kind}.img")
        self.behind.append(self._image)
        self._size = size

    def __enter__(self) -> Self:
        os.mkdir(self.directory)
        with open(self._image, "wb") as file:
            file.truncate(self._size)
        try:
            command(f"mkfs.{self.kind}", *_FLAGS[self.kind], self._image)
            command("mount", "-o", "loop", self._image, self.directory)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def settle(self) -> None:
        super().settle()
        # XFS frees deleted files in the background and slows down who comes next. Freezing waits for the end of that.
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _FIFREEZE, 0)
        finally:
            with suppress(OSError):
                fcntl.ioctl(descriptor, _FITHAW, 0)
            os.close(descriptor)
        time.sleep(0.1)

    def _remove(self) -> None:
        for attempt in range(10):
            if not os.path.ismount(self.directory):
                break
            # Lazily at last: a killed child may take its time to let go.
            flags = ["-l"] if attempt == 9 else []
            if subprocess.run(["umount", *flags, self.directory], capture_output=True, check=False).returncode:
                time.sleep(0.5)
        if os.path.exists(self._image):
            os.unlink(self._image)
        with suppress(OSError):
            os.rmdir(self.directory)


def command(*arguments: str, ok: Sequence[int] = (0,)) -> str:
    """Returns what a program printed; raises `BenchmarkError` when it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode not in ok:
        raise BenchmarkError(f"{' '.join(arguments)}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def random_raw(path: str, size: int) -> str:
    """Makes a raw image of random bytes in which no two clusters are alike; returns its path."""
    # One random piece, with the cluster's number in each: as good as fresh randomness where nothing deduplicates.
    piece = bytearray(random.Random(_SEED).randbytes(_PIECE))
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, _PIECE):
            for at in range(0, _PIECE, CLUSTER):
                struct.pack_into("<Q", piece, at, (start + at) // CLUSTER + 1)
            file.write(memoryview(piece)[: size - start])
        os.fsync(file.fileno())
    return path


def text_raw(path: str, size: int) -> str:
    """Makes a raw image of words, which compresses like text does; returns its path."""
    chance = random.Random(_SEED)
    words = [chance.randbytes(chance.randint(1, 5)).hex().encode() for _ in range(4096)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    text = b" ".join(chance.choices(words, weights, k=1 << 18))
    # Not a multiple of a cluster, so that repetitions of the text make different clusters.
    text = text[: len(text) // CLUSTER * CLUSTER - 777]
    with open(path, "wb") as file:
        while file.tell() < size:
            file.write(text[: size - file.tell()])
        file.flush()
        os.fsync(file.fileno())
    return path


def dense_raw(path: str, content: str, size: int) -> str:
    """Makes a raw image of any size with payload everywhere, by sharing one file again and again; returns its path."""
    step = os.path.getsize(content)
    place(path, content, ((0, min(step, size - at), at) for at in range(0, size, step)), size)
    return path


def sparse_raw(path: str, content: str, size: int, pieces: int) -> list[int]:
    """Makes a huge raw image with `pieces` 16 MiB pieces of payload far from each other; returns their offsets."""
    step = 16 << 20
    inside = os.path.getsize(content) // step
    offsets = sorted(at * step for at in random.Random(_SEED).sample(range(size // step), pieces))
    place(path, content, ((index % inside * step, step, at) for index, at in enumerate(offsets)), size)
    return offsets


def shuffled(count: int) -> list[int]:
    """Returns the numbers below `count`, in the same random order every time."""
    order = list(range(count))
    random.Random(_SEED).shuffle(order)
    return order


def qcow2(path: str, raw: str, order: Sequence[int]) -> int:
    """Makes a qcow2 image whose payload is the whole file `raw`, and whose cluster n is `raw`'s cluster `order[n]`.

    The metadata comes first, then the payload in the order of `raw`. Returns the payload's offset in the image.
    """
    tables = -(-len(order) * 8 // CLUSTER)
    roots = -(-tables * 8 // CLUSTER)
    # Reference counts count themselves too: one more block may be needed for the blocks.
    blocks = next(n for n in range(1, 1 << 20) if n * (CLUSTER // 2) >= 3 + roots + tables + n + len(order))
    l1, l2, counts = 1, 1 + roots, 1 + roots + tables
    first = counts + 1 + blocks
    size = len(order) * CLUSTER
    header = _HEADER.pack(
        b"QFI\xfb", 3, 0, 0, 16, size, 0, tables, l1 * CLUSTER, counts * CLUSTER, 1, 0, 0, 0, 0, 0, 4, _HEADER.size
    )
    place(path, raw, [(0, size, first * CLUSTER)], first * CLUSTER + size)
    with open(path, "r+b") as file:
        for cluster, data in (
            (0, header),
            (l1, _words("Q", [(l2 + n) * CLUSTER | _COPIED for n in range(tables)])),
            (l2, _words("Q", [(first + n) * CLUSTER | _COPIED for n in order])),
            (counts, _words("Q", [(counts + 1 + n) * CLUSTER for n in range(blocks)])),
            (counts + 1, _words("H", [1] * (first + len(order)))),
        ):
            file.seek(cluster * CLUSTER)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return first * CLUSTER


def place(path: str, content: str, ranges: Iterable[tuple[int, int, int]], size: int) -> None:
    """Makes a file of `size` from ranges `(offset in content, length, offset in file)`: shared, or copied where not."""
    with open(content, "rb") as source, open(path, "wb") as target:
        target.truncate(size)
        for low, length, at in ranges:
            try:
                fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source.fileno(), low, length, at))
            except OSError:
                _copy(source.fileno(), target.fileno(), low, length, at)
        os.fsync(target.fileno())


def compressed(path: str, size: int, kind: str) -> str:
    """Makes a compressed qcow2 image by qemu-img; returns its path."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as directory:
        raw = text_raw(os.path.join(directory, "text.raw"), size)
        flags = ["-c", "-W", "-m", "16", "-o", f"compression_type={kind}"]
        command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *flags, raw, path)
    return path


def copied(source: str, target: str) -> str:
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return target


def _copy(source: int, target: int, low: int, length: int, at: int) -> None:
    done = 0
    while done < length:
        done += os.copy_file_range(source, target, length - done, low + done, at + done)


def _words(code: str, values: Sequence[int]) -> bytes:
    words = array(code, values)
    words.byteswap()
    return words.tobytes()
