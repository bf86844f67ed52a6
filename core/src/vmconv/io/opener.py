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

from vmconv.errors import AccessError, ImageError, PluginError, os_errors, warn
from vmconv.io import locks
from vmconv.io.known import KNOWN
from vmconv.model import paths
from vmconv.model.sources import File, inside

if TYPE_CHECKING:
    from vmconv.interface.format import Format
    from vmconv.io.registry import Registry
    from vmconv.model.image import Image

MAX_CHAIN_DEPTH = 200
"""Layers of one chain, as libvirt has it."""

MAX_SEARCHED = 1000
"""Files that are opened to find one by what is in it."""

STANDARD_INPUT = "-"
"""What is no name of a source."""

_SHOWN = 3

# A file that has gone, that this user may not read, or that cannot be opened at all: the parent is none of those.
_NO_CANDIDATE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENOTDIR, errno.ESTALE}
)

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FILE = "file:"
"""QEMU's protocol of plain files: what follows is their name."""


class Opener:
    """Opens files read-only and keeps them open until `close`; use it as a context manager.

    `allow_external` are directories (or files) that images may refer to besides their own directory. `force_share`
    reads a file that QEMU has open for writing, which may give a disk that never existed. `backing_format` is the
    format of backing files where an image does not state it. `format_option` is how the user names the format of the
    image, for hints; empty where that cannot be said. `acting` surrounds each call that looks a path up, and nothing
    else: a mount opens with the rights of the user who asks. `settle` is called with the path of each file before it is
    opened: a command that may repair an interrupted conversion does so there. Without it an opener changes nothing.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        allow_external: Iterable[str] = (),
        force_share: bool = False,
        backing_format: str | None = None,
        format_option: str = "-f",
        acting: Callable[[], AbstractContextManager[object]] | None = None,
        settle: Callable[[str], None] | None = None,
    ) -> None:
        self.registry = registry
        self.files: list[File] = []
        self._trees = [os.path.realpath(tree) for tree in allow_external]
        self._force_share = force_share
        self._acting = acting or nullcontext
        self._settle = settle
        # A misspelt format is found even where no image asks for it.
        self._backing_format = None if backing_format is None else registry.format(backing_format).name
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
        """Returns the image in the file, or the bundle, that the user named; see `Registry.identify` for the format."""
        file = self._open(self._meant(path))
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

    def _meant(self, path: str) -> str:
        """Returns the file to open for what the user named: of a bundle, the one that describes its disk."""
        with self._acting():
            if path == STANDARD_INPUT and not os.path.lexists(path):
                raise AccessError(
                    "standard input cannot be converted: a disk is read at any offset",
                    hint="write it to a file first, and name that",
                )
            if not os.path.isdir(path):
                return path
            for known in KNOWN:
                if known.bundle and os.path.isfile(os.path.join(path, known.bundle)):
                    return os.path.join(path, known.bundle)
            found = list(islice(self._disks_below(path), _SHOWN))
        raise AccessError(
            f"{path}: is neither a regular file nor a block device",
            hint="name a disk in this directory" + (f": {', '.join(found)}" if found else ""),
        )

    def _disks_below(self, directory: str) -> Iterator[str]:
        """Yields what may be disks in a directory and in those in it: virtual machines are kept in such bundles."""
        for below, directories, names in islice(os.walk(directory), MAX_SEARCHED):
            for name in sorted(directories) + sorted(names):
                if self.registry.format_by_suffix(name) is not None:
                    yield os.path.join(below, name)
            if below != directory:
                directories.clear()

    def file(self, path: str) -> File:
        """Returns a file that the user named, whatever it holds."""
        return self._open(path)

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        """Returns the file that `origin` names as its `role`; raises `AccessError` where the rules forbid it.

        A path of another system is looked for by its base name, beside the image; with `moved` every absolute path that
        is not here is, for callers that know the right file when they see it.
        """
        if "\0" in reference or not reference:
            raise ImageError(f"{origin.name}: {role} {reference!r} is not a file name")
        path = self._located(origin, reference, role, moved=moved)
        with self._acting():
            real = os.path.realpath(path)
        self._allow(origin, real, reference, role)
        file = self._open(path, f"{origin.name}: {role} {reference!r}")
        # A link may have been changed between the look and the opening: what counts is what was opened.
        self._allow(origin, file.real_path(), reference, role)
        if _identity(file) == _identity(origin):
            raise ImageError(f"{origin.name}: {role} {reference!r} is the image itself, a loop")
        return file

    def _located(self, origin: File, reference: str, role: str, *, moved: bool) -> str:
        """Returns the path of what `origin` names: where QEMU looks for it, or by its base name beside the image."""
        own = os.path.dirname(os.path.realpath(origin.path))
        path = os.path.join(own, reference)
        elsewhere, base = paths.is_foreign(reference), paths.base_of(reference)
        looked = elsewhere or os.path.isabs(reference)
        # Nothing is imported while acting for another user, who may not be able to read Python's own files.
        with self._acting():
            # Relative paths of Windows have backslashes, which few names have here.
            found = self._as_named(origin, reference, role) or (
                self._as_named(origin, reference.replace("\\", "/"), role) if "\\" in reference else None
            )
            if found:
                _refuse_protocol_of_files(origin, reference, role)
                return found
            near = paths.beside(own, base, os.fstat(origin.descriptor)) if looked else None
        if near and (elsewhere or moved):
            if not moved:
                warn(f"{origin.name}: {role} {reference!r} is not here: {base} beside the image was taken")
            return near
        if _PROTOCOL.match(reference) and not paths.on_windows(reference):
            raise AccessError(
                f"{origin.name}: {role} {reference!r} is not a plain file name",
                hint="protocols and json: names are never followed",
            )
        if near or elsewhere:
            what = f"{origin.name}: {role} {reference!r} is not here"
            hint = f"{base} lies beside the image: if that is the one, name it in the image (qemu-img rebase -u)"
            raise AccessError(what, hint=hint if near else f"put {base} beside the image") from FileNotFoundError(path)
        return path

    def _as_named(self, origin: File, reference: str, role: str) -> str | None:
        """Returns the path of what is there under the very name; None when nothing is.

        QEMU takes a relative name from the directory of the link by which an image was named, others from that of the
        image. Raises `AccessError` where that makes a difference.
        """
        path = os.path.join(os.path.dirname(os.path.realpath(origin.path)), reference)
        by_link = os.path.join(os.path.dirname(origin.path), reference)
        there, by_link_too = os.path.lexists(path), os.path.lexists(by_link)
        if there and by_link_too and not _same(path, by_link):
            raise AccessError(
                f"{origin.name}: {role} {reference!r} is one file beside the link {origin.path} and another one beside "
                f"the image it leads to",
                hint=f"name the image itself: {os.path.realpath(origin.path)}",
            )
        return path if there else by_link if by_link_too else None

    def parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        """Returns the image that `origin` names as its parent; refuses loops and chains of more than the limit.

        `format_name` is what `origin` states, None where it states nothing. `moved` is for callers that make sure of
        the parent's identity, see `related`.
        """
        file = self.related(origin, reference, "backing file", moved=moved)
        above = self._depth[id(origin)]
        if _identity(file) in above:
            raise ImageError(f"{origin.name}: backing file {reference!r} is already part of the chain, a loop")
        if len(above) >= MAX_CHAIN_DEPTH:
            raise ImageError(f"{origin.name}: chain of more than {MAX_CHAIN_DEPTH} layers")
        self._depth[id(file)] = [*above, _identity(file)]
        stated = format_name or self._backing_format
        return self._read(self.registry.identify(file, stated, option="--backing-format"), file)

    def _read(self, found: Format, file: File, snapshot: str | None = None) -> Image:
        from vmconv.model.image import Image

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
        real = file.real_path()
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
        if self._settle:
            self._settle(path)
        doing = "cannot be opened" if said is None else f"cannot be opened as {said}"
        with os_errors(doing, AccessError), self._acting():
            # Non-blocking, because opening a pipe would wait for its writer; reading files is not affected by it.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with os_errors(doing, AccessError, where=path):
                mode = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise AccessError(f"{path}: is neither a regular file nor a block device")
            file = File(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self.files.append(file)
        if not self._force_share:
            locks.share(file)
        return file


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _identity(file: File) -> tuple[int, int]:
    return file.stamp.device, file.stamp.inode


def _refuse_protocol_of_files(origin: File, reference: str, role: str) -> None:
    """Raises `AccessError` for a name that is a file's here and leads QEMU to another file."""
    if reference.startswith(_FILE):
        to_qemu = reference.removeprefix(_FILE)
        raise AccessError(
            f"{origin.name}: {role} {reference!r} is a file of that name, and {to_qemu!r} to QEMU",
            hint=f"name it ./{reference} in the image (qemu-img rebase -u)",
        )
