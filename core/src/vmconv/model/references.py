"""Files that an image refers to: their names in the image, and detection of changes.

An image that refers to another file is valid only while that file does not change. So it stores a record of each: its
name and a fingerprint. mtime and ctime reveal a write; size, times and a digest of both ends reveal an exchanged file.
Not detected are writes while the clock was set back, and writes to the device below the filesystem. A write after which
mtime was reset to the nanosecond is only a doubt, by its ctime.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import AccessError, PlanError
from vmconv.model.sources import File, inside, stamp_of

if TYPE_CHECKING:
    from vmconv.model.layout import Reference

_ENDS = 64 << 10
"""Bytes of each end of a file in its digest; formats have their headers there."""
_TICK = 0.02
"""Seconds above the granularity of the kernel's file times: its clock ticks at least 100 times a second."""

MAX_RECORDS = 1024
"""Records that are read from one image."""

OWN_ROLES = frozenset({"data file", "extent", "image", "segment"})
"""Roles of files with payload of the image itself, in contrast to layers below."""

_RECORD = re.compile(r"vmconv-1 (.+) (\d{1,19}) (-?\d{1,19}) (-?\d{1,19}) ([0-9a-f]{32})", re.DOTALL)


class Fingerprint(NamedTuple):
    """Size in bytes, mtime and ctime in ns, BLAKE2b digest of both ends in hexadecimal."""

    size: int
    modified: int
    changed: int
    digest: str


class Record(NamedTuple):
    """The record of a file in an image: its name there, and its fingerprint."""

    name: str
    fingerprint: Fingerprint

    def __str__(self) -> str:
        size, modified, changed, digest = self.fingerprint
        return f"vmconv-1 {self.name} {size} {modified} {changed} {digest}"


class Dependency(NamedTuple):
    """A file that an image refers to, with its minimal `length` in bytes and its expected `fingerprint`."""

    role: str
    name: str
    length: int = 0
    fingerprint: Fingerprint | None = None


class Finding(NamedTuple):
    """The state of a dependency: a `problem` makes wrong reads possible, a `doubt` is undecidable."""

    dependency: Dependency
    problem: str | None = None
    doubt: str | None = None


# -- referring


def refer(file: File, directory: str) -> Record:
    """Returns the record of `file` for an image in `directory`; reads both ends of the file.

    Raises `PlanError` for a block device.
    """
    if file.is_device:
        raise PlanError(
            f"{file.name}: is a block device: later changes could not be detected",
            hint="omit the subformat to copy it, or copy the device to a file first",
        )
    return Record(name_for(file, directory), _fingerprint(file))


def name_for(file: File, directory: str) -> str:
    """Returns the name of `file` for an image in `directory`: relative if it is in or below that, else absolute."""
    if file.is_remote:
        raise PlanError(f"{file.name}: is at a URL, and images refer to local files only")
    real, tree = os.path.realpath(file.path), os.path.realpath(directory)
    if not inside(real, tree):
        return real
    return plain(os.path.relpath(real, tree))


def plain(name: str) -> str:
    """Returns a relative file name that no reader takes for a URL."""
    # QEMU takes text before a colon for a protocol.
    return f"./{name}" if ":" in name.split("/", 1)[0] else name


def _fingerprint(file: File) -> Fingerprint:
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    # In a short file, both ends overlap.
    length = min(_ENDS, file.size)
    digest.update(file.read(0, length))
    digest.update(file.read(file.size - length, length))
    return Fingerprint(file.size, file.stamp.mtime, file.stamp.ctime, digest.hexdigest())


def confirm(references: Iterable[Reference], directory: str, *, within: Iterable[str] | None = None) -> None:
    """Raises `PlanError` unless each name, relative to `directory`, leads to the same inode as its file.

    With `within`, raises `AccessError` for a name that leads out of these directories, whether or not a file is there.
    """
    trees = None if within is None else [os.path.realpath(tree) for tree in within]
    for reference in references:
        path = os.path.join(directory, reference.name)
        real = os.path.realpath(path)
        if trees is not None and not any(inside(real, tree) for tree in trees):
            raise AccessError(f"{reference.name}: lies outside of the directories of this conversion", hint=_RELATIVE)
        try:
            there = stamp_of(os.stat(path))
        except OSError as exc:
            raise PlanError(f"{path}: {exc.strerror}", hint=_RELATIVE) from exc
        # Device and inode: other names of the file are as good.
        if there[:2] != reference.file.stamp[:2]:
            raise PlanError(f"{path}: is not {reference.file.path}, whose payload is referred to", hint=_RELATIVE)


def notes(references: Iterable[Reference], directory: str) -> Iterator[str]:
    """Yields warnings about the references of an image in `directory`."""
    for reference in references:
        if os.path.isabs(name_for(reference.file, directory)):
            allowed = f"--allow-external {os.path.dirname(os.path.realpath(reference.file.path))}"
            yield f"{reference.name} is outside the target's directory: vmconv reads the target only with {allowed}"


_RELATIVE = "relative names are relative to the target's directory; vmconv writes no file but the target"


def settle(files: Iterable[File]) -> None:
    """Waits until the next write to any of the files is certain to get a different ctime."""
    newest = max((file.stamp.ctime for file in files), default=0)
    age = time.time() - newest / 1e9
    if age < _TICK:
        # A time in the future comes from another machine's clock, which is no use to wait for.
        time.sleep(min(_TICK, _TICK - age))


# -- comparing


def read_records(texts: Iterable[str]) -> dict[str, Fingerprint]:
    """Returns the fingerprints of an image's records by name; skips malformed records and those past the limit."""
    found: dict[str, Fingerprint] = {}
    for text in texts:
        if len(found) < MAX_RECORDS and (match := _RECORD.fullmatch(text)):
            found[match[1]] = Fingerprint(int(match[2]), int(match[3]), int(match[4]), match[5])
    return found


def compared(dependency: Dependency, file: File) -> Finding:
    """Returns the comparison of `file`, found under the dependency's name, with the dependency."""
    if file.size < dependency.length:
        return Finding(dependency, f"has {file.size} bytes, {dependency.length} are referred to")
    was = dependency.fingerprint
    if was is None:
        return Finding(dependency)
    now = _fingerprint(file)
    since = "since it was referred to"
    if now.size != was.size:
        return Finding(dependency, f"has changed {since}: it has {now.size} bytes, it had {was.size}")
    if now.modified != was.modified:
        return Finding(dependency, f"has changed {since}: modified {_when(now.modified)}, before {_when(was.modified)}")
    if now.digest != was.digest:
        return Finding(dependency, f"has changed {since}: its first or last {_ENDS >> 10} KiB differ")
    if now.changed != was.changed:
        doubt = "was copied, renamed or had its attributes changed since, or was written to and its mtime reset"
        return Finding(dependency, None, doubt)
    return Finding(dependency)


def _when(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{rest:09} UTC"
