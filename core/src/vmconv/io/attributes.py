"""Permissions of new files: copied from a replaced file, or at most those of the sources.

`carry` and `confine` are for a new file of mode 0600 without its final name, which no other user can open. Their order
keeps it so: first the owner, then the ACL, last the mode.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from vmconv.system import linux

_ACL = "system.posix_acl_access"
_DEFAULT_ACL = "system.posix_acl_default"
_LABELS = ("security.selinux", "security.SMACK64")
# Not copied: security.capability and security.ima depend on the content, trusted.* on overlayfs and clusters.
_USER = "user."
SYNC_RECORD = "user.vmconv.sync"
"""The attribute with the record of a sync; it is of one file's content, and not carried to another."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)
_REFUSED = (*_UNSUPPORTED, errno.EPERM, errno.EACCES)
_ABSENT = (*_UNSUPPORTED, errno.ENODATA)

# struct posix_acl_xattr_entry: e_tag, e_perm, e_id (linux/posix_acl_xattr.h).
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20

_FLAGS = 0x8 | 0x40 | 0x80
"""Inode flags that are copied: sync (S), nodump (d), noatime (A). NOCOW is handled by the backends."""


def can_give(status: os.stat_result) -> bool:
    """True if this process may chown its own file to the owner and group in `status`."""
    if os.geteuid() == 0:
        return True
    return status.st_uid == os.geteuid() and status.st_gid in (os.getegid(), *os.getgroups())


def carry(source: int, target: int, others: Iterable[int] = ()) -> tuple[str, ...]:
    """Copies owner, mode, ACL, user attributes, security label and inode flags from `source` to the file replacing it.

    Returns the names of what could not be copied. If owner, label or ACL are missing, only the owner gets access.
    Set-id and sticky bits are never copied. `others` are further files with content in the new one; a user
    denied by one of them gets no access.
    """
    status = os.fstat(source)
    missing = []
    group = _give(target, status)
    if not group:
        missing.append("owner and group")
    labelled = _carry_attributes(source, target, _LABELS)
    if not labelled:
        missing.append("security label")
    listed = _carry_acl(source, target)
    if not listed:
        missing.append("access control list")
    if not _carry_attributes(source, target, _user_names(source)):
        missing.append("extended attributes")
    _carry_flags(source, target)
    mode = stat.S_IMODE(status.st_mode) & 0o777
    if not (group and labelled and listed):
        mode &= 0o700
    for other in others:
        if not _admits_the_same(other, source):
            # Users in this ACL may have no access to the other file.
            mode &= 0o700 | (_limit(other, status.st_gid) if _attribute(source, _ACL) is None else 0)
    if not mode & 0o070:
        # Without group bits the ACL has no effect, but a later chmod would enable it.
        _remove(target, _ACL)
    os.fchmod(target, mode)
    return tuple(missing)


def _admits_the_same(one: int, other: int) -> bool:
    """True if two files have the same owner, group, mode and ACL."""
    first, second = os.fstat(one), os.fstat(other)
    alike = (first.st_uid, first.st_gid, first.st_mode) == (second.st_uid, second.st_gid, second.st_mode)
    return alike and _attribute(one, _ACL) == _attribute(other, _ACL)


def lets_read(source: int, reader: os.stat_result) -> bool:
    """True if the owner in `reader` may read the file `source`, as far as its mode tells."""
    status = os.fstat(source)
    if reader.st_uid in (0, status.st_uid):
        return True
    wanted = 0o044 if status.st_gid == reader.st_gid else 0o004
    return bool(status.st_mode & wanted) and _attribute(source, _ACL) is None


def confine(directory: int, sources: Iterable[int], target: int) -> None:
    """Gives a new file its mode by umask or default ACL of the directory, restricted to the access of each source."""
    os.fchmod(target, 0o600)
    wished = _wished(directory)
    mode = wished.mode
    for source in sources:
        mode &= 0o600 | _limit(source, os.fstat(target).st_gid)
    if not mode & 0o004:
        # A default ACL of the directory may name users and groups.
        _remove(target, _ACL)
        mode &= 0o700 | wished.group << 3
    os.fchmod(target, mode)


def _limit(source: int, gid: int) -> int:
    """Returns the mode bits for group and others that grant no more than this source."""
    if _attribute(source, _ACL) is not None:
        # The group bits are the ACL's mask then, and its entries may deny users what others may do.
        return 0
    status = os.fstat(source)
    group, others = status.st_mode >> 3 & 7, status.st_mode & 7
    if status.st_gid != gid:
        # A member of the new file's group may be one of the others for the source, and vice versa.
        group = others = group & others
    return group << 3 | others


class _Wished(NamedTuple):
    """The default permissions of new files in a directory: the mode, and the part of the owning group."""

    mode: int
    group: int


def _wished(directory: int) -> _Wished:
    """Returns the default permissions for open(2) with mode 0666 in a directory."""
    acl = _attribute(directory, _DEFAULT_ACL)
    if acl is None:
        mode = 0o666 & ~_umask()
        return _Wished(mode, mode >> 3 & 7)
    # Behind a header of 4 bytes. Entries for named users and groups do not count in the mode.
    permissions = {tag: permission for tag, permission, _ in _ENTRY.iter_unpack(acl[4:])}
    group = permissions.get(_GROUP_OBJ, 0)
    mask = permissions.get(_MASK, group)
    mode = permissions.get(_USER_OBJ, 6) << 6 | mask << 3 | permissions.get(_OTHER, 0)
    return _Wished(mode & 0o666, group & mask)


def _umask() -> int:
    """Returns the process's umask from /proc: umask(2) would change it while other threads create files."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        found = re.search(r"^Umask:\s*([0-7]+)", file.read(), re.MULTILINE)
    return int(found[1], 8) if found else 0o077


def _give(target: int, status: os.stat_result) -> bool:
    """Changes owner and group of a file as far as this process may; True if both match `status` then."""
    # A process without privileges may still change the group to one of its own.
    own = os.fstat(target)
    for uid, gid in ((status.st_uid, status.st_gid), (-1, status.st_gid)):
        if (own.st_uid, own.st_gid) == (status.st_uid, status.st_gid):
            return True
        try:
            os.fchown(target, uid, gid)
        except OSError as exc:
            if exc.errno not in _REFUSED:
                raise
        own = os.fstat(target)
    return (own.st_uid, own.st_gid) == (status.st_uid, status.st_gid)


def _carry_acl(source: int, target: int) -> bool:
    if _attribute(source, _ACL) is None:
        # The directory's default ACL may have given the new file one.
        _remove(target, _ACL)
        return True
    return _carry_attribute(source, target, _ACL)


def _carry_attributes(source: int, target: int, names: Iterable[str]) -> bool:
    """Copies attributes; True if all could be copied."""
    # A list, so that a failure does not end the loop.
    return not [name for name in names if not _carry_attribute(source, target, name)]


def _carry_attribute(source: int, target: int, name: str) -> bool:
    """Copies an attribute; True if both files have the same value then."""
    value = _attribute(source, name)
    if value is None or value == _attribute(target, name):
        return True
    try:
        os.setxattr(target, name, value)
    except OSError as exc:
        if exc.errno not in (*_REFUSED, errno.ENOSPC, errno.EDQUOT, errno.ERANGE, errno.E2BIG):
            raise
        return False
    return True


def _attribute(descriptor: int, name: str) -> bytes | None:
    try:
        try:
            return os.getxattr(descriptor, name)
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
            # Descriptors with O_PATH have no fgetxattr; see `Directory.at`.
            return os.getxattr(f"/proc/self/fd/{descriptor}", name)
    except OSError as exc:
        if exc.errno not in (*_ABSENT, errno.EPERM, errno.EACCES):
            raise
        return None


def remove_record(descriptor: int) -> None:
    """Removes the record of a sync from a file."""
    # The next sync refuses one that stays.
    with suppress(OSError):
        os.removexattr(descriptor, SYNC_RECORD)


def _user_names(descriptor: int) -> list[str]:
    return [name for name in _names(descriptor) if name.startswith(_USER) and name != SYNC_RECORD]


def _names(descriptor: int) -> list[str]:
    try:
        return os.listxattr(descriptor)
    except OSError as exc:
        if exc.errno not in _REFUSED:
            raise
        return []


def _remove(descriptor: int, name: str) -> None:
    try:
        os.removexattr(descriptor, name)
    except OSError as exc:
        if exc.errno not in _ABSENT:
            raise


def _carry_flags(source: int, target: int) -> None:
    """Copies inode flags, as far as possible: none of them restricts access."""
    try:
        wanted, own = linux.inode_flags(source) & _FLAGS, linux.inode_flags(target)
        if wanted & ~own:
            linux.set_inode_flags(target, own | wanted)
    except OSError as exc:
        if exc.errno not in _REFUSED:
            raise
