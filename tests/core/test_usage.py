"""Which ranges of a file are used, against a model that looks at each byte; and how findings are counted."""

from __future__ import annotations

from unittest.mock import patch
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sources import A, B
from vmconv.errors import ImageError
from vmconv.interface import findings
from vmconv.interface.findings import Findings
from vmconv.model import usage
from vmconv.model.extents import Extents, Kind
from vmconv.model.identity import derived, fresh, of_disk
from vmconv.model.usage import GUEST, Metadata, Usage, refuse_overlaps
from vmconv.testing.memory import MemoryFile

quick = settings(deadline=None, max_examples=80)
User = tuple[str, int | None, int, int]
"""Name, number if any, and `[begin, end)` of a range."""


@st.composite
def used(draw: st.DrawFn) -> tuple[Usage, list[User]]:
    """Draws runs of ranges with names, and returns what is used by whom."""
    found, users = Usage(), []
    for turn in range(draw(st.integers(0, 4))):
        name, length = draw(st.sampled_from(["table", "block"])), draw(st.sampled_from([1, 4, 4, 8]))
        offset = draw(st.lists(st.integers(0, 60), max_size=3))
        count = draw(st.integers(1, 3))
        begin = [at + n * length for at in offset for n in range(count)]
        number = [100 * turn + 10 * i + n for i in range(len(offset)) for n in range(count)]
        numbered = draw(st.booleans())
        found.add(
            name,
            np.array(begin, dtype=np.int64) if draw(st.booleans()) else begin,
            length,
            np.array(number, dtype=np.int64) if numbered else None,
        )
        users += [(name, n if numbered else None, at, at + length) for at, n in zip(begin, number, strict=True)]
    if draw(st.booleans()):
        each = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=3))
        begins, lengths = (np.array(column, dtype=np.int64) for column in zip(*each, strict=True))
        found.add_each("entry", begins, lengths, np.arange(len(each)) + 7)
        users += [("entry", 7 + n, at, at + length) for n, (at, length) in enumerate(each)]
    return found, users


@quick
@given(used(), st.sampled_from([1, 1 << 20]))
def test_overlaps_are_those_of_each_byte_and_name_the_users(drawn: tuple[Usage, list[User]], many: int) -> None:
    found, users = drawn
    counts = {at: sum(begin <= at < end for _, _, begin, end in users) for at in range(100)}
    with patch.object(usage, "_MANY", many):
        overlaps = found.overlaps()
    twice: set[int] = set()
    for index, (at, length) in enumerate(zip(overlaps.offset.tolist(), overlaps.length.tolist(), strict=True)):
        twice |= set(range(at, at + length))
        for owner, number in (overlaps.one, overlaps.other):
            name, unit = overlaps.names[int(owner[index])]
            there = [user for user in users if user[0] == name and user[2] <= at < user[3]]
            assert there
            assert not unit or int(number[index]) in [user[1] for user in there]
        words = overlaps.text(index)
        assert words.endswith(f" both lie at {at:#x}")
    assert twice == {at for at, count in counts.items() if count > 1}
    assert bool(overlaps) == bool(twice)
    assert not overlaps.between_payload().any()
    assert found.end == max((end for *_, end in users), default=0)


@quick
@given(used(), st.integers(0, 50), st.integers(0, 60))
def test_gaps_are_unused_bytes(drawn: tuple[Usage, list[User]], start: int, length: int) -> None:
    found, users = drawn
    begin, gap = found.unused(start, start + length)
    free = [at for low, n in zip(begin.tolist(), gap.tolist(), strict=True) for at in range(low, low + n)]
    assert free == [
        at for at in range(start, start + length) if not any(begin <= at < end for _, _, begin, end in users)
    ]
    assert (gap > 0).all()


@quick
@given(
    st.lists(st.tuples(st.integers(-1, 30), st.integers(1, 4)), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4, 512]),
    st.integers(1, 9),
)
def test_very_many_ranges_overlap_as_few_do(ranges: list[tuple[int, int]], unit: int, many: int) -> None:
    begin = np.array([at * unit for at, _ in ranges], dtype=np.int64)
    end = begin + np.array([length * unit for _, length in ranges])
    taken = [at for first, length in ranges for at in range(first, first + length)]
    with patch.object(usage, "_MANY", many):
        found = usage._overlap_of_many(begin, end)
        assert found == (None if begin.min() < 0 else len(set(taken)) < len(taken))


def test_a_file_of_too_many_units_is_sorted() -> None:
    begin, end = np.array([0, 1, 200], dtype=np.int64), np.array([1, 2, 255], dtype=np.int64)
    with patch.object(usage, "_MOST_UNITS", 256):
        assert usage._overlap_of_many(begin, end) is False
    with patch.object(usage, "_MOST_UNITS", 255):
        assert usage._overlap_of_many(begin, end) is None


def test_numbers_of_a_header_may_be_any() -> None:
    found = Usage()
    found.add("table", [1 << 70, 8], 1 << 80)
    assert found.end == 1 << 62
    assert found.overlaps().text(0) == "table and table both lie at 0x2000000000000000"
    for offset, length in (([], 8), ([4], 0), ([4], -1)):
        nothing = Usage()
        nothing.add("table", offset, length)
        assert nothing.end == 0
        assert not nothing.overlaps()


def test_users_are_named_with_the_number_that_they_were_given() -> None:
    found = Usage()
    found.add("header", [0], 16)
    found.add("block", np.array([8, 16, 32], dtype=np.int64), 8, np.array([3, 4, 5]))
    found.add_each("entry", np.array([20, 40]), np.array([3, 8]), np.array([9, 8]))
    words = [found.overlaps().text(index) for index in range(2)]
    assert words == ["block 3 and header both lie at 0x8", "entry 9 and block 4 both lie at 0x14"]
    assert len(found.overlaps().offset) == 2


def test_payload_meets_metadata_and_payload_of_one_source_only() -> None:
    file, other = MemoryFile("disk", 100), MemoryFile("other", 100)
    rows = [(0, Kind.DATA, file, 10), (10, Kind.ZERO, None, 0), (20, Kind.DATA, other, 10), (30, Kind.DATA, file, 19)]
    table = Extents.of(rows, 40)
    found = usage.overlaps(table, file, [Metadata("header", [0], 11)])
    assert [found.text(index) for index in range(len(found.offset))] == [
        "guest address 0x0 and header both lie at 0xa",
        "guest address 0x1e and guest address 0x9 both lie at 0x13",
    ]
    assert found.between_payload().tolist() == [False, True]
    assert not usage.overlaps(table, other, [Metadata("header", [0, 20], 10)])
    assert found.names == [("header", 0), (GUEST, 1)]
    with pytest.raises(ImageError, match="disk: guest address 0x0 and header both lie at 0xa"):
        refuse_overlaps(table, file, [Metadata("header", [0], 11)])
    refuse_overlaps(table, file, [Metadata("header", [0], 10)], other)
    with pytest.raises(ImageError, match="disk: guest address 0x1e and guest address 0x9"):
        refuse_overlaps(table, file)


# -- findings


def test_all_findings_are_counted_and_the_first_are_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "SHOWN", 3)
    found = Findings()
    found.corrupt("one")
    found.corrupt("two", 5)
    found.corrupt_where(np.array([False, True, False, True]), lambda index: f"at {index}")
    found.corrupt_where(np.array([False]), lambda index: f"at {index}")
    found.corrupt("more")
    found.corrupt_where(np.array([True]), lambda index: f"at {index}")
    for name in ("a", "b", "c", "d"):
        found.leak(name, 2)
        found.doubt(name)
    report = found.report(allocated=4, total=9, end=77)
    assert report.corruptions == ("one", "two", "at 1")
    assert report.corruption_count == 1 + 5 + 2 + 1 + 1
    assert report.leaks == report.doubts == ("a", "b", "c")
    assert report.leak_count == 8
    assert (report.allocated_clusters, report.total_clusters, report.image_end, report.errors) == (4, 9, 77, ())
    one = Findings()
    one.leak("a")
    assert one.leak_count == 1


@pytest.mark.parametrize(("count", "enough"), [((1 << 20) - 1, False), (1 << 20, True), ((1 << 20) + 1, True)])
def test_a_check_stops_after_many_findings(count: int, enough: bool) -> None:
    found = Findings()
    assert not found.enough
    found.corrupt("all", count)
    assert found.enough is enough


def test_overlaps_count_as_many_units_as_are_used_twice() -> None:
    used = Usage()
    used.add("one", [0], 80)
    used.add("other", [8], 20)
    used.add("third", [40], 16)
    found = Findings()
    found.overlaps(used, 8)
    assert found.corruption_count == 3 + 2
    assert found.corruptions == ["other and one both lie at 0x8", "third and one both lie at 0x28"]
    nothing = Findings()
    nothing.overlaps(Usage(), 8)
    assert nothing.corruption_count == 0


def test_whole_units_that_nothing_uses_are_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Usage()
    used.add("block", [8, 16, 40, 60], 8)
    found = Findings()
    found.unused(used, 8, 0, 100)
    assert found.leak_count == 1 + 2 + 1 + 4
    assert found.leaks == ["cluster at 0x0", "2 clusters from 0x18 on", "cluster at 0x30", "4 clusters from 0x44 on"]
    monkeypatch.setattr(findings, "SHOWN", 2)
    few = Findings()
    few.unused(used, 8, 0, 100)
    assert (few.leak_count, len(few.leaks)) == (8, 2)


# -- ids


def test_ids_are_uuids_of_their_version() -> None:
    for identity, version in ((fresh(), 4), (derived(bytes(16), "a"), 8), (derived(b"\xff" * 16, "b"), 8)):
        found = UUID(bytes=identity)
        assert (found.version, found.variant) == (version, "specified in RFC 4122")
    assert fresh() != fresh()
    many = [fresh() for _ in range(200)]
    # Each other bit is random: seen as 0 and as 1.
    ones = zeros = 0
    for identity in many:
        number = int.from_bytes(identity, "big")
        ones |= number
        zeros |= ~number
    fixed = int(UUID("00000000-0000-f000-c000-000000000000"))
    assert (ones & zeros) % (1 << 128) == (1 << 128) - 1 - fixed


def test_ids_follow_from_identity_and_label() -> None:
    one, other = bytes(16), bytes(15) + b"\x01"
    assert derived(one, "a") == derived(one, "a")
    assert len({derived(one, "a"), derived(one, "b"), derived(other, "a"), derived(one, "\udc80")}) == 4


def test_a_disk_has_one_id_until_a_file_changes() -> None:
    file, again = MemoryFile("disk", 100), MemoryFile("disk", 100)
    table = Extents.of([(0, Kind.DATA, A, 0), (10, Kind.DATA, B, 5)], 20)
    same = Extents.of([(0, Kind.DATA, A, 0), (10, Kind.DATA, B, 5)], 20)
    moved = Extents.of([(0, Kind.DATA, A, 0), (10, Kind.DATA, B, 6)], 20)
    found = of_disk(table, [file], "x")
    assert found == of_disk(same, [file], "x")
    assert len({found, *(of_disk(*other) for other in ((moved, [file], "x"), (table, [again], "x")))}) == 3
    assert len({found, of_disk(table, [file], "y"), of_disk(table, [], "x"), of_disk(table, [file, again], "x")}) == 4
