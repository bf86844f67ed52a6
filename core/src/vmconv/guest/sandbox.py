"""Takes all rights from a process that has one open socket: afterwards it can compute, and talk through the socket."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import tempfile

_CPU_SECONDS = 120
_ADDRESS_SPACE = 1 << 30

_NOBODY = 65534

# linux/prctl.h, linux/seccomp.h, linux/audit.h, linux/filter.h
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 4, 38, 22
_SECCOMP_MODE_FILTER = 2
_ALLOW, _FAIL = 0x7FFF0000, 0x00050001
"""SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with EPERM."""
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
"""Offsets in struct seccomp_data."""

_CALLS = {
    "x86_64": (
        0xC000003E,
        # read, write, close, fstat, poll, lseek, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask,
        # rt_sigreturn, sched_yield, mremap, madvise, getpid, sendto, recvfrom, exit, futex, clock_gettime, exit_group,
        # getrandom
        (0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 39, 44, 45, 60, 202, 228, 231, 318),
    ),
    "aarch64": (
        0xC00000B7,
        # The same calls, with ppoll for poll.
        (63, 64, 57, 80, 73, 62, 222, 226, 215, 214, 134, 135, 139, 124, 216, 233, 172, 206, 207, 93, 98, 113, 94, 278),
    ),
}
"""AUDIT_ARCH and the numbers of the calls that are left, for each architecture that is known."""


def confine() -> None:
    """Takes the rights; raises `OSError` if one of them cannot be taken.

    No file or socket can be opened afterwards, no process started; memory and CPU time are limited. Root becomes nobody
    in an empty directory. On x86-64 and aarch64, a filter leaves only calls for memory and for the socket.
    """
    if os.geteuid() == 0:
        _become_nobody()
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_AS, _ADDRESS_SPACE),
        # Descriptors that are open stay so. A new one, of whatever kind, would be past the limit.
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if platform.machine() in _CALLS:
        _filter(*_CALLS[platform.machine()])


def _become_nobody() -> None:
    empty = tempfile.mkdtemp()
    above = os.open(os.path.dirname(empty), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chroot(empty)
        os.chdir("/")
    finally:
        # A removed directory stays empty: nothing can be made in it.
        os.rmdir(os.path.basename(empty), dir_fd=above)
        os.close(above)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _filter(architecture: int, calls: tuple[int, ...]) -> None:
    """Installs a filter: of this architecture's calls, those of `calls` are allowed, all others fail."""
    count = len(calls)
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 0, count + 1, architecture), (_LOAD, 0, 0, _NUMBER)]
    # A match jumps over the further comparisons and over the failure.
    program += [(_EQUAL, count - position, 0, call) for position, call in enumerate(calls)]
    program += [(_RETURN, 0, 0, _FAIL), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0)[:4]]
    if libc.prctl(option, *given):
        raise OSError(ctypes.get_errno(), f"prctl {option}")
