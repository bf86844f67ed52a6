"""Checks a file after a change in place: the filesystem is asked what the file holds, not the plan.

Verification comes before the commit. What is freed, shifted or written after it would be believed otherwise.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from vmconv.errors import VerifyError
from vmconv.inplace import space
from vmconv.inplace.codec import Ranges
from vmconv.inplace.journal import Journal
from vmconv.model.extents import Extents, Kind, cut, on_storage
from vmconv.model.plan import Action, FilePlan
from vmconv.model.sources import File

_PIECE = 4 << 20


class Expected(NamedTuple):
    """What a file has to hold after its change, as ranges `(offset, length)` in bytes.

    `data` is on storage: payload that stays, and new metadata; `zeros` read as zero, whatever was there.
    """

    size: int
    data: Ranges
    zeros: Ranges

    @classmethod
    def of(cls, main: FilePlan, carrier: File) -> Expected:
        """Returns what `carrier` has to hold as the planned file `main`; asks before anything is changed."""
        shares = main.shares()
        mine = np.array([source is carrier for source in shares.sources] + [False])[shares.source]
        kept = shares.take(mine & (shares.length > 0))
        rows, length = cut(on_storage(carrier), kept.source_offset, kept.length, kept.offset)
        there = rows.kind == Kind.DATA
        payload: Ranges = np.stack([rows.start[there], length[there]], axis=1)
        data = np.concatenate([payload, space.written(main, Action.WRITE)])
        block = os.fstatvfs(carrier.descriptor).f_bsize
        return cls(main.size, data, space.unused(main, block if main.slack else 1))


def confirm(name: str, descriptor: int, expected: Expected, journal: Journal) -> None:
    """Raises `VerifyError` unless the synced file of this descriptor is as expected, with the journal's later bytes."""
    # Only advice: what is read should come from storage.
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    file = File(name, descriptor)
    if file.size != expected.size:
        raise _differs(name, f"has {file.size} bytes instead of {expected.size}")
    found = on_storage(file)
    gone = _parts(found, expected.data, Kind.ZERO)
    if len(gone):
        raise _differs(name, f"has lost its data at {int(gone[:, 0].min()):#x}")
    for offset, length in _parts(found, expected.zeros, Kind.DATA).tolist():
        for at in range(offset, offset + length, _PIECE):
            if file.read(at, min(_PIECE, offset + length - at)).strip(b"\0"):
                raise _differs(name, f"is not zero behind {at:#x}")
    at = 0
    for offset, length in journal.later.tolist():
        if file.read(offset, length) != journal.new[at : at + length]:
            raise _differs(name, f"has other bytes than the journal at {offset:#x}")
        at += length


def _parts(table: Extents, ranges: Ranges, kind: Kind) -> Ranges:
    """Returns the parts of non-empty ranges inside the table that are of this kind."""
    rows, length = cut(table, ranges[:, 0], ranges[:, 1], ranges[:, 0])
    chosen = rows.kind == kind
    parts: Ranges = np.stack([rows.start[chosen], length[chosen]], axis=1)
    return parts


def _differs(name: str, what: str) -> VerifyError:
    return VerifyError(f"{name}: after the change, the file {what}")
