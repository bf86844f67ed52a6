"""Filesystems of a guest as paths to files, read by the libraries of the libyal project.

Each is optional: `LIBRARIES` names the modules by the content that they read.
"""

from __future__ import annotations

import stat
from importlib import import_module
from typing import Any

from vmconv.guest.volumes import Read, Stream

LIBRARIES = {"ext": "pyfsext", "xfs": "pyfsxfs", "ntfs": "pyfsntfs", "fat": "pyfsfat", "lvm": "pyvslvm"}

MAX_NAMES = 20_000
"""Names of a directory."""

_MAX_LINKS = 20
_PIECE = 1 << 20


class File:
    """A file of the guest."""

    def __init__(self, entry: Any) -> None:
        self._entry = entry
        self.size = int(entry.size)

    def read(self, offset: int, length: int) -> bytes:
        """Returns bytes of the file; fewer at its end."""
        length = max(0, min(length, self.size - offset))
        return bytes(self._entry.read_buffer_at_offset(length, offset)) if length else b""


class Filesystem:
    """A filesystem; `where` says which in words."""

    def __init__(self, content: str, read: Read, size: int, where: str) -> None:
        self.content, self.where = content, where
        self._links = content in ("ext", "xfs")
        # Windows' names have another separator, and its files no type.
        self._separator = "\\" if content in ("ntfs", "fat") else "/"
        self._volume = import_module(LIBRARIES[content]).volume()
        self._stream = Stream(read, size)
        self._volume.open_file_object(self._stream)

    def file(self, path: str) -> File | None:
        """Returns the file of a path without a leading slash, None if it does not exist. Follows links."""
        entry = self._entry(path)
        if entry is None or (self._links and not stat.S_ISREG(entry.file_mode)):
            return None
        return File(entry)

    def content_of(self, path: str, limit: int) -> str | None:
        """Returns the text of a file; None if it does not exist, or is larger than `limit` bytes."""
        file = self.file(path)
        if file is None or file.size > limit:
            return None
        pieces = (file.read(at, _PIECE) for at in range(0, file.size, _PIECE))
        return b"".join(pieces).decode("utf-8", "replace")

    def names(self, path: str) -> list[str]:
        """Returns the names in a directory, sorted; none if there is no such directory, or it has too many."""
        entry = self._entry(path)
        if entry is None or (self._links and not stat.S_ISDIR(entry.file_mode)):
            return []
        count = entry.number_of_sub_file_entries
        if count > MAX_NAMES:
            return []
        return sorted(str(entry.get_sub_file_entry(number).name) for number in range(count))

    def _entry(self, path: str) -> Any:
        """Returns the entry of a path, with links followed as the guest's kernel does."""
        left, done, links = [part for part in path.split("/") if part], list[str](), 0
        entry = self._at(done)
        while left and entry is not None:
            part = left.pop(0)
            if part == "..":
                done = done[:-1]
            elif part != ".":
                entry = self._at([*done, part])
                if entry is not None and self._links and stat.S_ISLNK(entry.file_mode):
                    links += 1
                    to = str(entry.symbolic_link_target or "")
                    if links > _MAX_LINKS or not to:
                        return None
                    left = [each for each in to.split("/") if each] + left
                    done = [] if to.startswith("/") else done
                else:
                    done.append(part)
            entry = self._at(done) if not left else entry
        return entry

    def _at(self, parts: list[str]) -> Any:
        """Returns the entry of a path without links."""
        path = self._separator + self._separator.join(parts)
        return self._volume.get_file_entry_by_path(path)
