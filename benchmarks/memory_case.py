"""The case of memory images: VMware's memory for debuggers, beside a plain copy as other converters make it."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator

from bench import VMCONV, Bench
from images import GIB, Place, command, sparse_raw
from measure import Contender, Measured

_PAGE = 4096
_GAP = 3 * GIB
"""Where VMware's PCs have no RAM: from here to 4 GiB."""
_LARGE = 64 * GIB
_PIECES = 16


def memory(bench: Bench, place: Place) -> None:
    """A saved state to an ELF core and to LiME: dense, and of 64 GiB with a gap below 4 GiB."""
    raw = bench.random(place)
    with place.scratch("dense.vmss", "dense.vmem") as (state, payload):
        command("cp", "--reflink=always", raw, payload)
        _state(state, bench.size)
        title = f"{bench.size >> 30} GiB of memory, all random"
        measured = _measured(bench, place, title, state, payload)
        for name in ("vmconv to ELF", "vmconv to LiME"):
            bench.at_least(measured, f"{title}, {name}: 8 times faster than a copy", name, "copy behind a header", 8)
    with place.scratch("large.vmss", "large.vmem") as (state, payload):
        sparse_raw(payload, raw, _LARGE, _PIECES)
        _state(state, _LARGE)
        title = f"{_LARGE >> 30} GiB of sparse memory"
        measured = _measured(bench, place, title, state, None)
        for name in ("vmconv to ELF", "vmconv to LiME"):
            ratio = measured.median(name) / measured.median("import numpy")
            bench.at_most(measured, f"{title}, {name}: as a multiple of importing numpy", ratio, 3, "x")


def _measured(bench: Bench, place: Place, title: str, state: str, payload: str | None) -> Measured:
    elf, lime, copied = (place.path(f"target.{suffix}") for suffix in ("elf", "lime", "copy"))
    contenders = [
        Contender("vmconv to ELF", [VMCONV, "convert", "-q", state, elf], elf, check=_shared(state)),
        Contender("vmconv to LiME", [VMCONV, "convert", "-q", state, lime], lime, check=_same(state)),
        Contender("import numpy", [sys.executable, "-c", "import numpy"]),
    ]
    if payload:
        copy = ["dd", f"if={payload}", f"of={copied}", "bs=1M", "oflag=seek_bytes", f"seek={_PAGE}", "conv=fsync"]
        contenders.append(Contender("copy behind a header", [*copy, "status=none"], copied, heavy=True))
    return bench.measure("memory", place, title, contenders)


def _shared(state: str) -> Callable[[str], None]:
    """Returns a check that a target shares all payload."""

    def check(target: str) -> None:
        command(VMCONV, "prove", state, target)

    return check


def _same(state: str) -> Callable[[str], None]:
    """Returns a check that a target has the same bytes."""

    def check(target: str) -> None:
        command(VMCONV, "compare", state, target)

    return check


def _state(path: str, size: int) -> None:
    """Writes a .vmss that maps a .vmem of this size around the gap."""
    ranges = [(0, 0, min(size, _GAP))] + ([(4 * GIB, _GAP, size - _GAP)] if size > _GAP else [])
    body = b"".join(_tags(ranges)) + b"\0\0"
    with open(path, "wb") as file:
        file.write(struct.pack("<III64sQQ", 0xBED2BED2, 8, 1, b"memory", 92, len(body)) + body)


def _tags(ranges: list[tuple[int, int, int]]) -> Iterator[bytes]:
    yield _tag(b"regionsCount", len(ranges))
    for number, values in enumerate(ranges):
        for name, value in zip((b"regionPPN", b"regionPageNum", b"regionSize"), values, strict=True):
            yield _tag(name, value // _PAGE, number)


def _tag(name: bytes, value: int, *indices: int) -> bytes:
    head = bytes([len(indices) << 6 | 4, len(name)]) + name
    return head + struct.pack(f"<{len(indices) + 1}I", *indices, value)
