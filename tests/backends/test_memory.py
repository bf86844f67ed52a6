"""The backend in memory, against files that are plain bytes (`vmconv.testing.memory`)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmconv.errors import BackendError
from vmconv.io.directory import Directory
from vmconv.model.sources import Blob
from vmconv.testing import random_bytes
from vmconv.testing.memory import MemoryBackend, MemoryFile

BLOCK = 512
SIZE = 5 * BLOCK + 100
OTHER = Blob("other", random_bytes(4 * BLOCK + 60))

writes = st.tuples(st.integers(0, SIZE), st.binary(max_size=2) | st.integers(1, 1500).map(random_bytes))
shares = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4))


@settings(deadline=None, max_examples=80)
@given(st.lists(writes | shares, max_size=6), st.integers(0, SIZE), st.none() | st.integers(0, SIZE + 9))
def test_a_file_reads_what_was_written_and_shared(
    steps: list[tuple[int, bytes] | tuple[int, int, int]], start: int, end: int | None
) -> None:
    file, wanted, touched = MemoryFile("file", SIZE), bytearray(SIZE), set[int]()
    for step in steps:
        if len(step) == 2:
            offset, data = step[0], step[1][: SIZE - step[0]]
            file.write(offset, data)
            wanted[offset : offset + len(data)] = data
            touched |= {at // BLOCK for at in range(offset, offset + len(data))}
        else:
            offset, source_offset = step[0] * BLOCK, step[1] * BLOCK
            length = min(step[2] * BLOCK, OTHER.size - source_offset, (5 * BLOCK) - offset)
            file.reference(offset, OTHER, source_offset, length)
            data = OTHER.read(source_offset, length)
            data += bytes(-length % BLOCK)
            wanted[offset : offset + len(data)] = data
            touched |= {at // BLOCK for at in range(offset, offset + length)}
    assert file.read(0, SIZE) == wanted
    assert file.read(start, 700 if start + 700 <= SIZE else SIZE - start) == wanted[start : min(start + 700, SIZE)]
    ranges = file.data_ranges(start, end)
    limit = SIZE if end is None else min(end, SIZE)
    found = [at for low, high in ranges for at in range(low, high)]
    assert found == [at for at in range(start, limit) if at // BLOCK in touched]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))
    assert file.data_ranges() == file.data_ranges(0, SIZE)


def test_neighbouring_blocks_are_one_range() -> None:
    file = MemoryFile("file", SIZE)
    for block in (0, 2, 3, 4):
        file.write(block * BLOCK + 5, b"x")
    assert file.data_ranges() == [(0, BLOCK), (2 * BLOCK, 5 * BLOCK)]


def test_nothing_lies_outside_of_a_file() -> None:
    file = MemoryFile("/tmp/file", 600)
    assert (file.path, file.name, file.size, file.descriptor, file.is_device) == ("/tmp/file", "file", 600, -1, False)
    assert file.read(600, 0) == b""
    file.write(600, b"")
    for offset, length in ((0, 601), (600, 1), (-1, 1), (-1, 0)):
        with pytest.raises(BackendError, match=r"file: .* lies outside 0x258"):
            file.read(offset, length)
        with pytest.raises(BackendError, match=r"file: .* lies outside 0x258"):
            file.write(offset, bytes(length))
    assert not file.changed()
    assert file.stamp != MemoryFile("/tmp/file", 600).stamp
    assert file.stamp.size == 600


def test_files_appear_together_when_they_are_committed() -> None:
    backend, directory = MemoryBackend(), Directory("/there", -1)
    assert not backend.automatic
    ability = backend.capabilities("/there")
    assert (ability.usable, ability.shares, ability.unit) == (True, True, BLOCK)
    assert backend.survey("/there", []).unit == BLOCK
    aborted = backend.begin(directory)
    aborted.create("one", 4, [])
    aborted.abort()
    aborted.commit()
    assert backend.files == {}
    transaction = backend.begin(directory)
    outputs = [transaction.create(name, 4, []) for name in ("one", "two")]
    outputs[1].write(1, b"ab")
    assert backend.files == {}
    transaction.commit()
    assert sorted(backend.files) == ["/there/one", "/there/two"]
    assert backend.files["/there/two"] is outputs[1].finish()
    assert backend.files["/there/two"].read(0, 4) == b"\0ab\0"
    again = backend.begin(directory)
    again.create("two", 9, [])
    with pytest.raises(BackendError, match="/there/two: already exists"):
        again.commit()
    assert backend.files["/there/two"].size == 4
    again = backend.begin(directory, force=True)
    again.create("two", 9, [])
    again.commit()
    assert backend.files["/there/two"].size == 9
