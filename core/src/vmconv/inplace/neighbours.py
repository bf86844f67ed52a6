"""Finds images of the directory that would lose their parent or payload by a conversion in place.

Compares the names in a neighbour's header, or the identity of its parent, with the files to be changed. Opens nothing
outside the directory, whatever a neighbour names, and locks nothing.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from vmconv import errors
from vmconv.errors import AccessError, PlanError, VmconvError, counted
from vmconv.inplace.rules import Own
from vmconv.io.opener import Opener
from vmconv.model import paths
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.io.directory import Directory
    from vmconv.io.registry import Registry
    from vmconv.model.image import Image

BRIEFLY = 0.3
"""Seconds of a search whose outcome is only told, not decided by."""

MOST_SECONDS = 20.0
"""Time limit of the search. A warning counts the files that were not searched."""


class Neighbours(NamedTuple):
    """The outcome: `refers` is `(neighbour, file that it refers to)`, `unseen` the number of files not searched."""

    directory: str
    refers: tuple[str, str] | None
    unseen: int


def look(
    directory: Directory,
    own: Sequence[Own],
    registry: Registry,
    but: Collection[str] = (),
    *,
    seconds: float | None = None,
    all_names: bool = True,
) -> Neighbours:
    """Searches the directory for an image that refers to one of `own` as its parent or payload.

    `but` are files that may refer to them, because they are removed with them. Without `all_names`, only files with
    the suffix of a format are searched. The search ends after `seconds`, by default `MOST_SECONDS`.
    """
    passed = {*but, *(each.name for each in own)}
    # A search that only tells something needs no directory that may be listed.
    names = [name for name in (directory.names() if all_names else directory.listed()) if name not in passed]
    # Files named like images come first, in case the time runs out.
    names.sort(key=lambda name: registry.format_by_suffix(name) is None)
    if not all_names:
        names = [name for name in names if registry.format_by_suffix(name) is not None]
    end = time.monotonic() + (MOST_SECONDS if seconds is None else seconds)
    for number, name in enumerate(names):
        if time.monotonic() > end:
            return Neighbours(directory.path, None, len(names) - number)
        found = _find_reference(directory, name, own, registry)
        if found is not None:
            return Neighbours(directory.path, (name, found), 0)
    return Neighbours(directory.path, None, 0)


def refuse(found: Neighbours) -> None:
    """Raises `PlanError` if another image refers to one of the files."""
    if found.refers:
        name, own = found.refers
        raise PlanError(
            f"{name}: refers to {own}, which this would replace",
            hint=f"convert {name} first, flattening it, or rebase it",
        )


def child_of(directory: Directory, own: Sequence[Own], registry: Registry) -> tuple[str, str] | None:
    """Returns an image of the directory that refers to one of `own`, and that one's name.

    A short search, among files with the suffix of a format: None does not prove that there is no such image.
    """
    return look(directory, own, registry, seconds=BRIEFLY, all_names=False).refers


def replaced_bases(directory: Directory, names: Sequence[str], registry: Registry) -> Iterator[str]:
    """Yields a warning if an image of the directory refers to one of the files, which others will replace."""
    with ExitStack() as stack:
        own = []
        for name in names:
            status = directory.status(name)
            if status is None or not stat.S_ISREG(status.st_mode):
                continue
            # A file that cannot be read can be replaced all the same.
            with suppress(OSError, VmconvError):
                file = File(directory.join(name), directory.open(name))
                stack.callback(file.close)
                own.append(Own(file, name))
        found = child_of(directory, own, registry) if own else None
        if found:
            yield f"{found[0]} refers to {found[1]}, which will be another image: it will show another disk, or none"


def warning(found: Neighbours) -> str | None:
    """Returns a warning if files were not searched."""
    if not found.unseen:
        return None
    return (
        f"{found.directory}: not searched: {counted(found.unseen, 'file')}, and an image among them that refers to the "
        "source will be unreadable"
    )


def warn(found: Neighbours) -> None:
    """Emits the warning, for callers without a list of warnings."""
    if text := warning(found):
        errors.warn(text)


def _find_reference(directory: Directory, name: str, own: Sequence[Own], registry: Registry) -> str | None:
    """Returns the one of `own` that an image refers to; None if there is none, or the file is no image."""
    try:
        descriptor = directory.open(name)
    except (OSError, VmconvError):
        # An unreadable file cannot be searched for references.
        return None
    file = File(os.path.join(directory.path, name), descriptor)
    with _Names(directory, own, registry) as names:
        names.files.append(file)
        kind = registry.probe(file)
        # A damaged header may fail halfway; names read before count.
        with suppress(VmconvError):
            if kind is not None and kind in registry.all_formats:
                _ask(registry.format(kind).read(file, names), names)
        return names.found


def _ask(image: Image, names: _Names) -> None:
    for dependency in image.dependencies:
        with suppress(VmconvError):
            names.related(image.file, dependency.name, dependency.role)
    if image.parent_reference is not None:
        names.note(image.file, image.parent_reference)
    with suppress(VmconvError):
        image.parent  # noqa: B018 asks for it


class _Names(Opener):
    """An opener that notes requests for one of `own` and opens nothing outside the directory."""

    def __init__(self, directory: Directory, own: Sequence[Own], registry: Registry) -> None:
        super().__init__(registry)
        self.directory = directory
        self.own = own
        self.found: str | None = None

    def note(self, origin: File, reference: str, *, moved: bool = False) -> str | None:
        """Returns a reference's name in the directory, None if it leads out of the directory."""
        name = self._note_path(os.path.join(os.path.dirname(origin.path), reference))
        if name is None or not self.directory.has(name):
            # Readers look up paths of other systems, and with `moved` all paths, by their base names.
            base = paths.base_of(reference) if moved or paths.is_foreign(reference) else ""
            for each in self.own:
                if base.casefold() == each.name.casefold():
                    self.found = each.name
            return self._note_path(os.path.join(os.path.dirname(origin.path), reference.replace("\\", "/"))) or name
        return name

    def _note_path(self, path: str) -> str | None:
        folder, name = os.path.split(path)
        if "\0" in path or name in ("", ".", "..") or not self._is_here(folder):
            return None
        with suppress(OSError):
            # A symbolic link of this directory may point to one of the files.
            there = os.stat(name, dir_fd=self.directory.descriptor)
            for each in self.own:
                if _identity(there) == each.file.stamp[:2]:
                    self.found = each.name
        return name

    def _is_here(self, folder: str) -> bool:
        if os.path.normpath(folder) == os.path.normpath(self.directory.path):
            return True
        with suppress(OSError, ValueError):
            return os.path.realpath(folder) == self.directory.real()
        return False

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        name = self.note(origin, reference, moved=moved)
        if name is None:
            raise _missing(origin, reference, role)
        try:
            descriptor = self.directory.open(name)
        except OSError as exc:
            raise _missing(origin, reference, role) from exc
        file = File(os.path.join(self.directory.path, name), descriptor)
        self.files.append(file)
        return file

    def named_parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        self.note(origin, reference, moved=moved)
        raise _missing(origin, reference, "backing file")

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        for each in self.own:
            yield os.path.join(self.directory.path, each.name), each.file


def _missing(origin: File, reference: str, role: str) -> AccessError:
    """Returns the error of a missing file, after which some readers try another name."""
    error = AccessError(f"{origin.name}: {role} {reference!r} is not opened")
    error.__cause__ = FileNotFoundError(reference)
    return error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
