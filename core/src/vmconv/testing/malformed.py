"""Malformed images, made from a valid one independent of its format, and limits of time and memory for reading them.

The documentation quotes the first line of each maker's docstring.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from vmconv.errors import ImageError
from vmconv.testing.disks import random_bytes
from vmconv.testing.memory import MemoryFile

SOON = 5
"""Limit of processor time to read one malformed image, in seconds; generous for slow machines."""

MUCH_MEMORY = 400 << 20
"""Limit of memory to read one malformed image, in bytes; Python and numpy take 100 MiB."""

LARGE = 1 << 44
"""Size of a sparse file that contains most offsets of a damaged header, in bytes."""

_CASES = 100
_HEADER = 256
"""Bytes at the start of each metadata range that count as its header."""
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_ENDS = (0, 1, 7, 8, 71, 72, 103, 104, 511, 512, 1024, 1536, 2048, 4096, 65536, 1 << 17, 1 << 18, 1 << 20)
_UNITS = (1, 512, 4096, 65536, 1 << 20)


class Sample(NamedTuple):
    """A valid image: its bytes, and the `(start, end)` of each range of metadata."""

    data: bytes
    metadata: Sequence[tuple[int, int]]

    def words(self) -> list[int]:
        """Returns offsets of 4-byte words of metadata: of each range, all in its header, then those not zero."""
        places: list[int] = []
        for start, end in self.metadata:
            first = -(-start // 4) * 4
            words = np.frombuffer(self.data, dtype="<u4", count=max(0, (end - first) // 4), offset=first)
            wanted = words != 0
            wanted[: _HEADER // 4] = True
            places += (np.flatnonzero(wanted) * 4 + first).tolist()
        return places


class Malformed(NamedTuple):
    """A malformed image: bytes, the size of the file if a hole follows, and `(offset, bytes)` of changes."""

    data: bytes
    size: int | None = None
    changes: Sequence[tuple[int, bytes]] = ()

    def content(self) -> bytes:
        """Returns the bytes of the image, without the hole behind them."""
        return self.file().read(0, len(self.data))

    def file(self) -> MemoryFile:
        """Returns the image as a file in memory."""
        return _Content(self.data, self.changes, self.size or len(self.data))


class _Content(MemoryFile):
    """Bytes, changes of them and a hole behind; faster to make than the blocks of `MemoryFile` are."""

    def __init__(self, data: bytes, changes: Sequence[tuple[int, bytes]], size: int) -> None:
        super().__init__("image", size)
        self._data = data
        self._changes = changes

    def read(self, offset: int, length: int) -> bytes:
        end = offset + length
        if offset < 0 or end > self.size:
            raise ImageError(f"{self.name}: {offset:#x}+{length} lies outside {self.size:#x}")
        piece = self._data[offset:end]
        for at, value in self._changes:
            if at < end and at + len(value) > offset:
                inside = value[max(0, offset - at) : end - at]
                start = max(0, at - offset)
                piece = piece[:start] + inside + piece[start + len(inside) :]
        return piece + bytes(length - len(piece))

    def close(self) -> None:
        # Reference cycles keep images alive until a garbage collection: a hundred images of 8 MiB.
        self._data = b""

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        limit = min(len(self._data), self.size if end is None else end)
        return [(start, limit)] if start < limit else []


Seal = Callable[[bytearray], None]
"""Updates the checksums of a modified image, all of which are in its metadata."""

Maker = Callable[[Sample, random.Random, Seal], Iterator[Malformed]]

_PART = 4096


class _Editor:
    """Makes changed images of a sample.

    It compares the metadata and keeps what differs. A copy of each image would take most of the tests' time: images
    have up to 16 MiB, and there are thousands of them.
    """

    def __init__(self, sample: Sample, seal: Seal) -> None:
        self._sound = sample.data
        self._edited = bytearray(sample.data)
        self._seal = seal
        ranges = [(at, min(at + _PART, end)) for start, end in sample.metadata for at in range(start, end, _PART)]
        self._parts = [(start, sample.data[start:end]) for start, end in ranges]

    def changed(self, *changes: tuple[int, bytes], sealed: bool = True) -> Malformed:
        for at, value in changes:
            self._edited[at : at + len(value)] = value[: len(self._edited) - at]
        if sealed:
            self._seal(self._edited)
        places = [(at, len(value)) for at, value in changes]
        places += [(at, len(sound)) for at, sound in self._parts if not self._edited.startswith(sound, at)]
        pieces = [(at, bytes(self._edited[at : at + length])) for at, length in places]
        for at, piece in pieces:
            self._edited[at : at + len(piece)] = self._sound[at : at + len(piece)]
        return Malformed(self._sound, changes=pieces)


def truncated(sample: Sample, rng: random.Random, _: Seal) -> Iterator[Malformed]:
    """Cut off: at the ends of headers, at powers of two, in the middle, one byte and one sector before the end."""
    size = len(sample.data)
    random_ends = [rng.randrange(size) for _ in range(10)]
    for length in sorted({*_ENDS, *random_ends, size // 2, size - 512, size - 1}):
        if 0 <= length < size:
            yield Malformed(sample.data[:length])


def flipped(sample: Sample, rng: random.Random, seal: Seal) -> Iterator[Malformed]:
    """One to four bits flipped in headers and tables, with checksums that are wrong then and with ones made right."""
    words, editor = sample.words(), _Editor(sample, seal)
    for number in range(_CASES):
        bits = [(rng.choice(words) + rng.randrange(4), 1 << rng.randrange(8)) for _ in range(rng.choice((1, 1, 2, 4)))]
        changes = [(at, bytes([sample.data[at] ^ bit])) for at, bit in bits]
        # Each fourth image keeps its checksums wrong, to test the checksums.
        yield editor.changed(*changes, sealed=bool(number % 4))


def noise(sample: Sample, rng: random.Random, seal: Seal) -> Iterator[Malformed]:
    """Random bytes behind a sound beginning of 4 bytes to 64 KiB, and in the place of single sectors of metadata."""
    for keep in (4, 8, 64, 512, 1024, 4096, 65536):
        yield Malformed(sample.data[:keep] + random_bytes(65536, keep))
    editor = _Editor(sample, seal)
    for at in rng.choices(sample.words(), k=_CASES // 2):
        yield editor.changed((at // 512 * 512, rng.randbytes(512)))


def absurd(sample: Sample, rng: random.Random, seal: Seal) -> Iterator[Malformed]:
    """Words of headers and tables replaced by enormous numbers, in small files and in files of 16 TiB."""
    values = [number.to_bytes(4, order) for number in (1 << 31, (1 << 32) - 1, 1 << 30, 1 << 24) for order in _ORDERS]
    values += [n.to_bytes(8, order) for n in (1 << 63, (1 << 64) - 1, 1 << 62, 1 << 42, 1 << 36) for order in _ORDERS]
    words, editor = _beginnings_first(sample, rng), _Editor(sample, seal)
    for number, at in enumerate(words[:_CASES]):
        # In a large file, an absurd offset may lie inside.
        yield editor.changed((at, rng.choice(values)))._replace(size=LARGE if number % 2 else None)


def self_referring(sample: Sample, rng: random.Random, seal: Seal) -> Iterator[Malformed]:
    """Words of headers and tables that point at the image's own headers and tables, in bytes, sectors and blocks."""
    starts = sorted({start for start, _ in sample.metadata})
    places = sorted({start // unit for start in starts for unit in _UNITS})
    editor = _Editor(sample, seal)
    for at in rng.choices(sample.words(), k=_CASES):
        yield editor.changed((at, _word(rng, rng.choice(places))))


def overlapping(sample: Sample, rng: random.Random, seal: Seal) -> Iterator[Malformed]:
    """Words of headers and tables that repeat another, or lie one beside it: two tables or blocks in one place."""
    words, editor = sample.words(), _Editor(sample, seal)
    for _ in range(_CASES):
        width = rng.choice((4, 8))
        order = rng.choice(_ORDERS)
        one, other = rng.choice(words), rng.choice(words)
        number = int.from_bytes(sample.data[other : other + width], order) + rng.choice((0, 0, 1, -1, 512))
        yield editor.changed((one, (number % (1 << 8 * width)).to_bytes(width, order)))


KINDS: dict[str, Maker] = {
    "truncated": truncated,
    "flipped bits": flipped,
    "noise": noise,
    "absurd numbers": absurd,
    "self reference": self_referring,
    "overlap": overlapping,
}


def _word(rng: random.Random, number: int) -> bytes:
    width = 8 if number >> 32 else rng.choice((4, 8))
    return number.to_bytes(width, rng.choice(_ORDERS))


def _beginnings_first(sample: Sample, rng: random.Random) -> list[int]:
    """Returns the offsets of all words of metadata, shuffled, those of headers first."""
    near: list[int] = []
    far: list[int] = []
    for at in sample.words():
        start = max(start for start, end in sample.metadata if start <= at)
        (near if at - start < _HEADER else far).append(at)
    rng.shuffle(near)
    rng.shuffle(far)
    return near + far


_PATIENCE = 20
"""Multiple of the limit after which a block that waits counts as hanging."""


class TooSlow(BaseException):
    """The block exceeded its time. A `BaseException`, so that no code under test catches it."""


@contextlib.contextmanager
def time_limit(seconds: int = SOON) -> Iterator[None]:
    """Raises `TooSlow` in the main thread if the block exceeds a limit of processor time, or hangs.

    Processor time does not depend on other processes of the machine.
    """

    def stop(number: int, _frame: object) -> None:
        what = f"took more than {seconds} s of processor time" if number == signal.SIGPROF else "hangs"
        raise TooSlow(what)

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, seconds * _PATIENCE))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_limit(most: int = MUCH_MEMORY) -> Iterator[None]:
    """Makes allocations of the block over a limit fail with `MemoryError`, used or not (RLIMIT_DATA)."""
    with open("/proc/self/status") as status:
        now = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
