"""The place of a target: its directory is opened once, and checked before any work."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vmconv.backends.temporary import PREFIX, remove_stale
from vmconv.errors import AccessError, PlanError, os_errors, warn
from vmconv.io import locks
from vmconv.io.directory import Directory
from vmconv.model.sources import File, inside
from vmconv.system import linux

_MAX_LINKS = 40
"""Symbolic links in one path: the kernel's limit."""

_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
_CAP_FOWNER = 3


def locate(path: str) -> tuple[Directory, str]:
    """Returns the directory of this path, open, and the file's name there, links followed; the file need not exist.

    Applies the kernel's rule for symbolic links (fs.protected_symlinks) to each link of the path, even if the kernel
    does not: in a sticky world-writable directory, the link must be the user's or the directory owner's. In addition,
    a link of another user, except root, may lead only to a directory of that user, because it decides where this user
    writes. Raises `AccessError` for any other link, `OSError` if the directory does not exist.
    """
    with _whole_path_in_errors(path):
        return _walk(path)


def _walk(path: str) -> tuple[Directory, str]:
    # A stack of components. The target of a link is pushed onto it.
    waiting = path.split("/")[::-1]
    links = 0
    strangers: dict[int, str] = {}
    at = _enter("/" if path.startswith("/") else ".")
    try:
        while True:
            part = waiting.pop()
            if part in ("", ".") and waiting:
                continue
            last = not any(each not in ("", ".") for each in waiting)
            status = _status(at, part, missing=last)
            if status and stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                _refuse_strangers_link(at, part, status, path)
                if status.st_uid not in (0, os.geteuid()):
                    strangers[status.st_uid] = part
                leads = os.readlink(part, dir_fd=at)
                waiting += leads.split("/")[::-1]
                if leads.startswith("/"):
                    at = _enter("/", leave=at)
            elif last:
                _refuse_led_away(at, strangers, path)
                return _directory(at), part
            else:
                at = _enter(part, at, leave=at)
    finally:
        os.close(at)


def refuse_outside(directory: Directory, trees: Sequence[str]) -> None:
    """Raises `AccessError` if the open directory is not in one of the trees, which exist."""
    real = directory.real()
    if not any(inside(real, os.path.realpath(tree)) for tree in trees):
        raise AccessError(f"{directory.path}: lies outside of the allowed directories, at {real}")


def open_directory(path: str) -> Directory:
    """Returns the directory of this path, under the rules of `located`."""
    above, name = locate(path)
    with above, _whole_path_in_errors(path):
        directory = _directory(above.descriptor) if name in ("", ".") else None
        if directory is None:
            at = _enter(name, above.descriptor)
            try:
                directory = _directory(at)
            finally:
                os.close(at)
    directory.path = path
    return directory


@contextmanager
def _whole_path_in_errors(path: str) -> Iterator[None]:
    """Sets the whole path in errors of the block, because the walk opens one component at a time."""
    try:
        yield
    except OSError as exc:
        exc.filename = path
        raise


def _enter(path: str, start: int | None = None, *, leave: int = -1) -> int:
    """Returns a descriptor of a directory, and closes the descriptor `leave`."""
    # O_PATH: directories on the way need search permission only, not read.
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=start)
    if leave >= 0:
        os.close(leave)
    return descriptor


def _status(directory: int, name: str, *, missing: bool) -> os.stat_result | None:
    """Returns the status of a name, links not followed; None if it does not exist and may be `missing`."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        if missing:
            return None
        raise


def _directory(descriptor: int) -> Directory:
    """Returns an open directory with its path from the kernel."""
    directory = Directory.at(".", descriptor)
    directory.path = directory.real()
    return directory


def _refuse_strangers_link(directory: int, name: str, link: os.stat_result, path: str) -> None:
    place = os.fstat(directory)
    shared = place.st_mode & stat.S_ISVTX and place.st_mode & stat.S_IWOTH
    if shared and link.st_uid not in (os.geteuid(), place.st_uid):
        raise AccessError(
            f"{path}: {name} is a symbolic link of user {link.st_uid} in a world-writable directory",
            hint="name the file that it leads to",
        )


def _refuse_led_away(directory: int, strangers: dict[int, str], path: str) -> None:
    """Raises `AccessError` if a link of another user led to a directory that is not that user's."""
    owner = os.fstat(directory).st_uid
    for user, name in strangers.items():
        if user != owner:
            raise AccessError(
                f"{path}: {name} is a symbolic link of user {user}, and leads to a directory of user {owner}",
                hint="name the file that it leads to",
            )


# -- what is refused


@contextmanager
def claim_for_replacement(directory: Directory, name: str) -> Iterator[None]:
    """Locks the file `name`, which will be replaced, against other processes during the block.

    Raises `AccessError` if another process uses it, `PlanError` if it cannot be replaced.
    """
    path = directory.join(name)
    with os_errors("cannot be replaced", PlanError, where=path):
        descriptor = directory.open(name)
        try:
            _refuse_mount(directory, descriptor, path)
            _refuse_flags(descriptor, path)
            _refuse_sticky(directory, descriptor, path)
            _refuse_in_use(descriptor, path)
            yield
        finally:
            os.close(descriptor)


def _refuse_mount(directory: Directory, descriptor: int, path: str) -> None:
    if _mount(descriptor) != _mount(directory.descriptor):
        raise PlanError(f"{path}: is a mount point, and cannot be replaced", hint="unmount it, or name another target")


def _mount(descriptor: int) -> bytes:
    """Returns the line with the mount ID of a descriptor, empty without /proc."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
            return next((line for line in file if line.startswith(b"mnt_id:")), b"")
    except OSError:
        return b""


def _refuse_flags(descriptor: int, path: str) -> None:
    flags = _flags(descriptor)
    for flag, word in ((_IMMUTABLE, "immutable (chattr +i)"), (_APPEND_ONLY, "append-only (chattr +a)")):
        if flags & flag:
            raise PlanError(
                f"{path}: is {word}, and cannot be replaced", hint="remove the flag, or name another target"
            )


def _flags(descriptor: int) -> int:
    try:
        return linux.inode_flags(descriptor)
    except OSError:
        # The filesystem has no flags, or hides them from this user. Then a rename fails later.
        return 0


def _refuse_sticky(directory: Directory, descriptor: int, path: str) -> None:
    place, status = os.fstat(directory.descriptor), os.fstat(descriptor)
    own = os.geteuid() in (place.st_uid, status.st_uid)
    if place.st_mode & stat.S_ISVTX and not own and not _has_capability(_CAP_FOWNER):
        raise PlanError(
            f"{path}: belongs to user {status.st_uid}, and its directory is sticky: only the owner may replace it"
        )


def _has_capability(number: int) -> bool:
    try:
        with open("/proc/self/status", "rb") as file:
            found = next((line for line in file if line.startswith(b"CapEff:")), b"")
    except OSError:
        return os.geteuid() == 0
    return bool(int(found.split()[-1], 16) >> number & 1) if found else os.geteuid() == 0


def _refuse_in_use(descriptor: int, path: str) -> None:
    locks.refuse_users(File(path, descriptor), hint="close it there; an image in use is not replaced, even with -U")
    own = os.fstat(descriptor)
    for user in (_loop_device(own), _swap(own)):
        if user:
            raise AccessError(f"{path}: is in use as {user}", hint="an image in use is not replaced")
    locks.claim(descriptor)


def _loop_device(status: os.stat_result) -> str | None:
    """Returns the loop device of a file. Locks miss read-only devices, and any device if this user gets no lease."""
    try:
        with os.scandir("/sys/block") as entries:
            loops = [entry.name for entry in entries if entry.name.startswith("loop")]
    except OSError:
        return None
    return next(
        (f"/dev/{loop}" for loop in loops if _leads_to(_text(f"/sys/block/{loop}/loop/backing_file"), status)), None
    )


def _swap(status: os.stat_result) -> str | None:
    """Returns "swap" if the file is swap space, whose replacement would fail only at the end."""
    areas = _text("/proc/swaps").splitlines()[1:]
    return "swap" if any(_leads_to(area.split(" ")[0].replace("\\040", " "), status) for area in areas) else None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _leads_to(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path.rstrip("\n")), status)
    except OSError:
        return False


def refuse_directory(directory: Directory) -> None:
    """Raises `PlanError` if no file can be created in the directory."""
    if _flags(directory.descriptor) & _IMMUTABLE:
        raise PlanError(f"{directory.path}: is immutable (chattr +i), no file can be created in it")


def refuse_kept_names(directory: Directory) -> None:
    """Raises `PlanError` if files can be created and not renamed; a single new image needs no rename."""
    if _flags(directory.descriptor) & _APPEND_ONLY:
        raise PlanError(
            f"{directory.path}: is append-only (chattr +a), names in it cannot be changed",
            hint="make a single new image in it, or choose another directory",
        )


# -- leftovers of interrupted runs


def clean(directory: Directory, names: Sequence[str]) -> None:
    """Completes what an interrupted run of the same targets had committed, and removes its other files."""
    if not any(name.startswith(PREFIX) for name in directory.listed()):
        return
    from vmconv.backends import naming

    for name in naming.finish(directory, names):
        warn(f"{directory.join(name)}: its interrupted conversion has been completed")
    remove_stale(directory, names, naming.needed(directory))


def finish_set(path: str, *, trust: bool) -> bool:
    """Completes the set of images with this one, if an interrupted run committed it; returns False for any other.

    With `trust` also if its journal lacks this user's mark.
    """
    place, name = os.path.split(os.path.abspath(path))
    try:
        directory = Directory.at(place)
    except OSError:
        return False
    with directory:
        if not any(each.startswith(PREFIX) for each in directory.listed()):
            return False
        from vmconv.backends import naming

        return bool(naming.finish(directory, [name], trust=trust))
