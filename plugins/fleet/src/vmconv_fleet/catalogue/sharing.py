"""Storage that several nodes see: one of them owns it, by a note on the directory itself.

The note is an extended attribute of the directory, or a file in it where a network filesystem has none. Only a node
that sees the storage can write it, so no other member can take a datastore away. A note that was copied with its
directory does not count: it states the machine, filesystem and directory that it is about.

A volume of JuiceFS tells which it is: there the storage is known by the volume and the directory's inode, and a note
about another one does not count, whoever wrote it. So does a container of objects, see `containers`.

Datastores of two nodes can also be one in the other. A file belongs to the nearest directory above it with a note.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NamedTuple

from vmconv.plugin import AccessError

ATTRIBUTE = "user.vmconv.owner"
FILE = ".vmconv-owner"
MAX_NOTE = 3500
"""Bytes of a note: ext4 keeps less than a block of attributes."""

MAX_HISTORY = 12

_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "gfs2", "gpfs", "lustre", "nfs", "nfs4", "ocfs2"}
    | {"smb3", "virtiofs"}
)
JUICEFS = "fuse.juicefs"
_STORAGE, _NODE, _HOW = (re.compile(each) for each in ("[0-9a-f]{32}", "[1-9a-f][0-9a-f]{31}", "[a-z]{1,16}"))
_ROOT = 1
_GETFSUUID = 0x80111500


class Holding(NamedTuple):
    """Who owns a storage. `history` are its owners, the last one is the present one; `place` is where the note is."""

    storage: str
    place: dict[str, Any]
    history: tuple[dict[str, Any], ...]

    @property
    def owner(self) -> str:
        return str(self.history[-1]["node"])

    def fields(self) -> dict[str, Any]:
        """Returns the fields of a datastore's record."""
        return {"storage": self.storage, "owner": self.owner, "owners": list(self.history)}

    def passed(self, node: str, how: str, now: int) -> Holding:
        """Returns the holding with another owner."""
        step = {"node": node, "since_ms": now, "how": how}
        return self._replace(history=(*self.history, step)[-MAX_HISTORY:])


class Note(ABC):
    """The note of a storage; `place` is what it has to be about."""

    place: dict[str, Any]

    @abstractmethod
    def read(self) -> bytes | None: ...

    @abstractmethod
    def write(self, data: bytes, *, replace: bool) -> None:
        """Writes the note. If it is new and another node was quicker, that one's stays."""


def hold(
    path: str, node: str, now: int, *, give_to: str | None = None, take: bool = False, retired: Collection[str] = ()
) -> Holding | None:
    """Returns who owns the directory: the node, if nobody did; None if no note can be written there.

    The owner gives it to `give_to`. With `take` the node takes it from an owner that is among the `retired`.
    """
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            note = _OfDirectory(directory, path)
            return hold_by(note, node, now, give_to=give_to, take=take, retired=retired)
        finally:
            os.close(directory)
    return None


def hold_by(
    note: Note, node: str, now: int, *, give_to: str | None = None, take: bool = False, retired: Collection[str] = ()
) -> Holding | None:
    """Returns who owns the storage of a note, as `hold` does."""
    said = note.read()
    found = parsed(said or b"")
    if found is None or not is_about(found, note.place):
        new = Holding(_storage(note.place) or secrets.token_hex(16), note.place, ()).passed(node, "declared", now)
        replace = said is not None
    elif give_to not in (None, node) and found.owner == node:
        new, replace = found.passed(str(give_to), "given", now), True
    elif take and found.owner != node and found.owner in retired:
        new, replace = found.passed(node, "taken", now), True
    else:
        return found
    note.write(json.dumps(new._asdict(), separators=(",", ":")).encode(), replace=replace)
    # Another node may have been quicker.
    return parsed(note.read() or b"")


def refuse_unless_owner(path: str, *nodes: str) -> None:
    """Raises AccessError if none of the nodes owns the directory, or the nearest one above it that has an owner."""
    found = nearest(path)
    if found and found[1].owner not in nodes:
        where, holding = found
        raise AccessError(f"{where}: this storage belongs to node {holding.owner}", hint="ask that node")


def nearest(path: str) -> tuple[str, Holding] | None:
    """Returns the nearest directory with an owner from `path` upwards, on the same filesystem, and who owns it."""
    with suppress(OSError):
        device = os.stat(path).st_dev
        while os.stat(path).st_dev == device:
            if found := owner_of(path):
                return path, found
            if path == (above := os.path.dirname(path)):
                break
            path = above
    return None


def owner_of(path: str) -> Holding | None:
    """Returns who owns this very directory; None without a note that is about it."""
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = parsed(_note(directory) or b"")
            return found if found and is_about(found, _place(directory, path)) else None
        finally:
            os.close(directory)
    return None


def release(directory: int) -> None:
    """Removes the note of an open directory."""
    with suppress(OSError):
        os.removexattr(directory, ATTRIBUTE)
    with suppress(OSError):
        os.unlink(FILE, dir_fd=directory)


def _place(directory: int, path: str) -> dict[str, Any]:
    """Returns what identifies the directory, as far as it is known; on the network only that it is there."""
    from vmconv.api import mount_of, volume_of

    mount = mount_of(path)
    if mount.type == JUICEFS:
        volume = volume_of(mount)
        return _place_in(*(volume or ("", "")), os.fstat(directory).st_ino)
    if mount.type in _NETWORK:
        return {"network": True}
    return {"network": False, "machine": _machine(), "uuid": _uuid(directory), "inode": os.fstat(directory).st_ino}


def _place_in(uuid: str, mounted: str, inode: int) -> dict[str, Any]:
    """Returns what identifies a directory of a volume of JuiceFS, of which `mounted` is the mounted directory.

    Without a `uuid` the mount does not tell this user its volume.
    """
    if not uuid or (mounted and inode == _ROOT):
        # The root of a mount of a directory has the number of the volume's root.
        return {"network": True, "volume": uuid}
    return {"network": True, "volume": uuid, "inode": inode}


def _storage(place: dict[str, Any]) -> str:
    """Returns the id of a storage that is known without a note; empty if it is not."""
    if place.get("volume") and place.get("inode"):
        known = f"juicefs {place['volume']} {place['inode']}"
    elif place.get("container"):
        known = f"container {place['container']}"
    else:
        return ""
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def is_about(noted: Holding, place: dict[str, Any]) -> bool:
    """Returns whether a note is about this place, as far as both are known."""
    if (known := _storage(place)) and noted.storage != known:
        return False
    return not any(noted.place.get(name) and value and noted.place[name] != value for name, value in place.items())


def _machine() -> str:
    with suppress(OSError), open("/etc/machine-id", encoding="ascii", errors="replace") as file:
        return file.read(64).strip()
    return ""


def _uuid(directory: int) -> str:
    """Returns the UUID of the filesystem; empty before Linux 6.9."""
    with suppress(OSError):
        answer = fcntl.ioctl(directory, _GETFSUUID, bytes(17))
        return answer[1 : 1 + min(answer[0], 16)].hex()
    return ""


class _OfDirectory(Note):
    """The note of an open directory."""

    def __init__(self, directory: int, path: str) -> None:
        self._directory = directory
        self.place = _place(directory, path)

    def read(self) -> bytes | None:
        return _note(self._directory)

    def write(self, data: bytes, *, replace: bool) -> None:
        try:
            os.setxattr(self._directory, ATTRIBUTE, data, 0 if replace else os.XATTR_CREATE)
        except FileExistsError:
            return
        except OSError as exc:
            if exc.errno != errno.ENOTSUP or not self.place["network"]:
                raise
            _write_file(self._directory, data, replace=replace)


def _note(directory: int) -> bytes | None:
    try:
        return os.getxattr(directory, ATTRIBUTE)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOTSUP):
            return _file(directory)
        raise


def _file(directory: int) -> bytes | None:
    try:
        file = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return None
    try:
        status = os.fstat(file)
        # Whoever may write below the directory, but not the directory's owner, must not give it away.
        trusted = status.st_uid in (0, os.geteuid(), os.fstat(directory).st_uid)
        return os.read(file, MAX_NOTE + 1) if trusted and status.st_size <= MAX_NOTE else None
    finally:
        os.close(file)


def parsed(data: bytes) -> Holding | None:
    """Returns who owns a storage by its note; None if the note is not valid.

    It is copied into records, and others may have written it: so each field is what a node would write.
    """
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(data)
        history = tuple(_step(one) for one in said["history"])
        if history and isinstance(said["place"], dict) and _STORAGE.fullmatch(said["storage"]):
            return Holding(said["storage"], said["place"], history[-MAX_HISTORY:])
    return None


def _step(said: Any) -> dict[str, Any]:
    """Returns an owner in the history of a note. Raises ValueError, TypeError or KeyError for what is none."""
    node, since, how = said["node"], said["since_ms"], said["how"]
    if not (_NODE.fullmatch(node) and _HOW.fullmatch(how) and isinstance(since, int) and 0 <= since < 1 << 53):
        raise ValueError
    return {"node": node, "since_ms": since, "how": how}


def _write_file(directory: int, data: bytes, *, replace: bool) -> None:
    name = f"{FILE}.{secrets.token_hex(8)}"
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
    try:
        with open(file, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        if replace:
            os.rename(name, FILE, src_dir_fd=directory, dst_dir_fd=directory)
        else:
            with suppress(FileExistsError):
                os.link(name, FILE, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
