"""The plan of a conversion: ranges of output files to share, copy or write, with a reason for each copied byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.model.extents import Column, Extents, spread
from vmconv.model.layout import Allocation, Reference
from vmconv.model.sources import File, Source

Progress = Callable[[int, int], None]
"""Called with `(bytes done, bytes to do)`, counting copied and written bytes."""


class Action(IntEnum):
    """The operation for a range of an output file; ranges without one read as zero."""

    SHARE = 0
    COPY = 1
    WRITE = 2


@dataclass(frozen=True, eq=False, repr=False)
class ShareSteps:
    """Ranges to share, as parallel columns in bytes; `source` indexes `sources`."""

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
        """Returns the ranges sorted by target offset, or by source and source offset."""
        # Which order is faster depends on the filesystem.
        return self.take(
            np.argsort(self.offset, kind="stable") if by_target else np.lexsort((self.source_offset, self.source))
        )

    def pack(self) -> bytes:
        """Returns an array of struct file_clone_range (linux/fs.h), one for each range."""
        # Sources that are not files are never shared, but count in the index.
        descriptors = np.array([s.descriptor if isinstance(s, File) else -1 for s in self.sources], dtype=np.int64)
        return np.stack(
            [descriptors[self.source], self.source_offset, self.length, self.offset], axis=1, dtype=np.int64
        ).tobytes()


@dataclass(frozen=True, eq=False, repr=False)
class Steps:
    """The steps of one output file as parallel columns in bytes, sorted by offset; `reason` is -1 except for COPY."""

    offset: Column
    length: Column
    action: npt.NDArray[np.uint8]
    source: npt.NDArray[np.int32]
    source_offset: Column
    reason: npt.NDArray[np.int32]

    def take(self, index: npt.NDArray[np.bool_] | Column) -> Steps:
        return Steps(*(column[index] for column in self._columns()))

    def total(self, action: Action) -> int:
        """Returns the bytes of all steps with this action."""
        return int(self.length[self.action == action].sum())

    def rows(self, action: Action) -> Iterator[tuple[int, int, int, int]]:
        """Yields `(offset, length, source, source offset)` for each step with this action."""
        chosen = self.take(self.action == action)
        columns = (chosen.offset, chosen.length, chosen.source, chosen.source_offset)
        yield from zip(*(column.tolist() for column in columns), strict=True)

    def _columns(self) -> tuple[Any, ...]:
        return self.offset, self.length, self.action, self.source, self.source_offset, self.reason

    @staticmethod
    def join(parts: Sequence[Steps]) -> Steps:
        joined = Steps(*(np.concatenate(columns) for columns in zip(*(p._columns() for p in parts), strict=True)))
        return joined.take(np.argsort(joined.offset, kind="stable"))


Destination = Literal["files", "source", "stream", "device", "objects"]
"""Where a backend writes: new files, the source's own file, a stream, a block device, or objects of a store."""


class FilePlan(NamedTuple):
    """One output file: `name` in the target's directory, `size` in bytes."""

    name: str
    size: int
    steps: Steps
    sources: tuple[Source, ...]
    table: Extents
    slack: bool
    allocation: Allocation = "holes"

    def shares(self) -> ShareSteps:
        rows = self.steps.take(self.steps.action == Action.SHARE)
        return ShareSteps(self.sources, rows.source, rows.source_offset, rows.length, rows.offset)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yields `(offset, length)` of each range without a step, which reads as zero."""
        at = 0
        for offset, length in zip(self.steps.offset.tolist(), self.steps.length.tolist(), strict=True):
            if offset > at:
                yield at, offset - at
            at = max(at, offset + length)
        if at < self.size:
            yield at, self.size - at

    @property
    def filled(self) -> int:
        """Bytes without payload that take space all the same."""
        return 0 if self.allocation == "holes" else sum(length for _, length in self.gaps())


class CopyReason(NamedTuple):
    """Bytes and ranges that are copied for one reason, with file and offset of the first."""

    reason: str
    bytes: int
    ranges: int
    file: str
    offset: int

    def plus(self, other: CopyReason) -> CopyReason:
        """Returns the sum of both, with the first range of this one."""
        return self._replace(bytes=self.bytes + other.bytes, ranges=self.ranges + other.ranges)


class Totals(NamedTuple):
    """Bytes of the output by action; `zero` bytes are not written and read as zero.

    `referenced` bytes are not in the output: they stay in the source's files.
    """

    shared: int
    copied: int
    written: int
    zero: int
    referenced: int = 0


class Plan(NamedTuple):
    """All steps of a conversion, in the order of the files. Making a plan writes nothing."""

    directory: str
    backend: str
    files: tuple[FilePlan, ...]
    copies: tuple[CopyReason, ...]
    losses: tuple[str, ...]
    references: tuple[Reference, ...]
    destination: Destination = "files"
    opened: tuple[str, ...] = ()
    """Real paths of the source's files when they were opened."""
    notes: tuple[str, ...] = ()
    """What else the user should know before anything is written."""

    @property
    def totals(self) -> Totals:
        shared, copied, written = (sum(f.steps.total(action) for f in self.files) for action in Action)
        zero = sum(f.size for f in self.files) - shared - copied - written
        return Totals(shared, copied, written, zero, sum(reference.length for reference in self.references))

    @property
    def way(self) -> str:
        """Returns "reference" if all payload stays in the source's files, else the backend's name."""
        totals = self.totals
        return "reference" if self.references and not totals.shared and not totals.copied else self.backend
