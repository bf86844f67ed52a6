"""From the tables of output files to what has to be done: share, copy or write, with a reason for every copied byte.

Zero-copy is a property of a row, not a mode: each row is shared when the storage can do it for that source and the
offsets are congruent, and otherwise copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.extents import Column, Extents, Kind, spread
from vmconv.layout import Layout, Reference
from vmconv.sources import Blob, Decoded, File, Source
from vmconv.storage import Survey


class Action(IntEnum):
    """What happens to a range of an output file; ranges without an action read as zero."""

    SHARE = 0
    COPY = 1
    WRITE = 2


@dataclass(frozen=True, eq=False, repr=False)
class ShareSteps:
    """Ranges to share: parallel columns of bytes, and the files that `source` indexes."""

    sources: tuple[Source, ...]
    source: npt.NDArray[np.int32]
    source_offset: Column
    length: Column
    offset: Column

    def __len__(self) -> int:
        return len(self.length)

    def take(self, index: npt.NDArray[np.bool_] | Column) -> ShareSteps:
        return ShareSteps(
            self.sources, self.source[index], self.source_offset[index], self.length[index], self.offset[index]
        )

    def split(self, longest: int) -> ShareSteps:
        """Returns the same ranges in pieces of at most `longest` bytes."""
        row, piece = spread(-(-self.length // longest))
        skip = piece * longest
        return ShareSteps(
            self.sources,
            self.source[row],
            self.source_offset[row] + skip,
            np.minimum(self.length[row] - skip, longest),
            self.offset[row] + skip,
        )

    def ordered(self, *, by_target: bool) -> ShareSteps:
        """Returns the ranges sorted by target offset, or by source and its offset: filesystems differ in taste."""
        return self.take(
            np.argsort(self.offset, kind="stable") if by_target else np.lexsort((self.source_offset, self.source))
        )

    def pack(self) -> bytes:
        """Returns one struct file_clone_range for each range, end to end."""
        descriptors = np.array([s.descriptor if isinstance(s, File) else -1 for s in self.sources] or [-1])
        return np.stack(
            [descriptors[self.source], self.source_offset, self.length, self.offset], axis=1, dtype=np.int64
        ).tobytes()


@dataclass(frozen=True, eq=False, repr=False)
class Steps:
    """What is done to one output file, sorted by offset: parallel columns; `reason` is -1 unless `action` is COPY."""

    offset: Column
    length: Column
    action: npt.NDArray[np.uint8]
    source: npt.NDArray[np.int32]
    source_offset: Column
    reason: npt.NDArray[np.int32]

    def take(self, index: npt.NDArray[np.bool_] | Column) -> Steps:
        return Steps(*(column[index] for column in self._columns()))

    def total(self, action: Action) -> int:
        """Returns how many bytes this action makes."""
        return int(self.length[self.action == action].sum())

    def rows(self, action: Action) -> Iterator[tuple[int, int, int, int]]:
        """Yields `(offset, length, source, source offset)` of each step with this action."""
        chosen = self.take(self.action == action)
        columns = (chosen.offset, chosen.length, chosen.source, chosen.source_offset)
        yield from zip(*(column.tolist() for column in columns), strict=True)

    def _columns(self) -> tuple[Any, ...]:
        return self.offset, self.length, self.action, self.source, self.source_offset, self.reason

    @staticmethod
    def join(parts: Sequence[Steps]) -> Steps:
        joined = Steps(*(np.concatenate(columns) for columns in zip(*(p._columns() for p in parts), strict=True)))
        return joined.take(np.argsort(joined.offset, kind="stable"))


class FilePlan(NamedTuple):
    """One output file: `name` is the file's name in the target's directory, `size` its bytes."""

    name: str
    size: int
    steps: Steps
    sources: tuple[Source, ...]
    table: Extents
    slack: bool = False

    def shares(self) -> ShareSteps:
        rows = self.steps.take(self.steps.action == Action.SHARE)
        return ShareSteps(self.sources, rows.source, rows.source_offset, rows.length, rows.offset)


class CopyReason(NamedTuple):
    """Why bytes are copied: how many, in how many ranges, and where the first of them is."""

    reason: str
    bytes: int
    ranges: int
    file: str
    offset: int

    def plus(self, other: CopyReason) -> CopyReason:
        """Returns what both copy for this reason; the first range is the one of this."""
        return self._replace(bytes=self.bytes + other.bytes, ranges=self.ranges + other.ranges)


class Totals(NamedTuple):
    """Bytes of the output by what is done for them: `zero` bytes are left to read as zero.

    `referenced` bytes are no part of the output: they stay in the source's files, to which it refers.
    """

    shared: int
    copied: int
    written: int
    zero: int
    referenced: int = 0


class Plan(NamedTuple):
    """Everything that will be done, in the order of the files; nothing has been touched yet."""

    directory: str
    backend: str
    files: tuple[FilePlan, ...]
    copies: tuple[CopyReason, ...]
    losses: tuple[str, ...]
    references: tuple[Reference, ...] = ()

    @property
    def totals(self) -> Totals:
        shared, copied, written = (sum(f.steps.total(action) for f in self.files) for action in Action)
        zero = sum(f.size for f in self.files) - shared - copied - written
        return Totals(shared, copied, written, zero, sum(reference.length for reference in self.references))

    @property
    def way(self) -> str:
        """How payload gets into the result: "reference" when all of it stays where it is, else the backend's name."""
        totals = self.totals
        return "reference" if self.references and not totals.shared and not totals.copied else self.backend


def joined(plans: Sequence[Plan]) -> Plan:
    """Returns one plan that does what all of these do, in their order: they are for one directory and one backend."""
    if len(plans) == 1:
        return plans[0]
    copies: dict[str, CopyReason] = {}
    for copy in (copy for plan in plans for copy in plan.copies):
        before = copies.get(copy.reason)
        copies[copy.reason] = before.plus(copy) if before else copy
    files = tuple(file for plan in plans for file in plan.files)
    losses = tuple(dict.fromkeys(loss for plan in plans for loss in plan.losses))
    references = tuple(reference for plan in plans for reference in plan.references)
    return plans[0]._replace(files=files, copies=tuple(copies.values()), losses=losses, references=references)


def plan_layout(
    layout: Layout, name: str, directory: str, backend: str, survey: Survey, losses: tuple[str, ...] = ()
) -> Plan:
    """Returns the plan that makes `layout` real as the file `name` in `directory`."""
    reasons = _Reasons()
    files = []
    for out in layout.files:
        steps = _steps(out.table, survey, reasons)
        if out.reason:
            _give_reason(steps, out.table.sources, reasons.number(out.reason))
        files.append(FilePlan(out.name or name, out.table.size, steps, out.table.sources, out.table, out.slack))
    copies = tuple(_copy_reasons(files, reasons.texts))
    return Plan(directory, backend, tuple(files), copies, losses + layout.losses, layout.references)


class _Reasons:
    """Reasons by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)


def _steps(table: Extents, survey: Survey, reasons: _Reasons) -> Steps:
    data = table.kind == Kind.DATA
    offset, length = table.start[data], table.length[data]
    source, source_offset = table.source[data], table.offset[data]
    action = np.full(len(offset), Action.SHARE, dtype=np.uint8)
    reason = np.full(len(offset), -1, dtype=np.int32)
    for index, origin in enumerate(table.sources):
        mine = source == index
        if isinstance(origin, Blob):
            action[mine] = Action.WRITE
        elif isinstance(origin, Decoded):
            action[mine], reason[mine] = Action.COPY, reasons.number(origin.reason)
        elif id(origin) in survey.refusals:
            action[mine], reason[mine] = Action.COPY, reasons.number(survey.refusals[id(origin)])
    steps = Steps(offset, length, action, source, source_offset, reason)
    if survey.unit == 0:
        _stays(steps, reasons)
    elif survey.unit > 1:
        steps = _whole_blocks(steps, table.size, table.sources, survey.unit, reasons)
    return steps


def _stays(steps: Steps, reasons: _Reasons) -> None:
    """Turns what is not at its very offset into copies: in place, offsets have to be equal."""
    moved = (steps.action == Action.SHARE) & (steps.offset != steps.source_offset)
    if moved.any():
        steps.action[moved] = Action.COPY
        steps.reason[moved] = reasons.number("the header of the target has to lie in their place")


def _whole_blocks(steps: Steps, size: int, sources: tuple[Source, ...], unit: int, reasons: _Reasons) -> Steps:
    """Turns what is not whole blocks at congruent offsets into copies; splits rows where only their ends are not."""
    shared = steps.action == Action.SHARE
    apart = shared & ((steps.offset - steps.source_offset) % unit != 0)
    if apart.any():
        steps.action[apart] = Action.COPY
        steps.reason[apart] = reasons.number(f"offsets in source and target differ modulo the {unit}-byte block")
        shared &= ~apart
    limits = np.array([s.size for s in sources] or [0], dtype=np.int64)[steps.source]
    end = steps.source_offset + steps.length
    # The end of a file is as good as the end of a block, as long as it becomes the end of a file again.
    to_the_end = (end == limits) & (steps.offset + steps.length == size)
    first = -(-steps.source_offset // unit) * unit
    last = np.where(to_the_end, end, end // unit * unit)
    odd = shared & ((first != steps.source_offset) | (last != end))
    if not odd.any():
        return steps
    why = reasons.number(f"less than a {unit}-byte block at the edge of a range")
    ragged = steps.take(odd)
    low, high = first[odd], np.maximum(last[odd], first[odd])
    begin, stop = ragged.source_offset, ragged.source_offset + ragged.length
    low, high = np.minimum(low, stop), np.minimum(high, stop)
    parts = [steps.take(~odd)]
    for a, b, action, reason in (
        (begin, low, Action.COPY, why),
        (low, high, Action.SHARE, -1),
        (high, stop, Action.COPY, why),
    ):
        there = b > a
        n = int(there.sum())
        parts.append(
            Steps(
                (ragged.offset + a - begin)[there],
                (b - a)[there],
                np.full(n, action, dtype=np.uint8),
                ragged.source[there],
                a[there],
                np.full(n, reason, dtype=np.int32),
            )
        )
    return Steps.join(parts)


def _give_reason(steps: Steps, sources: tuple[Source, ...], reason: int) -> None:
    """Gives this reason to all copies out of files; what is decoded has its own."""
    is_file = np.array([isinstance(source, File) for source in sources] + [False])
    steps.reason[(steps.action == Action.COPY) & is_file[steps.source]] = reason


def _copy_reasons(files: Sequence[FilePlan], texts: Sequence[str]) -> Iterator[CopyReason]:
    for number, text in enumerate(texts):
        chosen = [(file, file.steps.reason == number) for file in files]
        chosen = [(file, rows) for file, rows in chosen if rows.any()]
        if chosen:
            first, rows = chosen[0]
            row = int(np.flatnonzero(rows)[0])
            yield CopyReason(
                text,
                sum(int(file.steps.length[rows].sum()) for file, rows in chosen),
                sum(int(rows.sum()) for _, rows in chosen),
                first.sources[first.steps.source[row]].name,
                int(first.steps.source_offset[row]),
            )
