"""A disk that can be written to while its image stays as it is: writes go to a qcow2 layer on the image.

The layer is an ordinary one, such as `vmconv create -b` makes: QEMU reads it, `vmconv commit` brings it into the image.
It is kept when the view ends, and used again by the next one, unless the user wants otherwise.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vmconv.api import View, commit, create, locks, settle
from vmconv.plugin import (
    AccessError,
    Extents,
    File,
    Opener,
    PlanError,
    ReadError,
    UsageError,
    WritableLayer,
    access,
    os_errors,
    printable,
)
from vmconv_view.overlay_options import SUFFIX

if TYPE_CHECKING:
    from vmconv.api import Registry

_FORMAT = "qcow2"


class WritableView(View):
    """The disk of a layer that is written to, read as any view; `layer` takes the writes."""

    def __init__(self, layer: WritableLayer, below: View) -> None:
        super().__init__(Extents.filled(layer.size))
        self.layer = layer
        self._below = below

    @property
    def data_size(self) -> int:
        """What this is now is known only by reading all tables, so the size of the disk."""
        return self.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            self.layer.read_into(offset, buffer)
        except OSError as exc:
            raise ReadError(f"{exc.filename or 'the layer'}: cannot be read: {exc.strerror}") from exc

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        return self.layer.spans(offset, length)

    def parts(self, offset: int, length: int) -> Iterator[memoryview]:
        return self._bytes(offset, length)

    def refuse_changed(self) -> None:
        self._below.refuse_changed()


class Overlay:
    """An image with a layer that is open for writing; `path` is that of the layer."""

    def __init__(self, image: str, options: argparse.Namespace, registry: Registry) -> None:
        if os.path.isdir(image):
            raise UsageError(f"{image}: is a directory", hint="name the disk's file in it")
        self.path: str = options.overlay or image + SUFFIX
        self._options = options
        self._access = access(options)
        self._real = os.path.realpath(image)
        # The layer may lie elsewhere.
        self._trees = [*self._access["allow_external"], os.path.dirname(self._real)]
        self.is_new = not os.path.lexists(self.path)
        if self.is_new:
            self._make()
        with os_errors(f"{self.path}: cannot be opened for writing", AccessError):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        # Takes no locks, because those of the layer would be in our own way.
        self._opener = Opener(
            registry,
            allow_external=self._trees,
            force_share=True,
            backing_format=self._access["backing_format"],
            secrets=self._access["secrets"],
            settle=settle,
        )
        try:
            self.view = self._view(descriptor, registry)
        except BaseException:
            self._opener.close()
            os.close(descriptor)
            raise

    def _make(self) -> None:
        """Makes an empty layer that only its owner can read."""
        beside = os.path.dirname(os.path.realpath(self.path)) == os.path.dirname(self._real)
        create(
            self.path,
            target_format=_FORMAT,
            backing_file=os.path.basename(self._real) if beside else self._real,
            backing_format=getattr(self._options, "format_f", None),
            mode=0o600,
            force_share=self._access["force_share"],
            allow_external=self._trees,
            source_backing_format=self._access["backing_format"],
        )

    def _view(self, descriptor: int, registry: Registry) -> WritableView:
        file = File(self.path, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise AccessError(f"{self.path}: is no file of this user", hint="name another one with --overlay")
        locks.write(file)
        image = self._opener.image(self.path, _FORMAT)
        wanted = os.stat(self._real)
        parent = image.parent
        if image.file.stamp[:2] != (status.st_dev, status.st_ino):
            raise AccessError(f"{self.path}: was replaced meanwhile", hint="try again")
        if parent is None or parent.file.stamp[:2] != (wanted.st_dev, wanted.st_ino):
            raise PlanError(f"{self.path}: is no layer on {self._real}", hint="name another file with --overlay")
        below = View(parent.flat)
        if not self._access["force_share"]:
            for other in self._opener.files:
                if other is not image.file:
                    locks.share(other)
        return WritableView(registry.format(_FORMAT).open_layer(image, descriptor), below)

    def announce(self) -> None:
        """Prints where writes go."""
        said = "new" if self.is_new else "has what was written before"
        print(printable(f"writes go to {self.path} ({said})"), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flushes and closes the layer, then commits, discards or keeps it."""
        try:
            self.view.layer.close()
        finally:
            self._opener.close()
        if self._options.discard:
            os.unlink(self.path)
        elif self._options.commit:
            commit(
                self.path,
                source_format=_FORMAT,
                allow_external=self._trees,
                source_backing_format=self._access["backing_format"],
            )
            os.unlink(self.path)
        elif not self.is_forked:
            said = f"{self.path} keeps what was written: vmconv commit brings it into the image, rm discards it"
            print(printable(said), file=sys.stderr)

    @property
    def is_forked(self) -> bool:
        return bool(self._options.fork)


def closing_all(overlays: list[Overlay]) -> None:
    """Closes all, and raises the first error."""
    errors: list[Exception] = []
    for overlay in overlays:
        try:
            overlay.close()
        except Exception as exc:
            errors.append(exc)
    if errors:
        raise errors[0]


def error_number(exc: OSError) -> Any:
    """Returns the errno of an error of storage that a client is told: no space, or an error of input and output."""
    import errno

    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return errno.ENOSPC if exc.errno in full else errno.EIO
