"""Turns the tables of output files into steps: share, copy or write, with a reason for every copied byte.

Zero-copy is a property of a row, not a mode. A row is shared if the storage can share that source and the offsets are
congruent; otherwise it is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vmconv.interface.backend import Congruence, Survey
from vmconv.model.extents import Extents, Kind
from vmconv.model.layout import Layout
from vmconv.model.plan import Action, CopyReason, Destination, FilePlan, Plan, Steps
from vmconv.model.sources import Blob, Decoded, File, Source

_FILLED = {"space": "allocated", "zeros": "written as zeros"}


def merge_plans(plans: Sequence[Plan]) -> Plan:
    """Returns the plans as one, in their order; all have one directory and one backend."""
    if len(plans) == 1:
        return plans[0]
    copies: dict[str, CopyReason] = {}
    for copy in (copy for plan in plans for copy in plan.copies):
        before = copies.get(copy.reason)
        copies[copy.reason] = before.plus(copy) if before else copy
    files = tuple(file for plan in plans for file in plan.files)
    losses = tuple(dict.fromkeys(loss for plan in plans for loss in plan.losses))
    references = tuple(reference for plan in plans for reference in plan.references)
    notes = tuple(note for plan in plans for note in plan.notes)
    return plans[0]._replace(
        files=files, copies=tuple(copies.values()), losses=losses, references=references, notes=notes
    )


def plan_layout(
    layout: Layout,
    name: str,
    directory: str,
    backend: str,
    survey: Survey,
    losses: tuple[str, ...] = (),
    *,
    destination: Destination = "files",
) -> Plan:
    """Returns the plan that writes `layout` as the file `name` in `directory`."""
    reasons = _Reasons()
    files = []
    for out in layout.files:
        steps = _steps(out.table, survey, reasons)
        if out.reason:
            _give_reason(steps, out.table.sources, reasons.number(out.reason))
        files.append(
            FilePlan(out.name or name, out.table.size, steps, out.table.sources, out.table, out.slack, out.allocation)
        )
    copies = tuple(_copy_reasons(files, reasons.texts))
    filled = (file for file in files if file.filled)
    notes = tuple(f"{file.name}: {file.filled} bytes without payload are {_FILLED[file.allocation]}" for file in filled)
    return Plan(
        directory,
        backend,
        tuple(files),
        copies,
        losses + layout.losses,
        layout.references,
        destination,
        notes=notes,
    )


class _Reasons:
    """Texts of reasons by number, so that a row stores an integer."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)


def _steps(table: Extents, survey: Survey, reasons: _Reasons) -> Steps:
    # Holes and zeros need no step.
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
    if survey.congruence is Congruence.EQUAL:
        _stays(steps, reasons)
    elif survey.unit > 1:
        steps = _whole_blocks(steps, table.size, table.sources, survey.unit, reasons)
    return steps


def _stays(steps: Steps, reasons: _Reasons) -> None:
    """Turns shares at unequal offsets into copies: in place, payload cannot move."""
    moved = (steps.action == Action.SHARE) & (steps.offset != steps.source_offset)
    if moved.any():
        steps.action[moved] = Action.COPY
        steps.reason[moved] = reasons.number("the header of the target takes their place")


def _whole_blocks(steps: Steps, size: int, sources: tuple[Source, ...], unit: int, reasons: _Reasons) -> Steps:
    """Turns shares that are no whole blocks at congruent offsets into copies; splits rows with ragged ends."""
    shared = steps.action == Action.SHARE
    apart = shared & ((steps.offset - steps.source_offset) % unit != 0)
    if apart.any():
        steps.action[apart] = Action.COPY
        steps.reason[apart] = reasons.number(f"offsets in source and target differ modulo the {unit}-byte block")
        shared &= ~apart
    limits = np.array([s.size for s in sources], dtype=np.int64)[steps.source]
    end = steps.source_offset + steps.length
    # FICLONERANGE accepts a partial block at the end of the source if it becomes the end of the target.
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
    """Sets the reason of all copies from files; decoded payload has its own."""
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
