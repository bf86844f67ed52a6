"""Planned output files as readable bytes, for mounts, exports and pipes; nothing is written to storage.

Payload comes straight from the source's file. Metadata and decoded clusters are generated on read and cached. A source
that changed since the view was planned is an error.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vmconv.errors import AccessError, ImageError
from vmconv.model.extents import Column, Extents, Kind
from vmconv.model.sources import Decoded, File, Source

ALIGNMENT = 4096
"""Payload in a view is congruent to its source modulo this, so that whole pages of both correspond."""

_PIECE = 128 << 10
"""Bytes of a cached piece of metadata."""
_SMALLEST = 4 << 10
"""Smaller units are not cached, bytes."""
_KEPT = 16 << 20
"""Bytes of the cache."""
_LONG = 32 << 10
"""Shorter ranges are read into a buffer, longer ones are sent with sendfile, bytes."""
_BUFFER = 1 << 20
_ZEROS = memoryview(bytes(_BUFFER))
# Errors of sendfile that can only come from the target.
_ONLY_TARGET_FAILS = frozenset({errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


Wait = Callable[[int], None]
"""Called with a descriptor; returns when it can be written to."""


class FilePart(NamedTuple):
    """A contiguous range of a view in a file of the source."""

    file: File
    offset: int
    length: int


class View:
    """One output file of a layout, readable at any offset; thread-safe."""

    def __init__(self, table: Extents) -> None:
        self.table = table
        self.size = table.size
        self._pieces = _Pieces()
        # The row of the last read: sequential reads need no search.
        self._latest: tuple[int, int, File | None, int] = (0, 0, None, 0)
        # By identity of the source. A chain may have many files, and a read checks only those it has read.
        self._files = {id(source): file for source in table.sources if (file := _file_of(source))}

    @cached_property
    def data_size(self) -> int:
        """Bytes of DATA; the others read as zero."""
        return self.table.total(Kind.DATA)

    @cached_property
    def _edges(self) -> tuple[Column, npt.NDArray[np.bool_]]:
        """The alternating starts of data and zeros, and whether each is a start of data."""
        data = self.table.kind == Kind.DATA
        begins = np.append(True, data[1:] != data[:-1])[: len(data)]
        return self.table.start[begins], data[begins]

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yields `(length, is data)` of alternating spans of a range; what is not data reads as zero."""
        begins, is_data = self._edges
        at, end = offset, min(offset + length, self.size)
        row = int(begins.searchsorted(offset, "right")) - 1
        while at < end:
            following = int(begins[row + 1]) if row + 1 < len(begins) else end
            step = min(following, end) - at
            yield step, bool(is_data[row])
            at, row = at + step, row + 1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer from `offset` on; raises `AccessError` if a file that was read has changed."""
        begin, end, file, shift = self._latest
        if file and begin <= offset and offset + len(buffer) <= end:
            file.read_into(offset + shift, buffer)
            refuse_changed(file)
            return
        read = self._read_rows(offset, buffer)
        # Checked after the read: a write that came before is detected, a later one was not read.
        for file in read.values():
            refuse_changed(file)
        # Assigned as one tuple, so that other threads see a consistent row.
        if len(read) == 1:
            self._latest = self._run_at(offset)

    def _read_rows(self, offset: int, buffer: memoryview) -> dict[int, File]:
        """Fills the buffer and returns the files that were read."""
        at = 0
        read: dict[int, File] = {}
        for row in self.table.rows_of(offset, len(buffer)):
            part = buffer[at : at + row.length]
            at += row.length
            if row.source is None:
                _clear(part)
                continue
            if isinstance(row.source, File):
                row.source.read_into(row.offset, part)
            else:
                self._pieces.read_into(row.source, row.offset, part)
            if file := self._files.get(id(row.source)):
                read[id(file)] = file
        return read

    def _run_at(self, offset: int) -> tuple[int, int, File | None, int]:
        """Returns `(begin, end, file, offset in the file - begin)` of the row at an address; no file if it has none."""
        row = int(self.table.start.searchsorted(offset, "right")) - 1
        source = self.table.sources[self.table.source[row]] if self.table.kind[row] == Kind.DATA else None
        if not isinstance(source, File):
            return 0, 0, None, 0
        begin = int(self.table.start[row])
        end = int(self.table.start[row + 1]) if row + 1 < len(self.table) else self.size
        return begin, end, source, int(self.table.offset[row]) - begin

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes; see `read_into`."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def parts(self, offset: int, length: int) -> Iterator[FilePart | memoryview]:
        """Yields a range as parts to send in order: long ranges of files, and bytes for all else.

        Bytes are valid until the next part. Ranges of files have not been read, so the caller calls `refuse_changed`
        after it has sent them.
        """
        # Bytes of short rows before the current one, which are read together.
        short = 0
        for row in self.table.rows_of(offset, length):
            if row.length < _LONG or not (row.source is None or isinstance(row.source, File)):
                short += row.length
                continue
            yield from self._bytes(row.start - short, short)
            short = 0
            if isinstance(row.source, File):
                yield FilePart(row.source, row.offset, row.length)
            else:
                yield from _zeros(row.length)
        yield from self._bytes(offset + length - short, short)

    def _bytes(self, offset: int, length: int) -> Iterator[memoryview]:
        if not length:
            return
        buffer = memoryview(bytearray(min(length, _BUFFER)))
        for at in range(0, length, len(buffer)):
            part = buffer[: min(len(buffer), length - at)]
            self.read_into(offset + at, part)
            yield part

    def send(self, target: int, offset: int, length: int, wait: Wait | None = None) -> None:
        """Writes a range to a descriptor (pipe, socket, file), with sendfile where possible.

        `wait` is for non-blocking descriptors; without it, EAGAIN is raised.
        """
        for part in self.parts(offset, length):
            if isinstance(part, FilePart):
                _send_file(target, part, wait)
            else:
                _write(target, part, wait)

    def refuse_changed(self) -> None:
        """Raises `AccessError` if any file of the source has changed since the view was planned."""
        for file in {id(file): file for file in self._files.values()}.values():
            refuse_changed(file)


def refuse_changed(file: File) -> None:
    """Raises `AccessError` if the file has changed since it was opened."""
    if file.changed():
        raise AccessError(f"{file.name}: changed while it was being viewed", hint="stop the writer and start again")


def _file_of(source: Source) -> File | None:
    if isinstance(source, Decoded):
        return source.file
    return source if isinstance(source, File) else None


def _clear(part: memoryview) -> None:
    for zeros in _zeros(len(part)):
        part[: len(zeros)] = zeros
        part = part[len(zeros) :]


def _zeros(length: int) -> Iterator[memoryview]:
    for at in range(0, length, len(_ZEROS)):
        yield _ZEROS[: min(len(_ZEROS), length - at)]


def _write(target: int, data: memoryview, wait: Wait | None) -> None:
    while data:
        try:
            done = os.write(target, data)
        except BlockingIOError:
            if wait is None:
                raise
            wait(target)
            continue
        if not done:
            raise OSError(errno.EIO, "nothing was written")
        data = data[done:]


def _send_file(target: int, part: FilePart, wait: Wait | None) -> None:
    file, offset, left = part
    while left:
        try:
            sent = os.sendfile(target, file.descriptor, offset, left)
        except OSError as exc:
            if wait and exc.errno == errno.EAGAIN:
                wait(target)
                continue
            if exc.errno in _ONLY_TARGET_FAILS:
                raise
            # sendfile does not support all targets (such as O_APPEND) and sources. If storage failed, read and write
            # below tell which of the two it was.
            break
        if not sent:
            raise ImageError(f"{file.name}: ends at {offset:#x} where {left} bytes more were expected")
        offset, left = offset + sent, left - sent
    for at in range(offset, offset + left, _BUFFER):
        _write(target, memoryview(file.read(at, min(_BUFFER, offset + left - at))), wait)


class _Pieces:
    """An LRU cache of generated and decoded pieces."""

    def __init__(self) -> None:
        # By id of the source and number of the piece; sources live as long as the view.
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read_into(self, source: Source, offset: int, buffer: memoryview) -> None:
        # Decoded sources are cached by unit: the neighbours of a unit may not be decodable.
        size = source.unit if isinstance(source, Decoded) else _PIECE
        if size < _SMALLEST:
            source.read_into(offset, buffer)
            return
        first, last = offset // size, (offset + len(buffer) - 1) // size
        at = 0
        for number, data in enumerate(self._pieces(source, first, last, size), start=first):
            skip = offset + at - number * size
            step = min(size - skip, len(buffer) - at)
            buffer[at : at + step] = data[skip : skip + step]
            at += step

    def _pieces(self, source: Source, first: int, last: int, size: int) -> Iterator[bytes]:
        """Yields contiguous pieces; runs of missing ones are made by one read."""
        number = first
        while number <= last:
            kept = self._look_up(source, number)
            if kept is not None:
                yield kept
                number += 1
                continue
            end = number + 1
            while end <= last and (id(source), end) not in self._kept:
                end += 1
            data = source.read(number * size, min(end * size, source.size) - number * size)
            made = [data[at : at + size] for at in range(0, len(data), size)]
            self._keep(source, number, made)
            yield from made
            number = end

    def _look_up(self, source: Source, number: int) -> bytes | None:
        key = id(source), number
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, source: Source, number: int, made: list[bytes]) -> None:
        with self._lock:
            for key, data in (((id(source), number + i), data) for i, data in enumerate(made)):
                # Another thread may have made the piece, too.
                if key not in self._kept:
                    self._kept[key] = data
                    self._bytes += len(data)
            while self._bytes > _KEPT and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])
