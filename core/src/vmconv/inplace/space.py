"""Which bytes of a file stay, which are written over, and which are dead once it has become another."""

from __future__ import annotations

import numpy as np

from vmconv.inplace.codec import Ranges
from vmconv.model.extents import Column, Extents, Kind, allocated, cut
from vmconv.model.plan import Action, FilePlan, Plan
from vmconv.model.sources import File


def carrier_plan(plan: Plan, carrier: File) -> FilePlan:
    """Returns the output that `carrier` becomes: the one that has its payload, or else the one that the user named."""
    for file in plan.files:
        shares = file.shares()
        if any(file.sources[index] is carrier for index in set(shares.source.tolist())):
            return file
    return plan.files[-1]


def written(file: FilePlan, *actions: Action) -> Ranges:
    """Returns the ranges of an output that these actions make."""
    chosen = np.isin(file.steps.action, actions)
    return _joined(file.steps.offset[chosen], file.steps.length[chosen])


def clipped(ranges: Ranges, low: int, high: int) -> Ranges:
    """Returns the parts of ranges that lie between two offsets."""
    begin, end = np.clip(ranges[:, 0], low, high), np.clip(ranges[:, 0] + ranges[:, 1], low, high)
    there = end > begin
    inside: Ranges = np.stack([begin, end - begin], axis=1)[there]
    return inside


def dead_ranges(file: FilePlan, carrier: File, block: int) -> Ranges:
    """Returns the ranges that take space on storage and are nothing in the output that `carrier` becomes.

    Where the output has slack, whole blocks only: nothing else can be freed, and nobody looks at it. Behind the end of
    `carrier` too: XFS sets space aside behind what is written, and keeps it when more is written later.
    """
    shared = min(carrier.size, file.size)
    start, length = _unused(file.table.window(0, shared))
    rows, row_length = cut(allocated(carrier), start, length, start)
    data = rows.kind == Kind.DATA
    found = _joined(rows.start[data], row_length[data])
    if not file.slack:
        return found
    behind, gap = _unused(file.table.window(shared, file.size - shared))
    # The last block of the file may end in the middle of one on storage: with what is behind it, it is whole.
    both = np.concatenate([found, np.stack([behind + shared, gap], axis=1)])
    return _whole(_joined(both[:, 0], both[:, 1]), block)


def unused(file: FilePlan, block: int) -> Ranges:
    """Returns the whole blocks of an output that are nothing."""
    return _whole(_joined(*_unused(file.table)), block)


def _whole(ranges: Ranges, block: int) -> Ranges:
    """Returns the whole blocks of ranges."""
    begin = -(-ranges[:, 0] // block) * block
    end = (ranges[:, 0] + ranges[:, 1]) // block * block
    there = end > begin
    whole: Ranges = np.stack([begin, end - begin], axis=1)[there]
    return whole


def _unused(table: Extents) -> tuple[Column, Column]:
    nothing = table.kind != Kind.DATA
    return table.start[nothing], table.length[nothing]


def _joined(start: Column, length: Column) -> Ranges:
    """Returns sorted ranges with neighbours merged."""
    if not len(start):
        return np.empty((0, 2), dtype=np.int64)
    end = start + length
    first = np.append(True, start[1:] != end[:-1])
    last = np.append(first[1:], True)
    return np.stack([start[first], end[last] - start[first]], axis=1)
