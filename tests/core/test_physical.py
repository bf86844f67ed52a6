"""Where bytes lie on storage, as a filesystem tells it (`vmconv.io.physical`)."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from vmconv.errors import ReadError
from vmconv.io.physical import BlockSpace, Encoded, PhysicalMap
from vmconv.model.extents import MAX_SIZE, Extents, Kind
from vmconv.model.sources import Blob, Source
from vmconv.system import linux
from vmconv.testing.memory import MemoryFile

BLOCK = 4096
Rows = list[tuple[int, int, int]]
"""Ranges `(logical, length, physical)`."""


class Told:
    """What the filesystems tell of files, by descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain: dict[int, Rows] = {}
        self.encoded: dict[int, Rows] = {}
        self.error: int | None = None
        monkeypatch.setattr(linux, "filesystem_id", lambda fd: b"even" if fd % 2 == 0 else b"odd")
        monkeypatch.setattr(linux, "physical_ranges", self.ranges_of(self.plain))
        monkeypatch.setattr(linux, "encoded_ranges", self.ranges_of(self.encoded))

    def ranges_of(self, told: dict[int, Rows]):  # type: ignore[no-untyped-def]
        def ranges(descriptor: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            return np.array(told.get(descriptor, []), dtype=np.int64).reshape(-1, 3)

        return ranges


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def file_of(descriptor: int, size: int) -> MemoryFile:
    file = MemoryFile(f"file{descriptor}", size)
    file.descriptor = descriptor
    return file


def rows_of(table: Extents) -> list[tuple[int, int, Source | None, int]]:
    return [(row.start, row.length, row.source, row.offset) for row in table]


def test_rows_on_storage_have_addresses_and_others_files(told: Told) -> None:
    file = file_of(2, 90)
    told.plain[2] = [(60, 40, 500), (10, 20, 1000), (30, 10, 2000), (100, 20, 3000)]
    ((_, _, _, _), (_, _, storage, _), *_) = rows = rows_of(PhysicalMap().apply(Extents.whole(file)))
    assert isinstance(storage, BlockSpace)
    assert rows == [
        (0, 10, file, 0),
        (10, 20, storage, 1000),
        (30, 10, storage, 2000),
        (40, 20, file, 40),
        (60, 30, storage, 500),
    ]
    assert storage.size == MAX_SIZE
    assert storage.name == "storage"
    with pytest.raises(NotImplementedError):
        storage.read(0, 1)


def test_a_file_entirely_on_storage_has_no_own_rows(told: Told) -> None:
    file = file_of(2, 90)
    told.plain[2] = [(0, 90, 500)]
    table = Extents.of([(0, Kind.DATA, file, 40), (50, Kind.ZERO, None, 0)], 70)
    (first, second) = rows_of(PhysicalMap().apply(table))
    assert (first[0], first[1], first[3]) == (0, 50, 540)
    assert isinstance(first[2], BlockSpace)
    assert second == (50, 20, None, 0)


def test_files_of_one_filesystem_lie_on_one_storage(told: Told) -> None:
    one, other, elsewhere, blob = file_of(2, 8), file_of(4, 8), file_of(5, 8), Blob("letters", b"letters!")
    told.plain |= {2: [(0, 8, 100)], 4: [(0, 8, 100)], 5: [(0, 8, 100)]}
    places = PhysicalMap()
    first, second, third, fourth = (places.apply(Extents.whole(each)) for each in (one, other, elsewhere, blob))
    assert first == second
    assert first.sources[0] is not third.sources[0]
    assert rows_of(fourth) == [(0, 8, blob, 0)]
    assert PhysicalMap().apply(Extents.whole(one)) != first
    identities = [
        source.identity for table in (first, third) for source in table.sources if isinstance(source, BlockSpace)
    ]
    assert identities == [b"even", b"odd"]


def test_devices_and_unreported_ranges_keep_their_files(told: Told) -> None:
    device, memory, file = file_of(2, 8), file_of(-1, 8), file_of(4, 8)
    device.is_device = True
    told.plain |= {each: [(0, 8, 100)] for each in (2, -1, 4, 0)}
    for each in (device, memory):
        assert rows_of(PhysicalMap().apply(Extents.whole(each))) == [(0, 8, each, 0)]
    assert rows_of(PhysicalMap().apply(Extents.whole(file_of(0, 8))))[0][3] == 100
    told.error = errno.EOPNOTSUPP
    assert rows_of(PhysicalMap().apply(Extents.whole(file))) == [(0, 8, file, 0)]
    told.error = errno.EIO
    with pytest.raises(ReadError, match="file4: extent map cannot be read"):
        PhysicalMap().apply(Extents.whole(file))


def test_encoded_extents_are_shown_by_how_much_of_them_a_file_has(told: Told) -> None:
    size = 4 * Encoded.LONGEST
    file = file_of(2, size)
    told.plain[2] = [(0, BLOCK, 7 * BLOCK)]
    told.encoded[2] = [
        (BLOCK, 2 * BLOCK, 10 * BLOCK),
        (3 * BLOCK, BLOCK, 11 * BLOCK),
        (4 * BLOCK, 2 * BLOCK, 12 * BLOCK),
        # Not an extent of Btrfs: too long, or not at a block.
        (8 * BLOCK, Encoded.LONGEST + BLOCK, 20 * BLOCK),
        (2 * Encoded.LONGEST, BLOCK, 30 * BLOCK + 512),
        (3 * Encoded.LONGEST, Encoded.LONGEST, 40 * BLOCK),
    ]
    plain = rows_of(PhysicalMap().apply(Extents.whole(file)))
    assert [(start, length) for start, length, _, _ in plain] == [(0, BLOCK), (BLOCK, size - BLOCK)]
    rows = rows_of(PhysicalMap(encoded=True).apply(Extents.whole(file)))
    encoded = {
        start // BLOCK: (length // BLOCK, source.length // BLOCK, Encoded.extent(offset) // BLOCK)
        for start, length, source, offset in rows
        if isinstance(source, Encoded)
    }
    whole = Encoded.LONGEST // BLOCK
    assert encoded == {1: (2, 2, 10), 3: (1, 1, 11), 4: (2, 2, 12), 3 * whole: (whole, whole, 40)}
    own = [(start // BLOCK, length // BLOCK) for start, length, source, _ in rows if source is file]
    assert own == [(6, 3 * whole - 6)]
    two = [source for _, _, source, _ in rows if isinstance(source, Encoded) and source.length == 2 * BLOCK]
    assert two[0] is two[1]
    assert two[0].identity == b"even"


@pytest.mark.parametrize("block", [0, 1, 2, 1000])
def test_addresses_of_an_extent_do_not_meet_those_of_the_next(block: int) -> None:
    here, after = (int(Encoded.spread(np.array([at * BLOCK]))[0]) for at in (block, block + 1))
    assert here + Encoded.LONGEST < after
    for at in (here, here + 1, here + Encoded.LONGEST - 1):
        assert Encoded.extent(at) == block * BLOCK
