"""One output file, compressed by Zstandard or gzip while it is written.

A compressed file cannot be read back by tables. So the result is verified by its planned table, then compressed from
its first byte to its last. Both formats have checksums of the content, which `read_back` compares.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence

from vmconv.backends.files import FileTransaction
from vmconv.backends.planned import PlannedOutput
from vmconv.errors import BackendError, ImageError, VerifyError, os_errors
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Backend, Capabilities, Output, Survey, Transaction
from vmconv.io.decompressing import Decompressed
from vmconv.io.directory import Directory
from vmconv.model.plan import Plan, Progress
from vmconv.model.sources import File
from vmconv.model.view import View

_PIECE = 4 << 20
_ZSTD_LEVEL, _GZIP_LEVEL = 3, 6
"""The levels of the commands zstd and gzip."""
_MEMBER = 1 << 20
"""Bytes in a member of a gzip file. Each is compressed by itself, so by a thread of its own; readers join them."""
_GZIP = 31
"""zlib's name for a gzip member with the largest window."""


class CompressBackend(Backend):
    """Compresses the one file of a package; made per conversion, so not registered."""

    name = "compress"
    title = "compresses all bytes"
    automatic = False

    def __init__(self, compression: str, *, read_back: bool = False) -> None:
        self.compression = compression
        """`Zstandard` or `gzip`."""
        self.read_back = read_back
        """True if the finished file is decompressed before it is named."""

    def capabilities(self, directory: str) -> Capabilities:
        return Capabilities(usable=True, shares=False)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        return Survey(1, {id(file): f"the new archive is compressed ({self.compression})" for file in sources})

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        found = CompressTransaction(directory, force=force, durable=durable, access=access)
        found.compression, found.read_back = self.compression, self.read_back
        return found


class CompressTransaction(FileTransaction):
    """Compresses one file after its verification."""

    compression = "Zstandard"
    read_back = False

    def prepare(self, plan: Plan) -> None:
        (self._planned,) = plan.files
        super().prepare(plan)

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        made = super().create(name, size, ())
        planned = PlannedOutput(self._planned)
        planned.descriptor = made.descriptor
        return planned

    def deliver(self, progress: Progress | None) -> None:
        """Compresses the file. Raises `BackendError` if storage fails or is full, `AccessError` if a source changed."""
        (output,) = self._outputs
        view = View(self._planned.table)
        with os_errors("cannot be written", BackendError, where=output.path):
            for packed in _COMPRESSORS[self.compression](view, progress):
                _write(output.descriptor, packed)
            made = output.finish()
        view.refuse_changed()
        if self.read_back:
            _read_back(made, self.compression, view.size)


def _zstandard(view: View, progress: Progress | None) -> Iterator[bytes]:
    from zstandard import ZstdCompressor

    # With threads the result does not depend on their number.
    frame = ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True, threads=-1).compressobj(size=view.size)
    for data in _read(view, _PIECE, progress):
        yield frame.compress(data)
    yield frame.flush()


def _gzip(view: View, progress: Progress | None) -> Iterator[bytes]:
    from vmconv.system.parallel import in_order

    def member(data: bytes) -> bytes:
        return zlib.compress(data, _GZIP_LEVEL, _GZIP)

    yield from in_order(member, _read(view, _MEMBER, progress))


def _read(view: View, most: int, progress: Progress | None) -> Iterator[bytes]:
    """Yields all bytes of a file, in pieces."""
    for at in range(0, view.size, most):
        length = min(most, view.size - at)
        yield view.read(at, length)
        if progress:
            progress(at + length, view.size)


_COMPRESSORS = {"Zstandard": _zstandard, "gzip": _gzip}


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_back(made: File, compression: str, size: int) -> None:
    """Raises `VerifyError` unless a file decompresses to `size` bytes, which the checksums confirm."""
    # The page cache would hide what storage has.
    os.posix_fadvise(made.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    stream, found = Decompressed(made, compression), 0
    try:
        while piece := stream.read(_PIECE):
            found += len(piece)
    except ImageError as exc:
        raise VerifyError(f"the result cannot be read back: {exc}") from exc
    if found != size:
        raise VerifyError(f"{made.name}: decompresses to {found} bytes, {size} were written")
