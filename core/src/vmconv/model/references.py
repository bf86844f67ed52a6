"""Other files that an image is made of: how they are named in it, and whether they are still what they were.

An image that refers to another file, instead of holding its bytes, is right only while nobody writes to that file. So
it keeps a record of each: its name and a fingerprint. A write is noticed by the file's times, which the kernel sets; a
file that was exchanged by its size, its times and the digest of its two ends. What cannot be noticed: a write after
which the modification time was set back to the nanosecond (that is a doubt only, by the time of change), one while the
clock was set back, and one that goes past the filesystem, to its device.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import PlanError
from vmconv.model.sources import File, inside, stamp_of

if TYPE_CHECKING:
    from vmconv.model.layout import Reference

_ENDS = 64 << 10
"""Bytes of each end of a file that its digest is made of: where formats have their headers."""
_TICK = 0.02
"""Seconds between two times that the kernel gives files, and some more: its clock ticks 100 times a second or more."""

MAX_RECORDS = 1024

OWN_ROLES = frozenset({"data file", "extent", "image"})
"""Roles of files that hold payload of the image itself, not of a layer below."""

_RECORD = re.compile(r"vmconv-1 (.+) (\d{1,19}) (-?\d{1,19}) (-?\d{1,19}) ([0-9a-f]{32})", re.DOTALL)


class Fingerprint(NamedTuple):
    """What a file was: size in bytes, times of modification and change in ns, digest of its ends in hexadecimal."""

    size: int
    modified: int
    changed: int
    digest: str


class Record(NamedTuple):
    """A file as an image keeps it: the name by which the image refers to it, and its fingerprint."""

    name: str
    fingerprint: Fingerprint

    def __str__(self) -> str:
        size, modified, changed, digest = self.fingerprint
        return f"vmconv-1 {self.name} {size} {modified} {changed} {digest}"


class Dependency(NamedTuple):
    """A file that an image is made of: `length` is how many bytes it must have, `fingerprint` what it has to be."""

    role: str
    name: str
    length: int = 0
    fingerprint: Fingerprint | None = None


class Finding(NamedTuple):
    """How a dependency was found: a `problem` makes wrong reads possible, a `doubt` is what cannot be told."""

    dependency: Dependency
    problem: str | None = None
    doubt: str | None = None


# -- referring


def refer(file: File, directory: str) -> Record:
    """Returns the record of `file` for an image in `directory`: its name is relative when it is in or below that.

    Raises `PlanError` for what cannot be known again. Reads both ends of the file.
    """
    if file.is_device:
        raise PlanError(
            f"{file.name}: is a block device: later changes could not be noticed",
            hint="leave the subformat out to copy it, or make a file of it",
        )
    return Record(name_for(file, directory), _fingerprint(file))


def name_for(file: File, directory: str) -> str:
    """Returns the name of `file` for an image in `directory`: relative when it is in or below that, else absolute."""
    real, tree = os.path.realpath(file.path), os.path.realpath(directory)
    if not inside(real, tree):
        return real
    return plain(os.path.relpath(real, tree))


def plain(name: str) -> str:
    """Returns the name of a file as no reader takes it for a protocol's, as QEMU does what has a colon in front."""
    return f"./{name}" if ":" in name.split("/", 1)[0] else name


def _fingerprint(file: File) -> Fingerprint:
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    length = min(_ENDS, file.size)
    digest.update(file.read(0, length))
    digest.update(file.read(file.size - length, length))
    return Fingerprint(file.size, file.stamp.mtime, file.stamp.ctime, digest.hexdigest())


def confirm(references: Iterable[Reference], directory: str) -> None:
    """Raises `PlanError` unless each name, seen from `directory`, is the very file that is meant."""
    for reference in references:
        path = os.path.join(directory, reference.name)
        try:
            there = stamp_of(os.stat(path))
        except OSError as exc:
            raise PlanError(f"{path}: {exc.strerror}", hint=_RELATIVE) from exc
        if there[:2] != reference.file.stamp[:2]:
            raise PlanError(f"{path}: is not {reference.file.path}, whose payload is referred to", hint=_RELATIVE)


def notes(references: Iterable[Reference], directory: str) -> Iterator[str]:
    """Yields what must be said of references of an image in `directory` before anybody relies on them."""
    for reference in references:
        if os.path.isabs(name_for(reference.file, directory)):
            allowed = f"--allow-external {os.path.dirname(os.path.realpath(reference.file.path))}"
            yield f"{reference.name} is outside of the target's directory: vmconv reads the target only with {allowed}"


_RELATIVE = "a relative name is relative to the target's directory; no file is made or changed but the target"


def settle(files: Iterable[File]) -> None:
    """Waits until the next write to any of the files is sure to get another time than the last one had."""
    newest = max((file.stamp.ctime for file in files), default=0)
    age = time.time() - newest / 1e9
    if age < _TICK:
        # A time that lies ahead comes from another machine's clock; waiting for that would help nobody.
        time.sleep(min(_TICK, _TICK - age))


# -- looking again


def read_records(texts: Iterable[str]) -> dict[str, Fingerprint]:
    """Returns the fingerprints in an image's records, by name; what is no record, or one too many, is left out."""
    found: dict[str, Fingerprint] = {}
    for text in texts:
        if len(found) < MAX_RECORDS and (match := _RECORD.fullmatch(text)):
            found[match[1]] = Fingerprint(int(match[2]), int(match[3]), int(match[4]), match[5])
    return found


def compared(dependency: Dependency, file: File) -> Finding:
    """Returns how `file`, which is there under the dependency's name, compares with what was referred to."""
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
        return Finding(dependency, f"has changed {since}: its first or last {_ENDS >> 10} KiB are others")
    if now.changed != was.changed:
        doubt = "was copied, renamed or given other attributes since, or was written to and its time set back"
        return Finding(dependency, None, doubt)
    return Finding(dependency)


def _when(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{rest:09} UTC"
