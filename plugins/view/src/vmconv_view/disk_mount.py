"""A mount of one disk that can be written to: a file, as long as the disk, whose writes go to a layer."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import mfusepy

from vmconv_view.fuse import Filesystem
from vmconv_view.overlay import WritableView, error_number
from vmconv_view.rights import OWN, Rights
from vmconv_view.tree import Held, Node

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


class DiskTree:
    """The root, and in it the file `name`; takes the place of `Tree`."""

    def __init__(self, name: str, view: WritableView, status: os.stat_result) -> None:
        self._name = name
        self.view = view
        self._status = status

    def node(self, path: str, rights: Rights = OWN) -> Node:
        """Returns the node at a path. Raises `FileNotFoundError`."""
        if not path:
            directory = os.stat_result((stat.S_IFDIR | 0o700, *self._status[1:]))
            return Node(self._status, directory.st_mode, lambda: [self._name], has_files=True)
        if path != self._name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return Node(self._status, 0o600, view=self.view, is_writable=True)

    def open(self, path: str, rights: Rights = OWN) -> Held:
        """Opens the file."""
        return Held(self.node(path), self.view, None)


class DiskFilesystem(Filesystem):
    """The operations of a mount that can be written to; the kernel checks who may, by owner and mode."""

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        view = self._view(fh)
        if offset + len(data) > view.size:
            raise mfusepy.FuseOSError(errno.ENOSPC)
        with self.changing(view):
            view.layer.write(offset, memoryview(data))
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        view = self._view(fh)
        with self.changing(view):
            view.layer.flush()
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Lets programs set the size that the disk has. It has no other."""
        with self.errors():
            view = self._tree.node(path.strip("/")).view
        if view is None or length != view.size:
            raise mfusepy.FuseOSError(errno.EPERM)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        view = self._view(fh)
        if offset + size > view.size:
            raise mfusepy.FuseOSError(errno.ENOSPC)
        if mode & ~_KEEP_SIZE not in (_PUNCH_HOLE, _ZERO_RANGE):
            # Space in the layer cannot be reserved.
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)
        with self.changing(view):
            view.layer.zero(offset, size)
        return 0

    def _view(self, fh: int) -> WritableView:
        view = self.held[fh].view
        assert isinstance(view, WritableView)
        return view

    @contextmanager
    def changing(self, view: WritableView) -> Iterator[None]:
        """Turns errors of storage into those that a program is told."""
        with self.errors():
            view.refuse_changed()
            try:
                yield
            except OSError as exc:
                raise mfusepy.FuseOSError(error_number(exc)) from exc
