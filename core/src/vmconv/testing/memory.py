"""A backend in memory, for tests and as an example for third parties: outputs are lists of pieces.

It shares like a filesystem: a shared piece refers to the source's bytes, until it is overwritten.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import BackendError
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Output, Survey, Transaction
from vmconv.model.sources import File, Source, Stamp

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.model.plan import ShareSteps

_UNIT = 512


class _Piece(NamedTuple):
    """A range of a file: bytes of `content` from `offset`, zeros past its end."""

    start: int
    end: int
    content: bytes | Source
    offset: int

    def cut(self, start: int, end: int) -> _Piece:
        return _Piece(start, end, self.content, self.offset + start - self.start)

    def read(self) -> bytes:
        length = self.end - self.start
        if isinstance(self.content, bytes):
            return self.content[self.offset : self.offset + length]
        there = max(0, min(length, self.content.size - self.offset))
        return self.content.read(self.offset, there) + bytes(length - there)


def _start(piece: _Piece) -> int:
    return piece.start


def _end(piece: _Piece) -> int:
    return piece.end


class MemoryFile(File):
    """A sparse file in memory, usable as a source."""

    def __init__(self, name: str, size: int) -> None:
        self.path = name
        self.name = os.path.basename(name)
        self.size = size
        self.descriptor = -1
        self.is_device = False
        self.stamp = Stamp(0, id(self), size, 0, 0)
        self._pieces: list[_Piece] = []
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise BackendError(f"{self.name}: {offset:#x}+{length} lies outside {self.size:#x}")
        end = offset + length
        with self._lock:
            first, last = self._within(offset, end)
            pieces = self._pieces[first:last]
        parts = []
        at = offset
        for piece in pieces:
            begin, stop = max(at, piece.start), min(end, piece.end)
            parts += [bytes(begin - at), piece.cut(begin, stop).read()]
            at = stop
        return b"".join([*parts, bytes(end - at)])

    def _within(self, start: int, end: int) -> tuple[int, int]:
        """Returns the slice of the pieces that overlap a range."""
        return bisect_right(self._pieces, start, key=_end), bisect_left(self._pieces, end, key=_start)

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise BackendError(f"{self.name}: {offset:#x}+{len(data)} lies outside {self.size:#x}")
        self._put(_Piece(offset, offset + len(data), bytes(data), 0))

    def reference(self, offset: int, source: Source, source_offset: int, length: int) -> None:
        """Shares a range, in whole blocks; only the last block of the source may be partial."""
        self._put(_Piece(offset, offset + -(-length // _UNIT) * _UNIT, source, source_offset))

    def _put(self, piece: _Piece) -> None:
        if piece.start == piece.end:
            return
        # Outputs are written from several threads.
        with self._lock:
            first, last = self._within(piece.start, piece.end)
            new = [piece]
            if first < last:
                before, after = self._pieces[first], self._pieces[last - 1]
                if before.start < piece.start:
                    new = [before.cut(before.start, piece.start), piece]
                if piece.end < after.end:
                    new.append(after.cut(piece.end, after.end))
            self._pieces[first:last] = new

    def sync(self) -> None:
        pass

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        limit = self.size if end is None else min(end, self.size)
        ranges: list[tuple[int, int]] = []
        for piece in self._pieces:
            low, high = max(start, piece.start // _UNIT * _UNIT), min(limit, -(-piece.end // _UNIT) * _UNIT)
            if low >= high:
                continue
            if ranges and ranges[-1][1] >= low:
                ranges[-1] = (ranges[-1][0], high)
            else:
                ranges.append((low, high))
        return ranges

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        pass


class MemoryOutput(Output):
    def __init__(self, file: MemoryFile) -> None:
        self.file = file

    def share(self, steps: ShareSteps) -> None:
        columns = (steps.source, steps.source_offset, steps.length, steps.offset)
        for source, source_offset, length, offset in zip(*(c.tolist() for c in columns), strict=True):
            self.file.reference(offset, steps.sources[source], source_offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self.file.write(offset, data)

    def finish(self) -> File:
        return self.file


class MemoryTransaction(Transaction):
    def __init__(self, files: dict[str, MemoryFile], directory: str, *, force: bool) -> None:
        self._files = files
        self._directory = directory
        self._force = force
        self._made: dict[str, MemoryFile] = {}

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        path = os.path.join(self._directory, name)
        self._made[path] = MemoryFile(path, size)
        return MemoryOutput(self._made[path])

    def commit(self) -> None:
        there = next((path for path in self._made if path in self._files), None)
        if there and not self._force:
            raise BackendError(f"{there}: already exists", hint="--force replaces it")
        self._files.update(self._made)
        self._made.clear()

    def abort(self) -> None:
        self._made.clear()


class MemoryBackend(Backend):
    """Stores outputs in `files`, by path."""

    name = "memory"
    title = "keeps the result in memory, for tests"
    automatic = False

    def __init__(self) -> None:
        self.files: dict[str, MemoryFile] = {}

    def capabilities(self, directory: str) -> Capabilities:
        return Capabilities(usable=True, shares=True, unit=_UNIT)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        return Survey(_UNIT)

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return MemoryTransaction(self.files, directory.path, force=force)
