"""Disks of a compressed export: decoded once, each piece to its guest address in a new file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vmconv.plugin import Beginning, Blob, CheckReport, Decompressed, Extents, ImageError, Member, compression_of
from vmconv_xva.archive import CONFIG, PIECE, Disk, Entry, Rows, entries, first_of
from vmconv_xva.checksums import Checked, Tally, compared, report
from vmconv_xva.records import sizes
from vmconv_xva.tar import BLOCK, Header, headers_of, refused

if TYPE_CHECKING:
    from vmconv.plugin import File, NewFile, Progress

_UNIT = 4096
_OVERHEAD = 16 << 20
"""Bytes of an archive besides its disks, such as pieces without bytes. They cost almost nothing when compressed."""


class Stream:
    """A compressed export, read from its beginning to its end. `wanted` are the bytes of each disk."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._stream = Decompressed(file, str(compression_of(file)))
        self._at = 0
        self.has_end = True
        """False if the last byte was read before a block of zeros."""
        self._headers = headers_of(file, self._block)
        self.config = self.content(first_of(file, self._headers))
        self.wanted = sizes(file, self.config)

    @property
    def taken(self) -> int:
        """The bytes of the file that were decoded so far."""
        return self._stream.taken

    def entries(self) -> Iterator[Entry]:
        """Yields the pieces and digests. Raises `ImageError` if there are more than the disks can have."""
        pieces = sum(-(-size // PIECE) for size in self.wanted.values())
        limit = len(self.config) + pieces * (PIECE + 4 * BLOCK) + _OVERHEAD
        for entry in entries(self._file, self._headers):
            if entry.header.end > limit:
                problem = f"the machine's disks are smaller than what follows {limit} bytes"
                raise refused(self._file, entry.header.offset, problem)
            yield entry

    def content(self, header: Header) -> bytes:
        """Returns the bytes of the file whose header was read last."""
        data = self._read(header.size)
        if len(data) < header.size:
            raise refused(self._file, header.offset, f"content is cut off after {len(data)} of {header.size} bytes")
        return data

    def _block(self, at: int) -> bytes:
        self._read(at - self._at)
        data = self._read(BLOCK)
        self.has_end = bool(data)
        return data

    def _read(self, length: int) -> bytes:
        data = self._stream.read(length)
        self._at += len(data)
        return data


def decode(file: File, create: Callable[[str, int], NewFile], progress: Progress | None) -> tuple[Member, ...]:
    """Returns the members of an export after decoding it once; disks are files from `create`.

    Raises `ImageError` if a header is damaged, a piece is missing, or another one than its digest is of.
    """
    stream, tally = Stream(file), Tally()
    disks: dict[str, tuple[Disk, Rows, NewFile]] = {}
    for checked in compared(stream.entries(), stream.content):
        tally.add(checked)
        _refuse(file, checked.problem)
        name = checked.piece.disk
        if name in stream.wanted:
            size = stream.wanted[name]
            disk, rows, new = disks.get(name) or (Disk(file, name, size), Rows(), create(name, size))
            disks[name] = disk, rows, new
            _store(checked, disk, rows, new)
        if progress:
            progress(stream.taken, file.size)
    _refuse(file, tally.problem())
    if not stream.has_end:
        for disk, _, _ in disks.values():
            disk.refuse_cut()
    tables = (Member(name, rows.table(new, stream.wanted[name])) for name, (_, rows, new) in disks.items())
    return (_config(stream), *tables)


def _refuse(file: File, problem: str | None) -> None:
    if problem:
        hint = "to convert it as it is, decompress it first: then only --verify=bytes compares its pieces"
        raise ImageError(f"{file.name}: {problem}", hint=hint)


def _store(checked: Checked, disk: Disk, rows: Rows, new: NewFile) -> None:
    """Writes the blocks of a piece that are not zero."""
    address, data = disk.place(checked.piece), memoryview(checked.data)
    for begin, end in _payload(data):
        new.write(address + begin, data[begin:end])
        rows.add(address + begin, address + begin, end - begin)


def _payload(data: memoryview) -> Iterator[tuple[int, int]]:
    """Yields the ranges of a piece with blocks that are not zero."""
    padded = bytes(data).ljust(-(-len(data) // _UNIT) * _UNIT, b"\0")
    used = np.frombuffer(padded, dtype=np.uint64).reshape(-1, _UNIT // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(used, prepend=False, append=False)) * _UNIT
    for begin, end in edges.reshape(-1, 2).tolist():
        yield begin, min(end, len(data))


def members(file: File) -> tuple[Member, ...]:
    """Returns the members of a compressed export before it is decoded."""
    stream = Stream(file)
    beginning = Beginning(file, str(compression_of(file)), lambda found: _fill(found, file))
    disks = (Member(name, beginning.table(name, size)) for name, size in stream.wanted.items())
    return (_config(stream), *disks)


def _fill(beginning: Beginning, file: File) -> None:
    stream = Stream(file)
    disks = {name: Disk(file, name, size) for name, size in stream.wanted.items()}
    for entry in stream.entries():
        if entry.kind is None and (disk := disks.get(entry.disk)):
            before, address = disk.end, disk.place(entry)
            beginning.cover(entry.disk, before, disk.end - before)
            beginning.put(entry.disk, address, stream.content(entry.header))
        if entry.header.end > beginning.limit:
            return


def _config(stream: Stream) -> Member:
    return Member(CONFIG, Extents.whole(Blob(CONFIG, stream.config)))


def check(file: File, progress: Progress | None) -> CheckReport:
    """Returns the report on all pieces of a compressed export. Raises `ImageError` if a header is damaged."""
    stream = Stream(file)

    def advance(_: Header) -> None:
        if progress:
            progress(stream.taken, file.size)

    return report(compared(stream.entries(), stream.content), advance)
