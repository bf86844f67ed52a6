"""The conformance tests of chains, with layers of different sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar, NamedTuple

import pytest

from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.model.identity import derived
from vmconv.model.image import Image
from vmconv.model.layout import Backing
from vmconv.testing.disks import content, disk_of, patterned
from vmconv.testing.identities import Files, IdentityTests
from vmconv.testing.memory import MemoryFile

_MIB = 1 << 20


class _Layer(NamedTuple):
    """A layer of `size` bytes, with payload in the `(start, length)` ranges `own`, sorted; HOLE elsewhere."""

    size: int
    own: Sequence[tuple[int, int]]


def _full(size: int) -> _Layer:
    return _Layer(size, [(0, size)])


_EDGE = 4 * _MIB + 512
_ODD = 4 * _MIB + 100
_ALL = 9 * _MIB

CHAINS: Mapping[str, Sequence[_Layer]] = {
    "the parent is shorter": [_full(_EDGE), _Layer(_ALL, [(_MIB, 70 * 1024), (6 * _MIB, 512)])],
    "the parent is longer": [_full(_ALL), _Layer(_EDGE, [(_MIB, 512)])],
    "the middle is shorter": [_full(_ALL), _Layer(_EDGE, [(0, 512)]), _Layer(_ALL, [(2 * _MIB, 512)])],
    "the middle is shorter and ends within a sector": [_full(_ALL), _Layer(_ODD, []), _Layer(_ALL, [(0, 512)])],
    "what is added to whole sectors lies before the parent's end": [_full(_ALL), _Layer(_ALL - 100, [(0, 512)])],
}
"""Chains by their special feature, the base first."""


def _seen(layers: Sequence[tuple[_Layer, bytes]]) -> bytes:
    """Returns the bytes that a guest reads, computed without tables: each layer over the one below, at its own size."""
    below = b""
    for layer, payload in layers:
        data = bytearray(below[: layer.size].ljust(layer.size, b"\0"))
        for start, length in layer.own:
            data[start : start + length] = payload[start : start + length]
        below = bytes(data)
    return below


class StackingTests(IdentityTests):
    """The part of `FormatTests` on layers of different sizes."""

    sizes_differ: ClassVar[bool] = True
    """False for a format whose layers must be as large as their parents: others must be refused."""

    @pytest.mark.parametrize("chain", CHAINS)
    def test_layers_that_differ_in_size_read_as_a_guest_would_or_are_refused(self, chain: str) -> None:
        if not self.format.supports_backing:
            pytest.skip("this format has no parents")
        done = 0
        for variant in self.variants:
            try:
                result, expected = self._stacked(CHAINS[chain], variant)
            except PlanError as exc:
                # Some variants have no parents, such as flat ones. The first one must.
                assert not self.sizes_differ or variant != self.variants[0], exc
                assert "\n" not in str(exc)
                continue
            done += 1
            found = content(result.flat)
            assert found[: len(expected)] == expected, variant
            assert not any(found[len(expected) :]), variant
        assert done or not self.sizes_differ

    def _stacked(self, chain: Sequence[_Layer], variant: Mapping[str, str]) -> tuple[Image, bytes]:
        """Returns the top of a chain, written and read back, and the bytes that a guest must read."""
        images: list[Files] = []
        written: list[tuple[_Layer, bytes]] = []
        for depth, layer in enumerate(chain):
            source = _source(depth)
            name = f"layer{depth}{self.format.suffixes[0]}"
            backing = Backing(f"layer{depth - 1}{self.format.suffixes[0]}", self.format.name) if images else None
            disk = disk_of(_table(layer, source), source, parent=self.opened(*images) if images else None)
            options = variant if images else self.variants[0]
            images.append(self.made(disk, options, derived(b"stack", str(depth)), name, backing))
            written.append((layer, source.read(0, _ALL)))
        return self.opened(*images), _seen(written)


@cache
def _source(depth: int) -> MemoryFile:
    return patterned(_ALL, [(0, _ALL)], seed=depth)


def _table(layer: _Layer, source: MemoryFile) -> Extents:
    rows: list[tuple[int, Kind, MemoryFile | None, int]] = []
    at = 0
    for start, length in layer.own:
        if start > at:
            rows.append((at, Kind.HOLE, None, 0))
        rows.append((start, Kind.DATA, source, start))
        at = start + length
    if at < layer.size:
        rows.append((at, Kind.HOLE, None, 0))
    return Extents.of(rows, layer.size)
