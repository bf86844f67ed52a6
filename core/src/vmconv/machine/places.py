"""The directory of a new machine: found, or made and removed again when the conversion fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from vmconv.backends.targets import open_directory, refuse_outside
from vmconv.errors import PlanError
from vmconv.io.directory import Directory


def existing_parent(path: str) -> str:
    """Returns the path if it exists, else the nearest directory above it that does."""
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path or "."


@contextmanager
def directory_at(path: str, *, within: Sequence[str] | None = None) -> Iterator[Directory]:
    """Yields the directory of this path, open; missing directories are made, and removed if the block fails.

    Raises `PlanError` if a part of the path is not a directory or cannot be made, `AccessError` if the existing part is
    not in one of the trees `within`.
    """
    made: list[tuple[Directory, str]] = []
    with ExitStack() as stack:
        try:
            existing = existing_parent(path)
            at = stack.enter_context(_opened(existing, path))
            if within is not None:
                refuse_outside(at, within)
            for name in _below(existing, path):
                at.make(name)
                made.append((at, name))
                at = stack.enter_context(at.inner(name))
            at.path = path
            yield at
        except BaseException as exc:
            for directory, name in reversed(made):
                # Another process may have put files there meanwhile.
                with suppress(OSError):
                    directory.remove(name)
            if isinstance(exc, OSError):
                raise PlanError(f"{exc.filename or path}: {exc.strerror}") from exc
            raise


def _opened(existing: str, path: str) -> Directory:
    try:
        return open_directory(existing)
    except NotADirectoryError as exc:
        raise PlanError(
            f"{existing}: is not a directory", hint=f"{path} would be the directory of the machine"
        ) from exc


def _below(existing: str, path: str) -> list[str]:
    """Returns the components of a path below a directory."""
    below = os.path.relpath(path, existing)
    return [] if below == "." else below.split("/")


def file_name(text: str) -> str:
    """Returns a plain file name from a machine's name: `/` becomes `-`, and a leading dot or minus `_`."""
    name = "".join("-" if each in "/\\" or not each.isprintable() else each for each in text).strip() or "machine"
    if name[0] in ".-":
        name = f"_{name[1:]}"
    # The end says which of the machine's files it is.
    start, end = name[:-_END], name[-_END:]
    while start and len(os.fsencode(start + end)) > _MOST:
        start = start[:-1]
    return start + end


_MOST = 200
"""Bytes of a name, with room for names derived from it."""

_END = 24
"""Characters at the end that are kept, such as `-disk1024.parallels`."""
