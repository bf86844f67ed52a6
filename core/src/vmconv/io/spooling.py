"""Sources that are streams: standard input and pipes, written to a file without a name before they are read.

A disk is read at any place, and a stream only once from its start. The file lies beside the target, so that a new image
shares its blocks where the filesystem can: then payload is written once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from vmconv.errors import AccessError, BackendError, ImageError, ReadError, os_errors
from vmconv.interface.scheme import STANDARD_INPUT
from vmconv.io.decompressing import LIMIT, write_sparsely
from vmconv.io.directory import Directory
from vmconv.model.sources import File

_PIECE = 1 << 20


class PipeSpool:
    """Makes files without names in `directory`, of at most `limit` bytes each."""

    def __init__(self, directory: str, limit: int = LIMIT) -> None:
        self._directory = directory
        self._limit = limit

    def __call__(self, path: str) -> File:
        """Returns what comes out of `/dev/fd/N`, or of standard input for "-", as a file that keeps its path.

        Raises `AccessError` for a terminal and an empty stream, `ReadError` if the stream fails, `BackendError` if the
        directory has no room for it.
        """
        name = "standard input" if path == STANDARD_INPUT else path
        with os_errors("cannot be read", ReadError, where=name):
            # Opening a pipe by its path would wait if its writer has ended.
            pipe = os.dup(0 if path == STANDARD_INPUT else int(os.path.basename(path)))
        try:
            if os.isatty(pipe):
                raise AccessError(f"{name}: is a terminal", hint="PROGRAM | vmconv ..., or name a file")
            file = self._redirected(pipe) if path == STANDARD_INPUT else None
            return file or self._filled(pipe, path, name)
        finally:
            os.close(pipe)

    def _redirected(self, descriptor: int) -> File | None:
        """Returns the file that the shell has opened as standard input, None if it is a stream or not at its start."""
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            return None
        if os.lseek(descriptor, 0, os.SEEK_CUR):
            return None
        return File(STANDARD_INPUT, os.dup(descriptor))

    def _filled(self, pipe: int, path: str, name: str) -> File:
        with os_errors("cannot hold files", where=self._directory), Directory.at(self._directory) as directory:
            descriptor = directory.create_scratch()
        try:
            size = 0
            for piece in _pieces(pipe, name):
                if size + len(piece) > self._limit:
                    raise ImageError(f"{name}: is more than {self._limit} bytes")
                with os_errors(f"no room for {name}", BackendError, where=self._directory):
                    write_sparsely(descriptor, piece, size)
                size += len(piece)
            if not size:
                raise AccessError(f"{name}: is empty", hint="the program that writes to it may have failed")
            with os_errors(f"no room for {name}", BackendError, where=self._directory):
                os.ftruncate(descriptor, size)
            # Rights to a new image follow from those to its sources, and whoever writes a pipe has read them.
            os.fchmod(descriptor, 0o666)
            file = File(path, descriptor)
            file.sync()
        except BaseException:
            os.close(descriptor)
            raise
        return file


def _pieces(pipe: int, name: str) -> Iterator[bytes]:
    """Yields all bytes of a pipe, in pieces of `_PIECE` bytes but for the last."""
    with open(os.dup(pipe), "rb", buffering=0) as stream:
        while True:
            piece = bytearray(_PIECE)
            done = 0
            while done < _PIECE:
                with os_errors("cannot be read", ReadError, where=name):
                    step = stream.readinto(memoryview(piece)[done:])
                if not step:
                    break
                done += step
            if not done:
                return
            yield bytes(piece[:done])
