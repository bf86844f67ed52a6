"""Is the result right? Asked outside of the timing, and of qemu-img: a fast wrong answer must not count."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterable

from images import command
from measure import BenchmarkError

_SAMPLE = 1 << 16


def same_as(source: str, source_format: str, target_format: str) -> Callable[[str], None]:
    """Returns a check that a whole target is sound, and the same disk as the source for a guest."""

    def check(target: str) -> None:
        _sound(target, target_format)
        command("qemu-img", "compare", "-f", source_format, "-F", target_format, source, target)

    return check


def samples_of(source: str, target_format: str, offsets: Iterable[int]) -> Callable[[str], None]:
    """Returns a check for disks too large to be read: the target is sound and equals the raw source at some places."""
    return as_remembered(source, target_format, offsets)


def as_remembered(source: str, target_format: str, offsets: Iterable[int]) -> Callable[[str], None]:
    """Returns a check that the target is sound and equals what the raw source, gone by then, has at some places now."""
    places = [offset // _SAMPLE * _SAMPLE for offset in offsets]
    with open(source, "rb") as file:
        wanted = {place: os.pread(file.fileno(), _SAMPLE, place) for place in places}

    def check(target: str) -> None:
        _sound(target, target_format)
        for place, content in wanted.items():
            _same_at(content, target, target_format, place)

    return check


def some_offsets(size: int, count: int = 12) -> list[int]:
    """Returns places all over a disk: its two ends, and some between."""
    return [0, *random.Random(size).sample(range(0, size, _SAMPLE), count), size - _SAMPLE]


def _sound(image: str, format_name: str) -> None:
    if format_name not in ("raw", "vpc"):
        # Of QED, qemu-img 7.2 calls a cluster of each 4 GiB leaked, in images of its own too.
        command("qemu-img", "check", "-f", format_name, image, ok=(0, 3) if format_name == "qed" else (0,))


def _same_at(wanted: bytes, target: str, target_format: str, offset: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        piece = os.path.join(directory, "piece")
        block = offset // _SAMPLE
        # qemu-img counts what it skips as part of the count.
        where = [f"bs={_SAMPLE}", f"skip={block}", f"count={block + 1}"]
        command("qemu-img", "dd", "-f", target_format, "-O", "raw", *where, f"if={target}", f"of={piece}")
        with open(piece, "rb") as file:
            found = file.read()
    if found != wanted:
        raise BenchmarkError(f"{target}: differs from its source at {offset:#x}")
