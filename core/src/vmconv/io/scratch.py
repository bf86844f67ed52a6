"""Room for bytes that a conversion makes before it writes its files, such as compressed ones."""

from __future__ import annotations

import os

from vmconv.errors import BackendError, ReadError, os_errors
from vmconv.io.directory import Directory
from vmconv.system import linux


class ScratchFile:
    """A `Scratch` in a file without a name in `directory`, made for the first bytes. The creator closes it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._descriptor = -1
        self._size = 0

    def append(self, data: bytes) -> int:
        """Keeps bytes and returns their offset. Raises `BackendError` if the directory has no room for them."""
        at, view = self._size, memoryview(data)
        with os_errors("no room for what is compressed", BackendError, where=self._directory):
            if self._descriptor < 0:
                with Directory.at(self._directory) as directory:
                    self._descriptor = directory.create_scratch()
            while view:
                done = os.pwrite(self._descriptor, view, self._size)
                view, self._size = view[done:], self._size + done
        return at

    def read(self, offset: int, length: int) -> bytes:
        """Returns bytes that were kept. Raises `ReadError` if storage has lost them."""
        try:
            data = linux.read_at(self._descriptor, length, offset)
        except OSError as exc:
            raise ReadError(f"{self._directory}: the compressed data cannot be read: {exc.strerror}") from exc
        if len(data) < length:
            raise ReadError(f"{self._directory}: {length} bytes of compressed data are {len(data)} now")
        return data

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
