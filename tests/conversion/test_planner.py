"""The planner, beside a model that decides about each byte by itself."""

from __future__ import annotations

import os
import struct
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmconv.conversion import refusals
from vmconv.conversion.planner import merge_plans, plan_layout
from vmconv.errors import AccessError, PlanError, ZeroCopyError
from vmconv.interface.backend import Congruence, Survey
from vmconv.io.directory import Directory
from vmconv.model.extents import Extents, Kind
from vmconv.model.layout import Layout, OutFile, Reference
from vmconv.model.plan import Action, CopyReason, Plan, ShareSteps, Totals
from vmconv.model.sources import Blob, Decoded, File, Source
from vmconv.testing.memory import MemoryFile
from vmconv.testing.strategies import tables

REFUSED = "they are on another filesystem"
DECODED = "they are compressed"
HELD = "the format wants them itself"


def decoded(size: int) -> Decoded:
    return Decoded("letters", MemoryFile("packed", 64), unit=1, count=size, decode=_letters, reason=DECODED)


def _letters(first: int, count: int) -> list[bytes]:
    return [b"a"] * count


def model(table: Extents, survey: Survey) -> list[tuple[Action, int, int, str | None] | None]:
    """Returns for each byte what is done: action, source, offset in the source, and why it is copied."""
    bytewise: list[tuple[Action, int, int, str | None] | None] = [None] * table.size
    for row in table:
        if row.source is None:
            continue
        index = next(i for i, source in enumerate(table.sources) if source is row.source)
        for n in range(row.length):
            action, why = _of(row.source, row.offset, row.offset + n, row.start + n, row.end, table.size, survey)
            bytewise[row.start + n] = action, index, row.offset + n, why
    return bytewise


def _of(
    source: Source, begin: int, source_at: int, at: int, end: int, size: int, survey: Survey
) -> tuple[Action, str | None]:
    unit, stop = survey.unit, source_at + end - at
    if isinstance(source, Blob):
        return Action.WRITE, None
    if isinstance(source, Decoded):
        return Action.COPY, DECODED
    if id(source) in survey.refusals:
        return Action.COPY, REFUSED
    if survey.congruence is Congruence.EQUAL:
        return (Action.SHARE, None) if at == source_at else (Action.COPY, "the header of the target")
    if (at - source_at) % unit:
        return Action.COPY, "offsets in source and target differ"
    whole = source_at // unit * unit >= begin and (
        (source_at // unit + 1) * unit <= stop or (stop == source.size and end == size)
    )
    return (Action.SHARE, None) if whole else (Action.COPY, "less than a")


@given(st.data())
def test_each_byte_is_made_as_the_model_says(data: st.DataObject) -> None:
    own, foreign = MemoryFile("own", 41), MemoryFile("foreign", 32)
    sources: tuple[Source, ...] = (own, foreign, Blob("header", bytes(24)), decoded(24))
    table = data.draw(tables(sources, size=data.draw(st.integers(0, 90)), unit=1, holes=False))
    unit = data.draw(st.sampled_from([1, 4, 8]))
    survey = Survey(unit, {id(foreign): REFUSED}, data.draw(st.sampled_from(Congruence)))
    plan = plan_layout(Layout((OutFile(table),)), "disk", "/somewhere", "reflink", survey)
    wanted = model(table, survey)

    reasons = [copy.reason for copy in plan.copies]
    found: list[tuple[Action, int, int, str | None] | None] = [None] * table.size
    (file,) = plan.files
    for action in Action:
        for offset, length, source, source_offset in file.steps.rows(action):
            for n in range(length):
                assert found[offset + n] is None
                found[offset + n] = action, source, source_offset + n, None
    assert found == [one and (*one[:3], None) for one in wanted]
    assert file.steps.offset.tolist() == sorted(file.steps.offset.tolist())

    expected = Counter(one[3] for one in wanted if one and one[0] == Action.COPY)
    assert len(reasons) == len(expected)
    for why, count in expected.items():
        (copy,) = (copy for copy in plan.copies if why is not None and copy.reason.startswith(why))
        assert copy.bytes == count
        assert copy.ranges > 0
    actions = Counter(one[0] for one in wanted if one)
    zero = table.size - sum(actions.values())
    assert plan.totals == Totals(actions[Action.SHARE], actions[Action.COPY], actions[Action.WRITE], zero)


def plan_of(*sources: Source, survey: Survey, losses: tuple[str, ...] = (), reason: str | None = None) -> Plan:
    """Returns the plan of an image of one file for each source, each of which is all of its source."""
    files = tuple(OutFile(Extents.whole(source), f"{source.name}.out", reason) for source in sources)
    return plan_layout(Layout(files, ("a comment",)), "disk", "/somewhere", "reflink", survey, losses)


def test_a_reason_states_bytes_ranges_and_the_first_place() -> None:
    one, other = MemoryFile("one", 10), MemoryFile("other", 20)
    plan = plan_of(one, other, survey=Survey(1, {id(one): REFUSED, id(other): REFUSED}))
    assert plan.copies == (CopyReason(REFUSED, 30, 2, "one", 0),)


def test_the_reason_of_an_output_applies_to_copies_from_files_only() -> None:
    file = MemoryFile("file", 10)
    rows = Extents.of([(0, 2, file, 3), (4, 2, source := decoded(6), 0)], 10)  # type: ignore[list-item]
    assert source.size == 6
    plan = plan_layout(
        Layout((OutFile(rows, None, HELD),)), "disk", "/somewhere", "copy", Survey(1, {id(file): REFUSED})
    )
    assert {(copy.reason, copy.bytes, copy.file, copy.offset) for copy in plan.copies} == {
        (HELD, 4, "file", 3),
        (DECODED, 6, "letters", 0),
    }


def test_plans_joined_keep_their_order_and_add_what_they_copy() -> None:
    one, other = MemoryFile("one", 10), MemoryFile("other", 20)
    survey = Survey(1, {id(one): REFUSED, id(other): REFUSED})
    first = plan_of(one, survey=survey, losses=("an icon",))
    second = plan_of(other, decoded(5), survey=survey, losses=("an icon", "a note"))
    plan = merge_plans([first, second])
    assert [file.name for file in plan.files] == ["one.out", "other.out", "letters.out"]
    assert plan.copies == (CopyReason(REFUSED, 30, 2, "one", 0), CopyReason(DECODED, 5, 1, "letters", 0))
    assert plan.losses == ("an icon", "a comment", "a note")
    assert plan.totals == Totals(0, 35, 0, 0)
    assert merge_plans([first]) is first


def test_payload_in_other_files_is_counted_and_named() -> None:
    file = MemoryFile("file", 4096)
    table = Extents.whole(Blob("descriptor", bytes(300)))
    references = (Reference("file", file, 4096), Reference("other", MemoryFile("other", 512), 512))
    layout = Layout((OutFile(table),), (), references)
    plan = plan_layout(layout, "disk", "/somewhere", "reflink", Survey(4096))
    assert plan.totals == Totals(0, 0, 300, 0, 4608)
    assert plan.way == "reference"
    assert plan_of(file, survey=Survey(4096)).way == "reflink"
    shared = plan_layout(Layout((OutFile(Extents.whole(file)),), (), references), "d", "/", "reflink", Survey(4096))
    assert shared.way == "reflink"


@pytest.mark.parametrize("longest", [1, 7, 64, 1000])
def test_ranges_to_share_are_split_and_ordered_without_a_byte_lost(longest: int) -> None:
    one, other = MemoryFile("one", 200), MemoryFile("other", 100)
    table = Extents.of([(0, 2, other, 10), (90, 1, None, 0), (100, 2, one, 50), (200, 2, one, 0)], 250)  # type: ignore[list-item]
    (file,) = plan_layout(Layout((OutFile(table),)), "disk", "/", "reflink", Survey(1)).files
    steps = file.shares().split(longest)
    assert int(steps.length.max()) <= longest
    assert len(steps) == sum(-(-length // longest) for length in (90, 100, 50))

    def bytewise(source: int, source_offset: int, length: int, offset: int) -> list[tuple[int, int, int]]:
        return [(offset + n, source, source_offset + n) for n in range(length)]

    columns = (steps.source.tolist(), steps.source_offset.tolist(), steps.length.tolist(), steps.offset.tolist())
    made = [each for row in zip(*columns, strict=True) for each in bytewise(*row)]
    assert sorted(made) == sorted([*bytewise(0, 10, 90, 0), *bytewise(1, 50, 100, 100), *bytewise(1, 0, 50, 200)])
    by_target = steps.ordered(by_target=True).offset.tolist()
    assert by_target == sorted(by_target)
    by_source = steps.ordered(by_target=False)
    places = list(zip(by_source.source.tolist(), by_source.source_offset.tolist(), strict=True))
    assert places == sorted(places)
    assert {type(source) for source in steps.sources} <= {File, MemoryFile}


def test_ranges_to_share_are_packed_as_the_kernel_takes_them() -> None:
    one, two = MemoryFile("one", 100), MemoryFile("two", 100)
    one.descriptor, two.descriptor = 11, 12
    columns = (np.array(each, dtype=np.int64) for each in ([8, 0, 4], [1, 2, 3], [30, 20, 10]))
    steps = ShareSteps((one, two, Blob("x", b"")), np.array([1, 0, 1], dtype=np.int32), *columns)
    assert list(struct.iter_unpack("<qQQQ", steps.pack())) == [(12, 8, 1, 30), (11, 0, 2, 20), (12, 4, 3, 10)]
    assert steps.ordered(by_target=True).offset.tolist() == [10, 20, 30]
    assert steps.ordered(by_target=False).offset.tolist() == [20, 10, 30]
    assert steps.take(steps.offset > 30).pack() == b""
    empty = steps.take(steps.offset > 30)
    assert ShareSteps((), empty.source, empty.source_offset, empty.length, empty.offset).pack() == b""


def test_only_slack_of_the_writer_may_keep_old_bytes() -> None:
    file = MemoryFile("file", 10)
    outs = (OutFile(Extents.whole(file)), OutFile(Extents.whole(file), "slack", slack=True))
    plan = plan_layout(Layout(outs), "disk", "/", "reflink", Survey(1))
    assert [(made.name, made.slack) for made in plan.files] == [("disk", False), ("slack", True)]


def test_steps_are_compared_by_identity() -> None:
    """By value, numpy would compare each of their numbers."""
    file = MemoryFile("file", 10)
    (one,), (other,) = (plan_of(file, survey=Survey(1)).files for _ in range(2))
    for mine, theirs in ((one.steps, other.steps), (one.shares(), other.shares())):
        assert mine == mine  # noqa: PLR0124
        assert mine != theirs
        assert len({mine, theirs}) == 2


def test_the_end_of_a_file_is_a_whole_block_only_at_the_end_of_the_output() -> None:
    file = MemoryFile("file", 600)
    for rest, copied in ((0, 0), (40, 88)):
        rows = [(0, Kind.DATA, file, 0), *([(600, Kind.ZERO, None, 0)] if rest else [])]
        table = Extents.of(rows, 600 + rest)
        plan = plan_layout(Layout((OutFile(table),)), "disk", "/", "reflink", Survey(512))
        assert (plan.totals.copied, plan.totals.shared) == (copied, 600 - copied)
    table = Extents.of([(0, Kind.DATA, file, 0)], 520)
    plan = plan_layout(Layout((OutFile(table),)), "disk", "/", "reflink", Survey(512))
    assert (plan.totals.copied, plan.totals.shared) == (8, 512)


# -- what is refused


def disk_plan(size: int, *, copied: bool) -> Plan:
    source = MemoryFile("source", size)
    layout = Layout((OutFile(Extents.whole(source)),))
    return plan_layout(layout, "target", "/", "copy", Survey(1, {id(source): REFUSED} if copied else {}))


@pytest.mark.parametrize(
    ("zero_copy", "copied", "right"), [("require", True, False), ("require", False, True), ("prefer", True, True)]
)
def test_copies_are_refused_if_zero_copy_is_required(zero_copy: str, copied: bool, right: bool) -> None:
    if right:
        refusals.refuse_copies("target", zero_copy, disk_plan(64, copied=copied))
        return
    with pytest.raises(ZeroCopyError, match=f"target: 64 bytes would have to be copied because {REFUSED}"):
        refusals.refuse_copies("target", zero_copy, disk_plan(64, copied=copied))


@pytest.mark.parametrize(("free", "blocks", "right"), [(17, 1, True), (16, 1, False), (0, 0, True), (0, 5, False)])
def test_a_plan_larger_than_the_free_space_is_refused(
    monkeypatch: pytest.MonkeyPatch, free: int, blocks: int, right: bool
) -> None:
    space = SimpleNamespace(f_bavail=free, f_frsize=4, f_blocks=blocks)
    monkeypatch.setattr(os, "statvfs", lambda _path: space)
    plan = merge_plans([disk_plan(64, copied=True), plan_of(Blob("header", bytes(4)), survey=Survey(1))])
    refusals.refuse_too_large(disk_plan(64, copied=False))
    if right:
        refusals.refuse_too_large(plan)
    else:
        with pytest.raises(PlanError, match=f"/: 68 bytes would have to be written, {4 * free} are free"):
            refusals.refuse_too_large(plan)
    monkeypatch.setattr(os.path, "isdir", lambda _path: False)
    refusals.refuse_too_large(plan)


def test_a_source_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = MemoryFile("one", 1), MemoryFile("two", 1)
    refusals.refuse_changed([one, two])
    monkeypatch.setattr(two, "changed", lambda: True)
    with pytest.raises(AccessError, match="two: changed while"):
        refusals.refuse_changed([one, two])


def test_files_to_make_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"other")
    plan = disk_plan(4, copied=True)
    with Directory.at(str(tmp_path)) as directory:

        def refused(plan: Plan, sources: list[File], **how: Any) -> str:
            try:
                with refusals.no_collisions(plan, directory, sources, **{"force": False, **how}):
                    return ""
            except PlanError as exc:
                return str(exc)

        same, other = (File(name, os.open(tmp_path / name, os.O_RDONLY)) for name in ("target", "other"))
        with closing(same), closing(other):
            assert refused(plan, [other]).endswith("target: already exists")
            assert refused(plan, [other, same]).endswith("target: is part of the source")
            assert refused(plan, [other, same], force=True).endswith("target: is part of the source")
            assert refused(plan, [other, same], but={"target"}) == ""
            assert refused(plan, [other], force=True) == ""
            twice = plan._replace(files=plan.files * 2)
            assert refused(twice, [], force=True).endswith("target: would be made twice")
        (tmp_path / "target").unlink()
        assert refused(plan, []) == ""
