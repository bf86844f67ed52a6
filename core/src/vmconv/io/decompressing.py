"""Compressed files, decoded as streams; downloads into a sparse file without a name.

Nothing in a compressed file says truly how much comes out of it. So the output is counted, zeros become holes, the
memory of each decoder is bounded, and a file that ends early is an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmconv.errors import BackendError, ImageError, VmconvError, os_errors
from vmconv.io.directory import Directory
from vmconv.io.foreign import foreign_content, foreign_suffix, suffix_of
from vmconv.model.sources import File

if TYPE_CHECKING:
    from typing import BinaryIO

LIMIT = 64 << 40
"""Bytes that one file may become unless the user says otherwise: the largest VHDX, more than any common disk."""

_BLOCK = 4096
_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)
_MOST_MEMORY = 256 << 20
"""Bytes that a decoder may use: xz -9 takes 65 MiB."""
_ZSTD_INPUT = 2048
"""Bytes of a Zstandard stream that are decoded at once: four bytes may become a block of 128 KiB."""
_ZSTD_WINDOW = 1 << 27
"""The limit of zstd -d."""
_MOST_READ = 64 << 20
"""Bytes that a decoder may ask for at once; the directory of a ZIP archive may claim any size."""


class Spool:
    """Makes files without names in `directory`, of at most `limit` bytes each."""

    def __init__(self, directory: str, limit: int = LIMIT) -> None:
        self._directory = directory
        self._limit = limit

    def __call__(self, file: File) -> File:
        """Returns the decoded content of `file`, as a file with its path less the suffix of the compression.

        Raises `ImageError` if the content is not compressed in a known way, damaged, too large or not a single file,
        `BackendError` if the directory has no room for it.
        """
        kind = foreign_content(file)
        if kind is None or kind.title not in (*_DECODERS, _ZIP):
            known = ", ".join((*_DECODERS, _ZIP))
            raise ImageError(f"{file.name}: is not compressed: --decompress is for {known}")
        with os_errors("cannot hold files", where=self._directory), Directory.at(self._directory) as directory:
            descriptor = directory.create_scratch()
        try:
            name = self._fill(file, kind.title, descriptor)
            # Rights to the new image follow from those to its sources.
            os.fchmod(descriptor, 0o666 if file.is_remote else os.fstat(file.descriptor).st_mode & 0o777)
            found = File(os.path.join(os.path.dirname(file.path), name), descriptor)
            found.sync()
        except BaseException:
            os.close(descriptor)
            raise
        return found

    def _fill(self, file: File, title: str, descriptor: int) -> str:
        """Writes the decoded content to the descriptor, and returns the original file name."""
        name, pieces = _zip(file) if title == _ZIP else (_stem(file), _DECODERS[title](_Reader(file)))
        size = 0
        for piece in _decoded(file, title, pieces):
            if size + len(piece) > self._limit:
                raise ImageError(
                    f"{file.name}: becomes more than {self._limit} bytes", hint="--decompress-limit allows more"
                )
            with os_errors(f"no room for what {file.name} becomes", BackendError, where=self._directory):
                write_sparsely(descriptor, piece, size)
            size += len(piece)
        with os_errors(f"no room for what {file.name} becomes", BackendError, where=self._directory):
            os.ftruncate(descriptor, size)
        return name


def write_sparsely(descriptor: int, piece: bytes, at: int) -> None:
    """Writes all of `piece` but its blocks of zeros; the file is new, so these are holes."""
    if piece == _ZEROS[: len(piece)]:
        return
    view = memoryview(piece)
    begin = 0
    while begin < len(piece):
        end = min(begin + _BLOCK, len(piece))
        if view[begin:end] == _ZEROS[: end - begin]:
            begin = end
            continue
        while end < len(piece) and view[end : end + _BLOCK] != _ZEROS[: min(_BLOCK, len(piece) - end)]:
            end = min(end + _BLOCK, len(piece))
        while begin < end:
            begin += os.pwrite(descriptor, view[begin:end], at + begin)


def _decoded(file: File, title: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the pieces, with the errors of the decoders as one of ours."""
    while True:
        with _decoding(file, title):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextmanager
def _decoding(file: File, title: str) -> Iterator[None]:
    """Turns errors of a decoder into `ImageError`."""
    try:
        yield
    except VmconvError:
        raise
    # The decoders' errors have no base in common, and zipfile raises IndexError and struct.error for damage as well.
    except Exception as exc:
        raise _damaged(file, title, exc) from exc


def _damaged(file: File, title: str, exc: BaseException) -> ImageError:
    said = " ".join(str(exc).split()).rstrip(".") or type(exc).__name__
    return ImageError(f"{file.name}: cannot be decompressed as {title}: {said}")


class _Reader(io.RawIOBase):
    """A file of the Opener, for decoders that want a file object."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._file.size)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        there = max(0, self._file.size - self._at)
        wanted = there if size is None or size < 0 else min(size, there)
        if wanted > _MOST_READ:
            raise ValueError(f"{wanted} bytes to read at once, {_MOST_READ} at most")
        data = self._file.read(self._at, wanted)
        self._at += wanted
        return data


def _pieces(stream: Any) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece


def _gzip(reader: _Reader) -> Iterator[bytes]:
    import gzip

    return _pieces(gzip.GzipFile(fileobj=reader))


def _bzip2(reader: _Reader) -> Iterator[bytes]:
    import bz2

    return _pieces(bz2.BZ2File(_binary(reader)))


def _xz(reader: _Reader) -> Iterator[bytes]:
    """Yields the content of one or more streams, with padding of zeros between them."""
    import lzma

    data = reader.read(_PIECE)
    while data:
        stream = lzma.LZMADecompressor(memlimit=_MOST_MEMORY)
        while not stream.eof:
            piece = stream.decompress(data, _PIECE)
            if piece:
                yield piece
            data = b""
            if stream.needs_input and not stream.eof:
                data = reader.read(_PIECE)
                if not data:
                    raise EOFError("the file ends before the stream does")
        data = (stream.unused_data or reader.read(_PIECE)).lstrip(b"\0")
        while not data and (more := reader.read(_PIECE)):
            data = more.lstrip(b"\0")


def _zstandard(reader: _Reader) -> Iterator[bytes]:
    """Yields the content of one or more frames in pieces of about `_PIECE` bytes: each costs its user some time."""
    parts, size = [], 0
    for part in _zstd_frames(reader):
        parts.append(part)
        size += len(part)
        if size >= _PIECE:
            yield b"".join(parts)
            parts, size = [], 0
    if parts:
        yield b"".join(parts)


def _zstd_frames(reader: _Reader) -> Iterator[bytes]:
    """Yields the content of frames, in pieces of at most `_PIECE` bytes."""
    from zstandard import ZstdDecompressor

    context = ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    for data in _pieces(reader):
        for at in range(0, len(data), _ZSTD_INPUT):
            rest = data[at : at + _ZSTD_INPUT]
            while rest:
                frame = frame or context.decompressobj()
                piece = frame.decompress(rest)
                if len(piece) <= _PIECE:
                    yield piece
                else:
                    yield from (piece[begin : begin + _PIECE] for begin in range(0, len(piece), _PIECE))
                if not frame.eof:
                    break
                rest, frame = frame.unused_data, None
    if frame:
        raise EOFError("the file ends before the frame does")


def _zip(file: File) -> tuple[str, Iterator[bytes]]:
    """Returns name and content of the only file in an archive."""
    import zipfile

    with _decoding(file, _ZIP):
        archive = zipfile.ZipFile(_binary(_Reader(file)))
        members = [one for one in archive.infolist() if not one.is_dir()]
    if len(members) != 1:
        raise ImageError(
            f"{file.name}: has {len(members)} files, and a disk is one", hint="unzip it; then convert the disk in it"
        )
    (member,) = members
    if member.flag_bits & 1:
        raise ImageError(f"{file.name}: {member.filename!r} is encrypted", hint="unzip it; then convert the disk in it")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        raise ImageError(f"{file.name}: {member.filename!r} has the unusual method {member.compress_type}")

    def content() -> Iterator[bytes]:
        with archive.open(member) as stream:
            yield from _pieces(stream)

    # Only the suffix of a name in an archive matters, and it must not be a path.
    return os.path.basename(member.filename) or _stem(file), content()


_DECODERS = {
    "gzip": _gzip,
    "xz": _xz,
    "lzma": _xz,
    "Zstandard": _zstandard,
    "bzip2": _bzip2,
}
_ZIP = "ZIP archive"


class Decompressed:
    """The decoded bytes of a file, in order. `title` is the compression, one of `_DECODERS`."""

    def __init__(self, file: File, title: str) -> None:
        self._reader = _Reader(file)
        self._pieces = _decoded(file, title, _DECODERS[title](self._reader))
        self._rest = memoryview(b"")

    @property
    def taken(self) -> int:
        """The bytes of the file that were decoded so far, for progress."""
        return self._reader.tell()

    def read(self, length: int) -> bytes:
        """Returns the next bytes, fewer at the end. Raises `ImageError` if they cannot be decoded."""
        parts = []
        while length:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
            if not self._rest:
                break
            parts.append(self._rest[:length])
            self._rest = self._rest[length:]
            length -= len(parts[-1])
        return b"".join(parts)


def compression_of(file: File) -> str | None:
    """Returns how a file is compressed, as `Decompressed` names it; None if it cannot be decoded."""
    kind = foreign_content(file)
    return kind.title if kind and kind.title in _DECODERS else None


def decoded_head(file: File, length: int) -> bytes:
    """Returns the first bytes of what a compressed file becomes, none if it is not compressed, or damaged."""
    compression = compression_of(file)
    try:
        return Decompressed(file, compression).read(length) if compression else b""
    except ImageError:
        return b""


def _binary(reader: Any) -> BinaryIO:
    return reader  # type: ignore[no-any-return]


def _stem(file: File) -> str:
    """Returns the file's name without the suffix of a compression: `disk.qcow2.gz` was `disk.qcow2`."""
    suffix = suffix_of(file.path)
    kind = suffix and foreign_suffix(suffix)
    return file.name[: -len(suffix)] if suffix and kind and kind.title in (*_DECODERS, _ZIP) else file.name
