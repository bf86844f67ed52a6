"""Shifts payload inside its file, by collapsing and inserting ranges (ext4, XFS).

Neither is atomic: a power failure may leave a part of the payload shifted. But shifting never changes a block's
physical address. The journal maps physical addresses to file offsets, so the remaining work follows from any state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from vmconv.errors import BackendError, PlanError
from vmconv.inplace.codec import Ranges
from vmconv.inplace.syscalls import Syscalls
from vmconv.io.directory import Directory
from vmconv.model.extents import Column, Kind, spread
from vmconv.model.plan import FilePlan
from vmconv.model.sources import File
from vmconv.system import linux

MOST_WRITTEN = 16 << 20
"""Metadata of a target with shifted payload, bytes: the journal holds it."""

MOST_SHIFTS = 1024
"""Shifts of the rest of the file: each takes time in proportion to the file's extents."""


def supported(directory: Directory) -> bool:
    """True if the filesystem of a directory can shift blocks; tries it on a file without a name."""
    try:
        scratch = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory.descriptor)
    except OSError:
        return False
    try:
        block = os.fstatvfs(scratch).f_bsize
        os.pwrite(scratch, bytes(3 * block), 0)
        linux.collapse_range(scratch, block, block)
        linux.insert_range(scratch, block, block)
    except OSError:
        return False
    finally:
        os.close(scratch)
    return True


def physical_pieces(main: FilePlan, carrier: File) -> Ranges:
    """Returns the pieces of payload by physical address: `(physical, length, offset in the output)`.

    Raises `PlanError` if shifting cannot reach these offsets.
    """
    rows = _rows(main, carrier)
    _refuse_torn_blocks(rows, main, carrier, os.fstatvfs(carrier.descriptor).f_bsize)
    delta = rows[:, 2] - rows[:, 0]
    shifts = int(np.count_nonzero(np.diff(delta, prepend=0)))
    if (rows[1:, 0] < rows[:-1, 0] + rows[:-1, 1]).any():
        raise PlanError("in place, payload cannot be shifted: the file has it in another order than the disk")
    if shifts > MOST_SHIFTS:
        raise PlanError(f"in place, payload would have to be shifted {shifts} times, {MOST_SHIFTS} at most")
    extents = linux.settled_ranges(carrier.descriptor)
    if extents is None:
        raise PlanError("in place, payload cannot be shifted: the filesystem does not report all physical addresses")
    if linux.shares_blocks(carrier.descriptor):
        # A shared block moves when its file is truncated or written, and the journal knows blocks by their address
        # only.
        raise PlanError(f"{carrier.name}: in place, payload cannot be shifted: other files share its blocks")
    return _on_storage(rows, extents)


def _rows(main: FilePlan, carrier: File) -> Ranges:
    """Returns rows `(offset in the carrier, length, offset in the output)`, in the order of the output."""
    table = main.table
    mine = np.array([source is carrier for source in table.sources] + [False])[table.source]
    chosen = mine & (table.kind == Kind.DATA)
    return np.stack([table.offset[chosen], table.length[chosen], table.start[chosen]], axis=1)


def _refuse_torn_blocks(rows: Ranges, main: FilePlan, carrier: File, block: int) -> None:
    """Raises `PlanError` unless payload is whole blocks; the last may be partial if its rest is as the target needs it.

    The rest moves with the payload. Where the target has zeros a guest may see it: behind the end of a disk that grows.
    """
    end = rows[:, 2] + rows[:, 1]
    torn = (rows[:, 0] % block != 0) | (rows[:, 2] % block != 0)
    torn[:-1] |= end[:-1] % block != 0
    last = int(end[-1]) if len(end) else 0
    # Past its end the table is a HOLE.
    rest = main.table.window(last, -last % block)
    if torn.any() or (rest.total(Kind.ZERO) and any(_behind(rows, carrier, rest.size))):
        raise PlanError(f"in place, payload cannot be shifted: it is not whole blocks of {block} bytes in the file")


def _behind(rows: Ranges, carrier: File, length: int) -> bytes:
    """Returns at most `length` bytes of the carrier behind the last row."""
    end = int(rows[-1, 0] + rows[-1, 1])
    return carrier.read(end, max(0, min(length, carrier.size - end)))


def _on_storage(rows: Ranges, extents: Ranges) -> Ranges:
    """Returns the allocated parts of rows, with the physical address instead of the offset."""
    row, extent, begin, length = _overlaps(rows[:, 0], rows[:, 1], extents[:, 0], extents[:, 1])
    physical = extents[extent, 2] + begin - extents[extent, 0]
    pieces: Ranges = np.stack([physical, length, rows[row, 2] + begin - rows[row, 0]], axis=1)
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    if (pieces[1:, 0] < pieces[:-1, 0] + pieces[:-1, 1]).any():
        raise PlanError("in place, payload cannot be shifted: two parts of the file are one block on storage")
    return pieces


def _overlaps(low: Column, length: Column, start: Column, size: Column) -> tuple[Column, Column, Column, Column]:
    """Returns `(range, other, begin, length)` of each overlap of ranges with others; those are sorted and disjoint."""
    end, stop = low + length, start + size
    first = np.searchsorted(stop, low, side="right")
    count = np.searchsorted(start, end, side="left") - first
    one, place = spread(np.maximum(count, 0))
    other = first[one] + place
    begin = np.maximum(low[one], start[other])
    return one, other, begin, np.minimum(end[one], stop[other]) - begin


def shift(descriptor: int, pieces: Ranges, calls: Syscalls) -> None:
    """Moves each piece of payload to its offset and punches the rest; may be repeated until all is done.

    Raises BackendError, before anything is changed, if the file does not have all pieces.
    """
    block = os.fstatvfs(descriptor).f_bsize
    now = _current_extents(descriptor)
    _refuse_missing(now, pieces, block)
    for offset, length in _foreign_ranges(now, pieces, block):
        calls.punch(descriptor, offset, length)
    moved = 0
    for offset, wanted in _boundaries(_current_extents(descriptor), pieces, block):
        step = wanted - offset - moved
        if step > 0:
            calls.insert(descriptor, offset + moved, step)
        elif step < 0:
            calls.collapse(descriptor, wanted, -step)
        moved += step
    if any(offset != wanted for offset, wanted in _boundaries(_current_extents(descriptor), pieces, block)):
        raise BackendError("payload is not at its new offsets", hint="vmconv recover continues")


def _current_extents(descriptor: int) -> Ranges:
    """Returns the file's extents, `(logical, length, physical)`."""
    rows = linux.settled_ranges(descriptor)
    if rows is None:
        raise BackendError("the filesystem no longer reports physical addresses of the payload")
    return rows


def _found(now: Ranges, pieces: Ranges, block: int) -> tuple[Column, Column, Column]:
    """Returns offset, length and wanted offset of the parts of the pieces, in the order of the file."""
    length = -(-pieces[:, 1] // block) * block
    extent, piece, physical, part = _overlaps(now[:, 2], now[:, 1], pieces[:, 0], length)
    offset = now[extent, 0] + physical - now[extent, 2]
    wanted = pieces[piece, 2] + physical - pieces[piece, 0]
    order = np.argsort(offset, kind="stable")
    return offset[order], part[order], wanted[order]


def _refuse_missing(now: Ranges, pieces: Ranges, block: int) -> None:
    """Raises `BackendError` if a piece is not at its physical address: dead space would look the same."""
    there = int(_found(now, pieces, block)[1].sum())
    wanted = int((-(-pieces[:, 1] // block) * block).sum())
    if there != wanted:
        raise BackendError(
            f"{wanted - there} bytes of payload are not at the physical addresses in the journal",
            hint="another program wrote to the file or moved its blocks; nothing was changed",
        )


def _foreign_ranges(now: Ranges, pieces: Ranges, block: int) -> Iterator[tuple[int, int]]:
    """Yields the file's ranges outside of all pieces."""
    offset, length, _ = _found(now, pieces, block)
    # The pieces lie inside the extents, so the gaps are between sorted ends and the next starts.
    begin = np.sort(np.concatenate([now[:, 0], offset + length]))
    end = np.sort(np.concatenate([offset, now[:, 0] + now[:, 1]]))
    there = end > begin
    yield from zip(begin[there].tolist(), (end - begin)[there].tolist(), strict=True)


def _boundaries(now: Ranges, pieces: Ranges, block: int) -> Iterator[tuple[int, int]]:
    """Yields `(offset, wanted offset)` of the first part of each run with one distance."""
    offset, _, wanted = _found(now, pieces, block)
    distance = wanted - offset
    first = np.append(True, distance[1:] != distance[:-1]) if len(offset) else np.empty(0, dtype=bool)
    yield from zip(offset[first].tolist(), wanted[first].tolist(), strict=True)
