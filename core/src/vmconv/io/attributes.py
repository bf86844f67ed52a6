"""Who may do what with a file: carried from an old file to the one that takes its place, or never more than before.

Both functions are for a file of this process that nobody else can open yet: it was made with the mode 0600 and has not
got its name. The order keeps it so: the owner first, then the access control list, the mode last.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Iterable
from typing import NamedTuple

from vmconv.system import linux

_ACL = "system.posix_acl_access"
_DEFAULT_ACL = "system.posix_acl_default"
_LABELS = ("security.selinux", "security.SMACK64")
# Not carried: security.capability and security.ima speak of the content, trusted.* of overlays and clusters.
_USER = "user."

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)
_REFUSED = (*_UNSUPPORTED, errno.EPERM, errno.EACCES)
_ABSENT = (*_UNSUPPORTED, errno.ENODATA)

# struct posix_acl_xattr_entry: e_tag, e_perm, e_id (linux/posix_acl_xattr.h).
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20

_FLAGS = 0x8 | 0x40 | 0x80
"""Inode flags that stay: written at once (S), not dumped (d), no access times (A). NOCOW is the backends' business."""


def can_give(status: os.stat_result) -> bool:
    """True when this process may give a file of its own the owner and group of another."""
    if os.geteuid() == 0:
        return True
    return status.st_uid == os.geteuid() and status.st_gid in (os.getegid(), *os.getgroups())


def carry(source: int, target: int, others: Iterable[int] = ()) -> tuple[str, ...]:
    """Gives a file owner, mode, access control list, extended attributes, label and flags of the one that it replaces.

    Returns what could not be carried, in words. Nobody gets more access by that: what the missing part would have kept
    from others, the mode keeps from all but the owner. Set-id and sticky bits are never carried. `others` are files
    whose content is in the new one, too: nobody gets in whom one of them would not let in.
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
    if not _carry_attributes(source, target, [name for name in _names(source) if name.startswith(_USER)]):
        missing.append("extended attributes")
    _carry_flags(source, target)
    mode = stat.S_IMODE(status.st_mode) & 0o777
    if not (group and labelled and listed):
        mode &= 0o700
    for other in others:
        if not _admits_the_same(other, source):
            # Who is listed is not known to be let in by the other one.
            mode &= 0o700 | (_limit(other, status.st_gid) if _attribute(source, _ACL) is None else 0)
    if not mode & 0o070:
        # Without effect now, and with one after the next chmod.
        _remove(target, _ACL)
    os.fchmod(target, mode)
    return tuple(missing)


def _admits_the_same(one: int, other: int) -> bool:
    """True when two files are alike in whom they let do what."""
    first, second = os.fstat(one), os.fstat(other)
    alike = (first.st_uid, first.st_gid, first.st_mode) == (second.st_uid, second.st_gid, second.st_mode)
    return alike and _attribute(one, _ACL) == _attribute(other, _ACL)


def lets_read(source: int, reader: os.stat_result) -> bool:
    """True when the owner of a file, whose status this is, may read another one, as far as its mode tells."""
    status = os.fstat(source)
    if reader.st_uid in (0, status.st_uid):
        return True
    wanted = 0o044 if status.st_gid == reader.st_gid else 0o004
    return bool(status.st_mode & wanted) and _attribute(source, _ACL) is None


def confine(directory: int, sources: Iterable[int], target: int) -> None:
    """Gives a new file the mode of a new file in this directory, but nobody more access than each of the sources gave.

    The umask counts, or the directory's default access control list, as for any new file.
    """
    os.fchmod(target, 0o600)
    wished = _wished(directory)
    mode = wished.mode
    for source in sources:
        mode &= 0o600 | _limit(source, os.fstat(target).st_gid)
    if not mode & 0o004:
        # A default list of the directory may let others in by name.
        _remove(target, _ACL)
        mode &= 0o700 | wished.group << 3
    os.fchmod(target, mode)


def _limit(source: int, gid: int) -> int:
    """Returns the bits for group and others that give nobody what this source does not give him."""
    if _attribute(source, _ACL) is not None:
        # The group's bits are a mask then, and who is listed may be denied what others may.
        return 0
    status = os.fstat(source)
    group, others = status.st_mode >> 3 & 7, status.st_mode & 7
    if status.st_gid != gid:
        # Who is in one of the two groups may be anybody to the other.
        group = others = group & others
    return group << 3 | others


class _Wished(NamedTuple):
    """What a directory gives to a new file: its mode, and the group's own part of it."""

    mode: int
    group: int


def _wished(directory: int) -> _Wished:
    """Returns what a new file in a directory gets from a program that asks for 0666."""
    acl = _attribute(directory, _DEFAULT_ACL)
    if acl is None:
        mode = 0o666 & ~_umask()
        return _Wished(mode, mode >> 3 & 7)
    permissions = {tag: permission for tag, permission, _ in _ENTRY.iter_unpack(acl[4:])}
    group = permissions.get(_GROUP_OBJ, 0)
    mask = permissions.get(_MASK, group)
    mode = permissions.get(_USER_OBJ, 6) << 6 | mask << 3 | permissions.get(_OTHER, 0)
    return _Wished(mode & 0o666, group & mask)


def _umask() -> int:
    """Returns the process's umask without changing it, as other threads may make files."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        found = re.search(r"^Umask:\s*([0-7]+)", file.read(), re.MULTILINE)
    return int(found[1], 8) if found else 0o077


def _give(target: int, status: os.stat_result) -> bool:
    """Gives a file another's owner and group as far as this process may; True when both are the same then."""
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
        # One that the directory gave to the new file would let others in.
        _remove(target, _ACL)
        return True
    return _carry_attribute(source, target, _ACL)


def _carry_attributes(source: int, target: int, names: Iterable[str]) -> bool:
    """Carries each of the attributes that can be; True when all could."""
    return not [name for name in names if not _carry_attribute(source, target, name)]


def _carry_attribute(source: int, target: int, name: str) -> bool:
    """Gives a file one attribute of another; True when both have the same then."""
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
            # A directory that this user may enter and not list is opened by O_PATH.
            return os.getxattr(f"/proc/self/fd/{descriptor}", name)
    except OSError as exc:
        if exc.errno not in (*_ABSENT, errno.EPERM, errno.EACCES):
            raise
        return None


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
    """Gives a file another's flags; that it has none of these lets nobody in."""
    try:
        wanted, own = linux.inode_flags(source) & _FLAGS, linux.inode_flags(target)
        if wanted & ~own:
            linux.set_inode_flags(target, own | wanted)
    except OSError as exc:
        if exc.errno not in _REFUSED:
            raise
