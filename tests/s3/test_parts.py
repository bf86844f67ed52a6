"""The division of an object into parts: within the limits of S3, whatever the plan is. Large payload is a stand-in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmconv.errors import PlanError
from vmconv.model.extents import Extents, Kind
from vmconv.model.plan import Action, FilePlan, Steps
from vmconv.model.sources import Source
from vmconv_s3.parts import MOST_PARTS, SMALLEST, Part, parts_of, rows_copied

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
LARGEST = 5 * GIB


class Payload(Source):
    """A source that is never read."""

    name, size = "payload", 1 << 60

    def read(self, offset: int, length: int) -> bytes:
        raise AssertionError


def plan(rows: list[tuple[int, int, Action, int]], size: int) -> FilePlan:
    """Returns a plan of `(offset, length, action, source)`; payload lies at its offset in the source, plus 1 GiB."""
    offset, length, action, source = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    steps = Steps(
        offset,
        length,
        action.astype(np.uint8),
        source.astype(np.int32),
        offset + GIB,
        np.where(action == Action.COPY, 0, -1).astype(np.int32),
    )
    # Only its steps matter for parts.
    table = Extents.of([(0, Kind.ZERO, None, 0)], size)
    return FilePlan("disk", size, steps, (Payload(), Payload()), table, slack=False)


def check(file: FilePlan, parts: list[Part], copyable: list[bool]) -> None:
    """Asserts the rules of S3, and that copied parts hold what the plan says."""
    assert len(parts) <= MOST_PARTS
    at = 0
    for part in parts:
        assert part.offset == at
        assert 0 < part.length <= (LARGEST if part.is_copied else GIB)
        at = part.end
    assert at == file.size
    assert all(part.length >= SMALLEST for part in parts[:-1])
    rows = list(zip(*(c.tolist() for c in (file.steps.offset, file.steps.length, file.steps.action)), strict=True))
    for part in parts:
        if not part.is_copied:
            continue
        assert copyable[part.source]
        assert part.at == part.offset + GIB
        covered = 0
        for (offset, length, action), source in zip(rows, file.steps.source.tolist(), strict=True):
            inside = min(offset + length, part.end) - max(offset, part.offset)
            if inside > 0:
                assert (action, source) == (Action.COPY, part.source)
                covered += inside
        assert covered == part.length
    copied = rows_copied(file, parts)
    assert int(copied.sum()) == sum(part.length for part in parts if part.is_copied)
    assert (copied >= 0).all()
    assert (copied <= file.steps.length).all()


ROW = st.tuples(
    st.one_of(st.just(0), st.integers(1, 64 << 10), st.integers(1, 12 * MIB)),
    st.one_of(st.integers(1, 64 << 10), st.integers(4 * MIB, 6 * MIB), st.integers(1, 2 * GIB)),
    st.sampled_from([Action.COPY, Action.WRITE]),
    st.integers(0, 1),
)


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 8 * MIB), st.lists(st.booleans(), min_size=2, max_size=2))
def test_parts_are_within_the_limits_and_hold_what_is_planned(
    given_rows: list[Any], tail: int, copyable: list[bool]
) -> None:
    rows, at = [], 0
    for gap, length, action, source in given_rows:
        rows.append((at + gap, length, action, source))
        at += gap + length
    file = plan(rows, at + tail)
    check(file, parts_of(file, copyable), copyable)


def test_ranges_of_less_than_a_part_are_sent() -> None:
    file = plan([(number * 6 * MIB, SMALLEST - 1, Action.COPY, 0) for number in range(10)], 60 * MIB)
    assert not any(part.is_copied for part in parts_of(file, [True, True]))


def test_metadata_takes_what_it_lacks_from_the_payload_behind_it() -> None:
    file = plan([(0, 4096, Action.WRITE, 1), (4096, 40 * MIB, Action.COPY, 0)], 40 * MIB + 4096)
    first, second = parts_of(file, [True, True])
    assert first == Part(0, SMALLEST)
    assert second == Part(SMALLEST, 40 * MIB + 4096 - SMALLEST, 0, SMALLEST + GIB)


def test_the_last_part_may_be_small() -> None:
    file = plan([(0, 40 * MIB, Action.COPY, 0), (40 * MIB, 512, Action.WRITE, 1)], 40 * MIB + 512)
    assert parts_of(file, [True, True]) == [Part(0, 40 * MIB, 0, GIB), Part(40 * MIB, 512)]


@pytest.mark.parametrize("size", [15 * GIB, 100 * GIB, TIB, 9 * TIB])
def test_parts_that_are_sent_grow_with_the_object(size: int) -> None:
    file = plan([(0, size, Action.COPY, 0)], size)
    parts = parts_of(file, [False, False])
    check(file, parts, [False, False])
    # Servers may allow 1,000 only.
    assert len(parts) <= 1000 or size > 60 * GIB


@pytest.mark.parametrize("size", [TIB, 40 * TIB])
def test_parts_that_are_copied_grow_with_the_object(size: int) -> None:
    file = plan([(0, size, Action.COPY, 0)], size)
    parts = parts_of(file, [True, True])
    check(file, parts, [True, True])
    assert all(part.is_copied for part in parts)


def test_more_ranges_than_parts_are_sent_in_part() -> None:
    """12,000 ranges of 6 MiB, and 500 of 1 GiB, each after a cluster of metadata."""
    rows: list[tuple[int, int, Action, int]] = []
    at = 0
    for length in [6 * MIB] * 12_000 + [GIB] * 500:
        rows += [(at, 65536, Action.WRITE, 1), (at + 65536, length, Action.COPY, 0)]
        at += 65536 + length
    file = plan(rows, at)
    parts = parts_of(file, [True, True])
    assert len(parts) <= MOST_PARTS
    assert sum(part.length for part in parts if part.is_copied) >= 490 * GIB


def test_what_no_parts_hold_is_refused() -> None:
    with pytest.raises(PlanError, match="are too many for 10000 parts"):
        parts_of(plan([(0, 11 * TIB, Action.COPY, 0)], 11 * TIB), [False, False])
    with pytest.raises(PlanError, match="would be an empty object"):
        parts_of(plan([(0, 1, Action.COPY, 0)], 1)._replace(size=0), [True, True])
