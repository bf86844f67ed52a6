"""A node's backup: settings, keys, authority and database in one tar file, and the directory made from it again.

Not in it: unused invitations, which would be valid again after their use, and journals of running conversions.
"""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import IO

from vmconv.plugin import os_errors
from vmconv_fleet import config as settings
from vmconv_fleet.config import NodeConfig
from vmconv_fleet.errors import FleetError
from vmconv_fleet.node.marks import RESTORED
from vmconv_fleet.replication.database import open_reader
from vmconv_fleet.replication.store import Reader
from vmconv_fleet.trust import credentials
from vmconv_fleet.trust.authority import Authority
from vmconv_fleet.trust.identity import MAX_MEMBERS, MAX_PEM, write_private

DATABASE = "store.sqlite"
LIMITS: Mapping[str, int] = {
    "node.toml": 1 << 20,
    "ca.pem": MAX_PEM,
    "members.pem": MAX_MEMBERS,
    "identity/node.pem": MAX_PEM,
    "identity/tls.key": MAX_PEM,
    "identity/signing.key": MAX_PEM,
    "authority/ca.key": MAX_PEM,
    "webhooks.json": 1 << 20,
    DATABASE: 1 << 40,
}
"""The files of a backup and their largest sizes."""
_OPTIONAL = ("members.pem", "authority/ca.key", "webhooks.json", DATABASE)
_CHUNK = 1 << 20


class BackupError(FleetError):
    """A file is no backup of a node, or no backup can be made."""


def write_backup(config: NodeConfig, path: str) -> None:
    """Writes a backup into a new file for its owner only. The node may run."""
    with os_errors("writing the backup", BackupError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    _fill(config, tar, os.path.dirname(os.path.abspath(path)))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)
            raise


def _fill(config: NodeConfig, tar: tarfile.TarFile, beside: str) -> None:
    # The links of `identity` are resolved once: a renewal replaces keys and certificate together.
    identity = os.path.realpath(config.path("identity"))
    for name in LIMITS:
        path = os.path.join(identity, os.path.basename(name)) if name.startswith("identity/") else config.path(name)
        if name in _OPTIONAL and not os.path.exists(path):
            continue
        if name == DATABASE:
            with _copied(path, beside) as copy, open(copy, "rb") as file:
                _add(tar, name, file)
        else:
            with open(path, "rb") as file:
                _add(tar, name, io.BytesIO(file.read(LIMITS[name])))


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size = file.seek(0, os.SEEK_END)
    member.mode, member.mtime = 0o600, int(time.time())
    file.seek(0)
    tar.addfile(member, file)


@contextmanager
def _copied(database: str, beside: str) -> Iterator[str]:
    """Yields the path of a copy of the database as of one moment."""
    directory = tempfile.mkdtemp(prefix=".vmconv-backup-", dir=beside)
    try:
        copy = os.path.join(directory, DATABASE)
        with closing(open_reader(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
            # One file, without a log beside it.
            target.execute("PRAGMA journal_mode = DELETE")
        yield copy
    except sqlite3.Error as exc:
        raise BackupError(f"{database}: cannot be copied: {exc}") from exc
    finally:
        shutil.rmtree(directory)


def restore_backup(path: str, directory: str) -> NodeConfig:
    """Fills a new directory from a backup and returns the node's settings.

    The node then writes once it has heard from all members. Raises BackupError if the file is no backup, and leaves a
    part of it in the directory then.
    """
    with os_errors("reading the backup", BackupError), open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                _extract(path, tar, directory)
        except tarfile.TarError as exc:
            raise BackupError(f"{path}: is no backup of a node: {exc}") from exc
    config = settings.load(directory)
    bound = credentials.load(config)
    # Its directory has a name that only a new certificate changes.
    credentials.install(directory, bound.keys, bound.certificate)
    if credentials.holds_authority(config):
        Authority.load(directory)
    _check_database(config)
    write_private(config.path(RESTORED), b"")
    return config


def _extract(path: str, tar: tarfile.TarFile, directory: str) -> None:
    found: set[str] = set()
    for member in tar:
        limit = LIMITS.get(member.name)
        if limit is None or member.name in found or member.type != tarfile.REGTYPE or member.sparse:
            raise BackupError(f"{path}: {member.name!r} does not belong into the backup of a node")
        if member.size > limit:
            raise BackupError(f"{path}: {member.name} has {member.size} bytes, at most {limit} are allowed")
        found.add(member.name)
        source = tar.extractfile(member)
        assert source is not None
        _write(os.path.join(directory, member.name.replace("identity/", "identity.restored/")), source)
    missing = [name for name in LIMITS if name not in found and name not in _OPTIONAL]
    if missing:
        raise BackupError(f"{path}: {missing[0]} is missing in the backup")
    os.symlink("identity.restored", os.path.join(directory, "identity"))


def _write(path: str, source: IO[bytes]) -> None:
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
        file.flush()
        os.fsync(file.fileno())


def _check_database(config: NodeConfig) -> None:
    if os.path.exists(config.database):
        try:
            with closing(Reader(open_reader(config.database))) as reader:
                reader.positions()
        except FleetError as exc:
            raise BackupError(f"{config.database}: is no database of a node: {exc}") from exc
