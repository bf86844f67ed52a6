"""A backend in memory, for tests and as an example for third parties: outputs are dictionaries of blocks.

It shares like a filesystem: a shared block refers to the source's block, and is copied on write.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.errors import BackendError
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Output, Survey, Transaction
from vmconv.model.sources import File, Source, Stamp

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.model.plan import ShareSteps

_UNIT = 512


class MemoryFile(File):
    """A sparse file in memory, usable as a source."""

    def __init__(self, name: str, size: int) -> None:
        self.path = name
        self.name = os.path.basename(name)
        self.size = size
        self.descriptor = -1
        self.is_device = False
        self.stamp = Stamp(0, id(self), size, 0, 0)
        self._blocks: dict[int, bytes] = {}
        self._shared: dict[int, tuple[Source, int]] = {}
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise BackendError(f"{self.name}: {offset:#x}+{length} lies outside {self.size:#x}")
        parts = []
        end = offset + length
        while offset < end:
            number, skip = divmod(offset, _UNIT)
            step = min(_UNIT - skip, end - offset)
            parts.append(self._block(number)[skip : skip + step])
            offset += step
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        if number in self._shared:
            source, offset = self._shared[number]
            length = min(_UNIT, source.size - offset)
            return source.read(offset, length) + bytes(_UNIT - length)
        return self._blocks.get(number, bytes(_UNIT))

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise BackendError(f"{self.name}: {offset:#x}+{len(data)} lies outside {self.size:#x}")
        # Outputs are written from several threads.
        with self._lock:
            at = 0
            while at < len(data):
                number, skip = divmod(offset + at, _UNIT)
                step = min(_UNIT - skip, len(data) - at)
                old = self._block(number)
                self._shared.pop(number, None)
                self._blocks[number] = old[:skip] + data[at : at + step] + old[skip + step :]
                at += step

    def reference(self, offset: int, source: Source, source_offset: int, length: int) -> None:
        """Shares a range, in whole blocks; only the last block of the source may be partial."""
        for at in range(0, length, _UNIT):
            self._shared[(offset + at) // _UNIT] = (source, source_offset + at)

    def sync(self) -> None:
        pass

    def data_ranges(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        limit = self.size if end is None else min(end, self.size)
        ranges: list[tuple[int, int]] = []
        for number in sorted(self._blocks.keys() | self._shared.keys()):
            low, high = max(start, number * _UNIT), min(limit, (number + 1) * _UNIT)
            if low >= high:
                continue
            if ranges and ranges[-1][1] == low:
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
