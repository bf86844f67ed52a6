"""The limits of a node: it reads and writes inside its datastores only, in directories judged by real paths."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vmconv.api import inside
from vmconv.plugin import AccessError, UsageError, os_errors, parse_url
from vmconv_fleet.words import trap_in

DECLARE = "its administrator declares datastores: vmconv fleet datastore add NAME PATH"
"""The hint about a file outside the datastores."""
_CONTAINER = re.compile(r"[a-z][a-z0-9+.-]*://")
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_container(path: str) -> bool:
    """Returns whether a datastore is a container of objects, at a URL, and not a directory."""
    return _CONTAINER.match(path) is not None


def refuse_as_container(text: str) -> None:
    """Raises ValueError for a URL that names no container, or has what may be a secret: records are for all to read."""
    try:
        url = parse_url(text)
    except UsageError as exc:
        raise ValueError(str(exc)) from exc
    if url.user or url.password or url.query or not url.host or "/" in url.path.strip("/") or not url.path.strip("/"):
        raise ValueError(f"{url.shown} is not the URL of a container: SCHEME://STORE/CONTAINER")


def disk_id(datastore: str, name: str) -> str:
    """Returns the id in the catalogue of the disk `name`, a path below the datastore; equal in each scan."""
    return hashlib.sha256(os.fsencode(f"{datastore}\0{name}")).hexdigest()[:16]


def place_of(root: str, name: str, roots: Iterable[str]) -> str:
    """Returns the real path of `name` below the datastore at `root`.

    Raises AccessError unless the path, links and `..` resolved, lies in one of the datastores `roots`.
    """
    if "\0" in name or os.path.isabs(name):
        raise AccessError(f"{name!r} is not a path below a datastore")
    path = os.path.realpath(os.path.join(root, name))
    refuse_outside(path, name, roots)
    return path


def refuse_outside(path: str, said: str, roots: Iterable[str]) -> None:
    """Raises AccessError unless the real path `path`, requested as `said`, lies in a datastore."""
    if not any(inside(path, os.path.realpath(root)) for root in roots):
        raise AccessError(
            f"{said}: lies outside the datastores of this node, at {path}",
            hint=DECLARE,
        )


def hold(path: str, roots: Iterable[str]) -> int:
    """Returns a descriptor of a directory, given by its real path, in one of the datastores `roots`.

    Each part below the datastore is opened in the one above it, and none is a link. Raises AccessError if somebody has
    renamed one since its real path was found.
    """
    root = next((root for root in map(os.path.realpath, roots) if inside(path, root)), None)
    if root is None:
        raise AccessError(f"{path}: lies outside the datastores of this node")
    with os_errors("cannot be opened", AccessError, where=path):
        held = os.open(root, _DIRECTORY)
        for part in os.path.relpath(path, root).split("/"):
            above = held
            try:
                held = os.open(part, _DIRECTORY, dir_fd=above)
            finally:
                os.close(above)
    return held


@contextmanager
def opened(path: str, roots: Iterable[str]) -> Iterator[int]:
    """Yields a descriptor for reading a directory, given as to `hold`."""
    held = hold(path, roots)
    try:
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=held)
        try:
            yield readable
        finally:
            os.close(readable)
    finally:
        os.close(held)


@contextmanager
def listing(path: str, roots: Iterable[str]) -> Iterator[Iterator[os.DirEntry[str]]]:
    """Yields the entries of a directory, given as to `hold`."""
    with opened(path, roots) as directory, os.scandir(directory) as entries:
        yield entries


def refuse_as_file_name(name: str) -> None:
    """Raises AccessError unless the name is a plain file name, and no trap."""
    if problem := trap_in(name):
        raise AccessError(
            f"{name[:80]!r} is not the name of a file: it {problem}", hint="a target is named without directories"
        )
