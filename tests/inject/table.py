"""Every system call that vmconv makes on files, with the errnos of its manual page and its short results.

The names are those of strace, with the request of `ioctl`, the command of `fcntl` and the whence of `lseek` behind a
colon. Calls that do the same by a path and by a descriptor share a row (`ALIASES`). A call without a row fails a test.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

FILTERED = ("ENOSYS", "EPERM")
"""What a kernel without the call, and a filter of system calls (seccomp), answer; in every row."""

SHORT = ("half", "one", "zero")


class Row(NamedTuple):
    """One call: the errnos of its manual page (section 2, or 3 where that is the call's), and its short results."""

    errnos: tuple[str, ...]
    short: tuple[str, ...] = ()

    @property
    def all_errnos(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.errnos, *FILTERED)))


def _row(errnos: str, *short: str) -> Row:
    return Row(tuple(errnos.split()), short)


_PATH = "EACCES EBADF EFAULT ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR"
_XATTR = "E2BIG ENODATA ENOTSUP ERANGE EACCES EBADF EFAULT EIO"

TABLE = {
    "access": _row(f"{_PATH} EINVAL EIO EPERM EROFS ETXTBSY"),
    "chmod": _row(f"{_PATH} EIO EPERM EROFS EOPNOTSUPP"),
    "chown": _row(f"{_PATH} EIO EPERM EROFS"),
    "close": _row("EBADF EINTR EIO ENOSPC EDQUOT"),
    "copy_file_range": _row(
        "EBADF EFBIG EINVAL EIO EISDIR ENOMEM ENOSPC EOPNOTSUPP EOVERFLOW EPERM ETXTBSY EXDEV EDQUOT", *SHORT
    ),
    "dup": _row("EBADF EMFILE ENOMEM"),
    "fadvise64": _row("EBADF EINVAL ESPIPE"),
    "fallocate": _row("EBADF EFBIG EFAULT EINTR EINVAL EIO ENODEV ENOSPC EOPNOTSUPP EPERM ESPIPE ETXTBSY EDQUOT"),
    "fchdir": _row("EACCES EBADF ENOTDIR"),
    "fchmod": _row("EBADF EIO EPERM EROFS EOPNOTSUPP"),
    "fchown": _row("EBADF EIO EPERM EROFS EINVAL EDQUOT EOPNOTSUPP"),
    "fcntl:DUPFD": _row("EBADF EINVAL EMFILE"),
    "fcntl:GETFD": _row("EBADF"),
    "fcntl:GETFL": _row("EBADF"),
    "fcntl:OFD_GETLK": _row("EBADF EFAULT EINTR EINVAL ENOLCK EOPNOTSUPP EIO"),
    "fcntl:OFD_SETLK": _row("EACCES EAGAIN EBADF EDEADLK EFAULT EINTR EINVAL ENOLCK EOPNOTSUPP EIO"),
    "fcntl:SETFL": _row("EBADF EINVAL EPERM"),
    "fcntl:SETLEASE": _row("EACCES EAGAIN EBADF EINVAL ENOLCK EOPNOTSUPP EIO"),
    "fcntl:SETPIPE_SZ": _row("EBADF EBUSY EINVAL ENOMEM EPERM"),
    "fdatasync": _row("EBADF EINTR EIO ENOSPC EROFS EINVAL EDQUOT"),
    "fdopendir": _row("EACCES EBADF EMFILE ENFILE ENOMEM ENOTDIR"),
    "flock": _row("EBADF EINTR EINVAL ENOLCK EWOULDBLOCK EOPNOTSUPP EIO"),
    "fsync": _row("EBADF EINTR EIO ENOSPC EROFS EINVAL EDQUOT EOPNOTSUPP"),
    "ftruncate": _row("EBADF EFBIG EINTR EINVAL EIO EPERM EROFS ETXTBSY ENOSPC EDQUOT"),
    "getdents64": _row("EBADF EFAULT EINVAL ENOENT ENOTDIR EIO"),
    "getxattr": _row(_XATTR),
    "ioctl:BTRFS_FS_INFO": _row("EBADF EFAULT EINVAL ENOTTY EOPNOTSUPP EIO"),
    "ioctl:FICLONE": _row("EBADF EINVAL EISDIR EOPNOTSUPP EPERM ETXTBSY EXDEV EIO ENOSPC EDQUOT ENOTTY"),
    "ioctl:BLKROGET": _row("EBADF EFAULT EINVAL ENOTTY"),
    "ioctl:BLKSSZGET": _row("EBADF EFAULT EINVAL ENOTTY"),
    "ioctl:LOOP_GET_STATUS64": _row("EBADF EFAULT EINTR EINVAL ENXIO ENOTTY"),
    "ioctl:FICLONERANGE": _row("EAGAIN EBADF EINVAL EISDIR EOPNOTSUPP EPERM ETXTBSY EXDEV EIO ENOSPC EDQUOT ENOTTY"),
    "ioctl:FIEMAP": _row("EBADF EBADR EFAULT EFBIG EINTR EINVAL ENOMEM ENOTTY EOPNOTSUPP EIO"),
    "ioctl:FIONREAD": _row("EBADF EFAULT EINVAL ENOTTY"),
    "ioctl:GETFLAGS": _row("EBADF EFAULT EINVAL ENOTTY EOPNOTSUPP EIO EACCES"),
    "ioctl:GETFSUUID": _row("EBADF EFAULT EINVAL ENOTTY EOPNOTSUPP EIO"),
    "ioctl:GETVERSION": _row("EBADF EFAULT EINVAL ENOTTY EOPNOTSUPP EIO EACCES"),
    "ioctl:RESVSP": _row("EBADF EFBIG EFAULT EINTR EINVAL EIO ENOSPC EOPNOTSUPP EPERM ENOTTY EDQUOT"),
    "ioctl:SETFLAGS": _row("EBADF EFAULT EINVAL ENOTTY EOPNOTSUPP EIO EACCES EPERM EROFS"),
    "ioctl:TCGETS": _row("EBADF EFAULT EINVAL ENOTTY"),
    "ioctl:TIOCGWINSZ": _row("EBADF EFAULT EINVAL ENOTTY"),
    "ioctl:UNRESVSP": _row("EBADF EFBIG EFAULT EINTR EINVAL EIO ENOSPC EOPNOTSUPP EPERM ENOTTY ETXTBSY"),
    "link": _row(f"{_PATH} EDQUOT EEXIST EIO EMLINK ENOSPC EPERM EROFS EXDEV EOPNOTSUPP EINVAL"),
    "listxattr": _row("E2BIG ENOTSUP ERANGE EACCES EBADF EFAULT EIO"),
    "lseek:CUR": _row("EBADF EINVAL EOVERFLOW ESPIPE"),
    "lseek:DATA": _row("EBADF EINVAL ENXIO EOVERFLOW ESPIPE EOPNOTSUPP EIO"),
    "lseek:END": _row("EBADF EINVAL EOVERFLOW ESPIPE EIO"),
    "lseek:HOLE": _row("EBADF EINVAL ENXIO EOVERFLOW ESPIPE EOPNOTSUPP EIO"),
    "lseek:SET": _row("EBADF EINVAL EOVERFLOW ESPIPE"),
    "mkdir": _row(f"{_PATH} EDQUOT EEXIST EINVAL EMLINK ENOSPC EPERM EROFS EIO"),
    "open": _row(
        f"{_PATH} EBUSY EDQUOT EEXIST EFBIG EINTR EINVAL EISDIR EMFILE ENFILE ENODEV ENOSPC ENXIO EOPNOTSUPP"
        " EOVERFLOW EPERM EROFS ETXTBSY EWOULDBLOCK EIO ESTALE"
    ),
    "openat2": _row(f"{_PATH} E2BIG EAGAIN EINVAL EXDEV EMFILE ENFILE EIO EROFS EEXIST EISDIR ENXIO ETXTBSY"),
    "pread64": _row("EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR ENXIO EOVERFLOW ESPIPE", *SHORT),
    "preadv2": _row("EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR ENXIO EOVERFLOW ESPIPE EOPNOTSUPP", *SHORT),
    "pwrite64": _row("EAGAIN EBADF EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EPERM ENXIO EOVERFLOW ESPIPE", *SHORT),
    "pwritev2": _row(
        "EAGAIN EBADF EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EPERM ENXIO EOVERFLOW ESPIPE EOPNOTSUPP", *SHORT
    ),
    "read": _row("EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR", *SHORT),
    "readlink": _row(f"{_PATH} EINVAL EIO"),
    "readv": _row("EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR", *SHORT),
    "removexattr": _row(_XATTR),
    "rename": _row(f"{_PATH} EBUSY EDQUOT EEXIST EINVAL EISDIR EMLINK ENOSPC ENOTEMPTY EPERM EROFS EXDEV EIO"),
    "renameat2": _row(f"{_PATH} EBUSY EDQUOT EEXIST EINVAL EISDIR EMLINK ENOSPC ENOTEMPTY EPERM EROFS EXDEV EIO"),
    "rmdir": _row(f"{_PATH} EBUSY EINVAL ENOTEMPTY EPERM EROFS EIO"),
    "sendfile": _row("EAGAIN EBADF EFAULT EINVAL EIO ENOMEM EOVERFLOW ESPIPE", *SHORT),
    "setxattr": _row(f"{_XATTR} EDQUOT EEXIST ENOSPC EPERM EROFS"),
    "stat": _row(f"{_PATH} EINVAL EOVERFLOW EIO ESTALE"),
    "statfs": _row(f"{_PATH} EINTR EIO EOVERFLOW"),
    "unlink": _row(f"{_PATH} EBUSY EIO EISDIR EPERM EROFS EINVAL"),
    "utimensat": _row(f"{_PATH} EINVAL EPERM EROFS ESRCH EIO"),
    "write": _row("EAGAIN EBADF EDESTADDRREQ EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EPERM EPIPE", *SHORT),
    "writev": _row("EAGAIN EBADF EDESTADDRREQ EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EPERM EPIPE", *SHORT),
}

IOCTLS = {
    0x4020940D: "ioctl:FICLONERANGE",
    0x40049409: "ioctl:FICLONE",
    0xC020660B: "ioctl:FIEMAP",
    0x80086601: "ioctl:GETFLAGS",
    0x40086602: "ioctl:SETFLAGS",
    0x80087601: "ioctl:GETVERSION",
    0x80111500: "ioctl:GETFSUUID",
    0x8400941F: "ioctl:BTRFS_FS_INFO",
    0x40305828: "ioctl:RESVSP",
    0x4030582B: "ioctl:UNRESVSP",
    0x541B: "ioctl:FIONREAD",
    0x5401: "ioctl:TCGETS",
    0x5413: "ioctl:TIOCGWINSZ",
    0x125E: "ioctl:BLKROGET",
    0x1268: "ioctl:BLKSSZGET",
    0x4C05: "ioctl:LOOP_GET_STATUS64",
}
FCNTLS = {
    37: "fcntl:OFD_SETLK",
    38: "fcntl:OFD_SETLK",
    36: "fcntl:OFD_GETLK",
    1024: "fcntl:SETLEASE",
    1031: "fcntl:SETPIPE_SZ",
    1030: "fcntl:DUPFD",
    1: "fcntl:GETFD",
    3: "fcntl:GETFL",
    4: "fcntl:SETFL",
}
SEEKS = {0: "lseek:SET", 1: "lseek:CUR", 2: "lseek:END", 3: "lseek:DATA", 4: "lseek:HOLE"}
"""The calls of many purposes by their numbers, as `strace -X raw` prints them and `shim.c` has them."""

ALIASES = {
    "openat": "open",
    "newfstatat": "stat",
    "fstat": "stat",
    "lstat": "stat",
    "statx": "stat",
    "fstatfs": "statfs",
    "unlinkat": "unlink",
    "linkat": "link",
    "renameat": "rename",
    "mkdirat": "mkdir",
    "readlinkat": "readlink",
    "faccessat": "access",
    "faccessat2": "access",
    "fgetxattr": "getxattr",
    "lgetxattr": "getxattr",
    "flistxattr": "listxattr",
    "llistxattr": "listxattr",
    "fsetxattr": "setxattr",
    "fremovexattr": "removexattr",
    "fchownat": "chown",
    "lchown": "chown",
    "fchmodat": "chmod",
    "preadv": "preadv2",
    "pwritev": "pwritev2",
}

LASTING = frozenset(
    {"ENOSYS", "EPERM", "EOPNOTSUPP", "ENOTSUP", "EINVAL", "ENOTTY", "ENOLCK", "EIO", "EROFS", "EACCES"}
)
"""Errors that a filesystem gives once, or each time: both are tried."""

FEW = frozenset({"EIO", "EINTR", "half", "zero"})
"""Results that are tried of every single call, even where it is one of many on one file."""

ANSWERS = {
    ("stat", "ENOENT"): "means that nothing has the name: a filesystem that says so of a file cannot be found out",
    ("unlink", "ENOENT"): "means that the name is gone: a filesystem that says so of a name cannot be found out",
    ("lseek:DATA", "ENXIO"): "means that only a hole follows: a filesystem that says so of data cannot be found out",
}
"""Results that are no failures, each with the reason."""

_NOT_THERE = {"ENOSYS", "EOPNOTSUPP"}
OPTIONAL = {
    "copy_file_range": _NOT_THERE | {"EINVAL", "EPERM", "ETXTBSY", "EXDEV"},
    "fadvise64": _NOT_THERE | {"EINVAL", "ESPIPE", "EPERM"},
    "fcntl:OFD_GETLK": _NOT_THERE | {"EINVAL", "ENOLCK"},
    "fcntl:OFD_SETLK": _NOT_THERE | {"EINVAL", "ENOLCK"},
    "fcntl:SETPIPE_SZ": {"EBADF", "EBUSY", "EINVAL", "EPERM", "ENOSYS"},
    "ioctl:BTRFS_FS_INFO": _NOT_THERE | {"EINVAL", "ENOTTY", "EPERM"},
    "ioctl:FIEMAP": _NOT_THERE | {"EINVAL", "ENOTTY", "EPERM", "EBADR"},
    "ioctl:GETFLAGS": _NOT_THERE | {"EINVAL", "ENOTTY", "EPERM", "EACCES"},
    "ioctl:GETFSUUID": _NOT_THERE | {"EINVAL", "ENOTTY", "EPERM"},
    "ioctl:RESVSP": _NOT_THERE | {"EINVAL", "ENOTTY", "EPERM"},
    "lseek:DATA": _NOT_THERE | {"EINVAL"},
    "lseek:HOLE": _NOT_THERE | {"EINVAL"},
    "sendfile": _NOT_THERE | {"EINVAL", "EPERM", "EOVERFLOW"},
}
"""Calls that are a help where they are, and the answers that say that they are not: nothing may be refused for that."""


def number(name: str) -> int:
    """Returns the number of an errno."""
    value: int = getattr(errno, name)
    return value
