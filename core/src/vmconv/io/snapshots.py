"""Finds a file in the snapshots of its filesystem, in the layouts of Snapper, Timeshift and btrbk.

    Snapper    SUBVOLUME/.snapshots/NUMBER/snapshot/PATH, with NUMBER/info.xml
    Timeshift  TOP/timeshift-btrfs/snapshots/DATE/SUBVOLUME/PATH
    btrbk      a directory of SUBVOLUME.DATE/PATH, beside or below SUBVOLUME

A snapshot counts if it is read-only and of the same filesystem, and if no symbolic link leads to the file in it:
whoever may write to a directory of snapshots must not choose the file that another user converts.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from vmconv.errors import AccessError, UsageError, os_errors
from vmconv.system import linux

NEWEST = "newest"
"""The snapshot that is used if the user names none."""

MAX_SNAPSHOTS = 10_000
"""Entries of one directory of snapshots that are looked at."""

_BTRBK_DIRECTORIES = ("", ".snapshots", "_btrbk_snap", "btrbk_snapshots", "btrbk", ".btrbk", "snapshots")
_BTRBK = re.compile(r"\.(\d{8})(?:T(\d{4})(\d{2})?([+-]\d{4})?)?(?:_(\d{1,6}))?")
_TIMESHIFT = re.compile(r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}")
_SNAPPER_DATE = re.compile(rb"<date>\s*(\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2})\s*</date>")
_WHOLE = tuple(map(len, ("2026-01-01", "2026-01-01 03:00", "2026-01-01 03:00:01")))
"""Lengths of a date, a minute and a second. Part of a number would fit several."""
_INFO = 64 << 10
_SHOWN = 5


class Snapshot(NamedTuple):
    """A snapshot and the file in it: when it was made (seconds), by what layout, its name, its root, and the path."""

    made: float
    repetition: int
    """Tells snapshots of one moment apart."""
    layout: str
    name: str
    root: str
    path: str

    def __str__(self) -> str:
        return f"{self.layout} {self.name} of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.made))}"


def in_snapshot(path: str, wanted: str) -> Snapshot:
    """Returns the newest snapshot with the file `path`, or the `wanted` one: its name, number, or date.

    The file itself need not exist any more. Raises `AccessError` if there is no such snapshot.
    """
    directory = os.path.realpath(os.path.dirname(path) or ".")
    with os_errors("cannot be opened", AccessError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        own = _filesystem(descriptor)
    finally:
        os.close(descriptor)
    live = os.path.join(directory, os.path.basename(path.rstrip("/")))
    if not wanted:
        raise UsageError("--from-snapshot: no snapshot is named", hint="newest, or a snapshot's name, number or date")
    found = sorted({each for place in _places(live) for each in _candidates(place)}, reverse=True)
    usable = (one for one in found if wanted == NEWEST or _is_meant(one, wanted))
    for one in usable:
        if _counts(one, own):
            return one
    seen = list(islice((one for one in found if _counts(one, own)), _SHOWN))
    what = "no read-only snapshot of its filesystem has it" if wanted == NEWEST else f"no snapshot {wanted!r} has it"
    layouts = "looked for are those of Snapper, Timeshift and btrbk"
    raise AccessError(f"{path}: {what}", hint=f"there is {', '.join(map(str, seen))}" if seen else layouts)


def _is_meant(one: Snapshot, wanted: str) -> bool:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.made))
    return wanted == one.name or (len(wanted) in _WHOLE and date.startswith(wanted))


def _filesystem(descriptor: int) -> bytes | None:
    """Returns the identity of a filesystem, None if it cannot be told."""
    with suppress(OSError):
        return linux.filesystem_id(descriptor)
    return None


def _places(live: str) -> Iterator[str]:
    """Yields the paths of a file in all mounts of its filesystem: Timeshift's snapshots are seen only from the top."""
    yield live
    mounts = linux.mounts()
    inside = [one for one in mounts if live.startswith(one.point.rstrip("/") + "/")]
    if not inside:
        return
    # Of two mounts on one point, the later one hides the earlier.
    own = max(reversed(inside), key=lambda one: len(one.point))
    rest = os.path.join(own.root, live[len(own.point.rstrip("/")) + 1 :])
    for other in mounts:
        if other.source == own.source and other.point != own.point and rest.startswith(other.root.rstrip("/") + "/"):
            yield os.path.join(other.point, rest[len(other.root.rstrip("/")) + 1 :])


def _candidates(live: str) -> Iterator[Snapshot]:
    """Yields possible snapshots of all layouts, for each directory above the file."""
    above = os.path.dirname(live)
    while True:
        rest = os.path.relpath(live, above)
        yield from _snapper(above, rest)
        yield from _timeshift(above, rest)
        if above == "/":
            return
        yield from _btrbk(above, rest)
        above = os.path.dirname(above)


def _names(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in islice(entries, MAX_SNAPSHOTS)]
    except OSError:
        # There are no snapshots in this layout, or none that this user may see.
        return []


def _snapper(above: str, rest: str) -> Iterator[Snapshot]:
    directory = os.path.join(above, ".snapshots")
    for name in _names(directory):
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            continue
        made = _snapper_date(os.path.join(directory, name, "info.xml"))
        if made is not None:
            root = os.path.join(directory, name, "snapshot")
            yield Snapshot(made, int(name), "Snapper", name, root, os.path.join(root, rest))


def _snapper_date(path: str) -> float | None:
    """Returns when Snapper made a snapshot; it writes UTC."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _SNAPPER_DATE.search(os.pread(descriptor, _INFO, 0))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return _moment(f"{found[1].decode()} +0000", "%Y-%m-%d %H:%M:%S %z") if found else None


def _timeshift(above: str, rest: str) -> Iterator[Snapshot]:
    directory = os.path.join(above, "timeshift-btrfs", "snapshots")
    for name in _names(directory):
        made = _moment(name, "%Y-%m-%d_%H-%M-%S") if _TIMESHIFT.fullmatch(name) else None
        if made is not None:
            # The file's path begins with the name of its subvolume, such as "@home".
            root = os.path.join(directory, name, rest.split("/", 1)[0])
            yield Snapshot(made, 0, "Timeshift", name, root, os.path.join(directory, name, rest))


def _btrbk(above: str, rest: str) -> Iterator[Snapshot]:
    own = os.path.basename(above)
    beside = [os.path.join(os.path.dirname(above), name) for name in _BTRBK_DIRECTORIES]
    for directory in [*beside, *(os.path.join(above, name) for name in _BTRBK_DIRECTORIES if name)]:
        for name in _names(directory):
            date = _BTRBK.fullmatch(name[len(own) :]) if name.startswith(own) else None
            made = _btrbk_date(date) if date else None
            if date and made is not None:
                root = os.path.join(directory, name)
                yield Snapshot(made, int(date[5] or 0), "btrbk", name, root, os.path.join(root, rest))


def _btrbk_date(found: re.Match[str]) -> float | None:
    """Returns when btrbk made a snapshot; its names are local time, or have the zone."""
    text = f"{found[1]} {found[2] or '0000'}{found[3] or '00'}"
    return _moment(f"{text} {found[4]}", "%Y%m%d %H%M%S %z") if found[4] else _moment(text, "%Y%m%d %H%M%S")


def _moment(text: str, form: str) -> float | None:
    from datetime import datetime

    try:
        return datetime.strptime(text, form).timestamp()
    except (ValueError, OverflowError):
        return None


def _counts(one: Snapshot, own: bytes | None) -> bool:
    """True for a read-only snapshot of the same filesystem that has the file, without a link on the way."""
    if os.path.realpath(one.path) != one.path or not os.path.exists(one.path):
        return False
    try:
        descriptor = os.open(one.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with suppress(OSError):
            return own == _filesystem(descriptor) and linux.is_read_only(descriptor)
        return False
    finally:
        os.close(descriptor)
