"""Which bytes of a file stay, are overwritten, or are dead after a change in place."""

from __future__ import annotations

import numpy as np

from vmconv.inplace.codec import Ranges
from vmconv.model.extents import Column, Extents, Kind, allocated, cut
from vmconv.model.plan import Action, FilePlan, Plan
from vmconv.model.sources import File


def carrier_plan(plan: Plan, carrier: File) -> FilePlan:
    """Returns the plan of the file that `carrier` becomes: the one with its payload, else the user's target."""
    for file in plan.files:
        shares = file.shares()
        if any(file.sources[index] is carrier for index in set(shares.source.tolist())):
            return file
    return plan.files[-1]


def written(file: FilePlan, *actions: Action) -> Ranges:
    """Returns the ranges of an output with these actions."""
    chosen = np.isin(file.steps.action, actions)
    return _joined(file.steps.offset[chosen], file.steps.length[chosen])


def clipped(ranges: Ranges, low: int, high: int) -> Ranges:
    """Returns the parts of ranges inside `[low, high)`."""
    begin, end = np.clip(ranges[:, 0], low, high), np.clip(ranges[:, 0] + ranges[:, 1], low, high)
    there = end > begin
    inside: Ranges = np.stack([begin, end - begin], axis=1)[there]
    return inside


def dead_ranges(file: FilePlan, carrier: File, block: int) -> Ranges:
    """Returns the allocated ranges of `carrier` that the output does not use.

    If the output has slack, only whole blocks: partial ones cannot be freed, and slack need not be zero. Includes
    ranges behind the end of `carrier`: XFS preallocates space there and keeps it when the file grows.
    """
    shared = min(carrier.size, file.size)
    start, length = _unused(file.table.window(0, shared))
    rows, row_length = cut(allocated(carrier), start, length, start)
    data = rows.kind == Kind.DATA
    found = _joined(rows.start[data], row_length[data])
    if not file.slack:
        return found
    behind, gap = _unused(file.table.window(shared, file.size - shared))
    # A dead range that ends inside the last block of the file is whole together with the range behind it.
    both = np.concatenate([found, np.stack([behind + shared, gap], axis=1)])
    return _whole(_joined(both[:, 0], both[:, 1]), block)


def unused(file: FilePlan, block: int) -> Ranges:
    """Returns the whole blocks of an output that hold no data."""
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
