"""The only way to a file: opens what the user names, and what images name when the rules allow it.

An image that comes from a stranger may name any file of this machine as its parent. So a file that an image names must
lie in the directory of the file that the user named, or below it, or in a tree that the user allowed; this is decided
on the file that was really opened, after every symbolic link.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vmconv import locks
from vmconv.errors import AccessError, ImageError, PluginError, os_errors
from vmconv.inplace.names import interrupted
from vmconv.sources import File, inside

if TYPE_CHECKING:
    from vmconv.formats import Format
    from vmconv.image import Image
    from vmconv.registry import Registry

MAX_CHAIN_DEPTH = 200
"""Layers of one chain, as libvirt has it."""

MAX_SEARCHED = 1000
"""Files that are opened to find one by what is in it."""

# A file that has gone, that this user may not read, or that cannot be opened at all: the parent is none of those.
_NO_CANDIDATE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTDIR, errno.ESTALE}
)

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Opener:
    """Opens files read-only and keeps them open until `close`; use it as a context manager.

    `allow_external` are directories (or files) that images may refer to besides their own directory. `force_share`
    reads a file that QEMU has open for writing, which may give a disk that never existed. `backing_format` is the
    format of backing files where an image does not state it. `format_option` is how the user names the format of the
    image, for hints; empty where that cannot be said. `acting` surrounds each call that looks a path up, and nothing
    else: a mount opens with the rights of the user who asks.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        allow_external: Iterable[str] = (),
        force_share: bool = False,
        backing_format: str | None = None,
        format_option: str = "-f",
        acting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.registry = registry
        self.files: list[File] = []
        self._trees = [os.path.realpath(tree) for tree in allow_external]
        self._force_share = force_share
        self._acting = acting
        self._backing_format = backing_format
        self._format_option = format_option
        self._depth: dict[int, list[tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self.files:
            self.files.pop().close()

    def image(
        self, path: str, format_name: str | None = None, *, snapshot: str | None = None, content_decides: bool = False
    ) -> Image:
        """Returns the image in the file that the user named; see `Registry.identify` for the format."""
        file = self._open(path)
        if not any(inside(os.path.realpath(file.path), tree) for tree in self._trees):
            self._trees.append(os.path.dirname(os.path.realpath(file.path)))
        self._depth[id(file)] = [_identity(file)]
        warnings: tuple[str, ...] = ()
        if content_decides and format_name is None:
            found, warnings = self.registry.recognise(file, option=self._format_option)
        else:
            found = self.registry.identify(file, format_name, option=self._format_option)
        image = self._read(found, file, snapshot)
        image.warnings += warnings
        return image

    def file(self, path: str) -> File:
        """Returns a file that the user named, whatever it holds."""
        return self._open(path)

    def related(self, origin: File, reference: str, role: str) -> File:
        """Returns the file that `origin` names as its `role`; raises `AccessError` where the rules forbid it."""
        if "\0" in reference or not reference:
            raise ImageError(f"{origin.name}: {role} {reference!r} is not a file name")
        if _PROTOCOL.match(reference):
            raise AccessError(
                f"{origin.name}: {role} {reference!r} is not a plain file name",
                hint="protocols and json: names are never followed",
            )
        path = os.path.join(os.path.dirname(os.path.realpath(origin.path)), reference)
        with self._acting():
            real = os.path.realpath(path)
        self._allow(origin, real, reference, role)
        file = self._open(path, f"{origin.name}: {role} {reference!r}")
        # A link may have been changed between the look and the opening: what counts is what was opened.
        self._allow(origin, os.path.realpath(f"/proc/self/fd/{file.descriptor}"), reference, role)
        if _identity(file) == _identity(origin):
            raise ImageError(f"{origin.name}: {role} {reference!r} is the image itself, a loop")
        return file

    def parent(self, origin: File, reference: str, format_name: str | None) -> Image:
        """Returns the image that `origin` names as its parent; refuses loops and chains of more than the limit.

        `format_name` is what `origin` states, None where it states nothing.
        """
        file = self.related(origin, reference, "backing file")
        above = self._depth[id(origin)]
        if _identity(file) in above:
            raise ImageError(f"{origin.name}: backing file {reference!r} is already part of the chain, a loop")
        if len(above) >= MAX_CHAIN_DEPTH:
            raise ImageError(f"{origin.name}: chain of more than {MAX_CHAIN_DEPTH} layers")
        self._depth[id(file)] = [*above, _identity(file)]
        stated = format_name or self._backing_format
        return self._read(self.registry.identify(file, stated, option="--backing-format"), file)

    def _read(self, found: Format, file: File, snapshot: str | None = None) -> Image:
        from vmconv.image import Image

        image: Any = found.read(file, self, snapshot=snapshot)
        if not isinstance(image, Image):
            said = f"its reader returns {type(image).__name__}, which is no Image"
            raise PluginError(said, format_name=found.name)
        return image

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        """Yields files that may be named by something else than their names, each as `(reference, file)`.

        They are those of the origin's directory and of the directories that the user allowed (not below them) whose
        names end with `suffix`. A file is closed when the next one is asked for; `MAX_SEARCHED` are opened at most.
        """
        for path in islice(self._candidates(origin, suffix), MAX_SEARCHED):
            try:
                with self._acting():
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as exc:
                if exc.errno not in _NO_CANDIDATE:
                    raise AccessError(f"{path}: cannot be looked at: {exc.strerror}") from exc
                continue
            file = File(path, descriptor)
            try:
                if self._may_be_looked_at(file, origin):
                    yield path, file
            finally:
                file.close()

    def _may_be_looked_at(self, file: File, origin: File) -> bool:
        real = os.path.realpath(f"/proc/self/fd/{file.descriptor}")
        regular = stat.S_ISREG(os.fstat(file.descriptor).st_mode)
        return regular and _identity(file) != _identity(origin) and any(inside(real, tree) for tree in self._trees)

    def _candidates(self, origin: File, suffix: str) -> Iterator[str]:
        own = os.path.dirname(os.path.realpath(origin.path))
        for directory in dict.fromkeys([own, *filter(os.path.isdir, self._trees)]):
            with os_errors("cannot be listed", AccessError), self._acting():
                names = sorted(os.listdir(directory))
            yield from (os.path.join(directory, name) for name in names if name.lower().endswith(suffix))

    def release(self, file: File) -> None:
        """Closes a file that was only looked at, before all others."""
        self.files = [other for other in self.files if other is not file]
        file.close()

    def _allow(self, origin: File, real: str, reference: str, role: str) -> None:
        if any(inside(real, tree) for tree in self._trees):
            return
        raise AccessError(
            f"{origin.name}: {role} {reference!r} lies outside the image's directory, at {real}",
            hint=f"if you trust the image, --allow-external {os.path.dirname(real)}",
        )

    def _open(self, path: str, said: str | None = None) -> File:
        with self._acting():
            incomplete = interrupted(path) or not os.path.lexists(path)
        if incomplete:
            _recover(path)
        doing = "cannot be opened" if said is None else f"cannot be opened as {said}"
        with os_errors(doing, AccessError), self._acting():
            # Non-blocking, because opening a pipe would wait for its writer; reading files is not affected by it.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            os.close(descriptor)
            raise AccessError(f"{path}: is neither a regular file nor a block device")
        file = File(path, descriptor)
        self.files.append(file)
        if not self._force_share:
            locks.share(file)
        return file


def _identity(file: File) -> tuple[int, int]:
    return file.stamp.device, file.stamp.inode


def _recover(path: str) -> None:
    """Brings a file back that a conversion in place, when it was stopped, left as neither one nor the other."""
    from vmconv.inplace.recovery import met
    from vmconv.targets import finished

    if not os.path.lexists(path) and finished(path):
        return
    done = met(path)
    if done is None:
        return
    import logging

    what = f"a conversion in place was interrupted, and has been {'finished' if done.forward else 'taken back'}"
    if not os.path.lexists(path):
        raise AccessError(f"{path}: is {done.path} now: {what}")
    # Whichever command it is that met the file: this is no property of the image.
    logging.getLogger("vmconv").warning("warning: %s: %s", path, what)
