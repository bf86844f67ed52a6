"""The tree as a filesystem, by libfuse 3 through mfusepy.

The kernel does not cache reads (direct_io): its page cache holds only the source's file, and each read checks that the
source is unchanged.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from vmconv.plugin import BackendError, VmconvError, printable
from vmconv_view.rights import OWN, Rights, rights_of
from vmconv_view.tree import Held, Node

# mfusepy would prefer libfuse 2 if that is installed too.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
try:
    import mfusepy
except (OSError, AttributeError) as exc:
    raise BackendError(f"libfuse 3 cannot be used: {exc}", hint="apt-get install fuse3") from exc

if TYPE_CHECKING:
    from vmconv.api import View

IDLE_THREADS = 4
MAX_THREADS = 16
"""Enough to serve other images while some threads wait for a slow one."""

MAX_SAID = 1000
_ENDED_BY_SIGNAL = 8
"""libfuse's return value after SIGINT or SIGTERM ended its loop and it has unmounted."""


class Shelf(Protocol):
    """What a mount shows: `Tree`, or a single disk."""

    def node(self, path: str, rights: Rights = OWN, /) -> Node:
        """Returns the node at a path, relative to the root."""

    def open(self, path: str, rights: Rights = OWN, /) -> Held:
        """Opens a file."""


class Filesystem(mfusepy.Operations):  # type: ignore[misc]
    """The operations for libfuse; `ready` is called after mounting.

    With `others`, each request is answered with the rights of the requesting process.
    """

    use_ns = True

    def __init__(self, tree: Shelf, ready: Callable[[], None], *, others: bool) -> None:
        self.held: dict[int, Held] = {}
        self._tree = tree
        self._ready = ready
        self._others = others
        # Not from 0, which `getattr` takes for no handle.
        self._numbers = count(1)
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def init_with_config(self, conn_info: Any, config_3: Any) -> None:
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        with self.errors():
            return _attributes(self.held[fh].node if fh else self._tree.node(path.strip("/"), self._rights()))

    def readdir(self, path: str, fh: int) -> list[str | tuple[str, dict[str, int], int]]:
        with self.errors():
            node = self._tree.node(path.strip("/"), self._rights())
            # The type of a file, so that programs such as find do not ask for its attributes, which plans it.
            names = [(name, {"st_mode": stat.S_IFREG}, 0) if node.has_files else name for name in node.names()]
            return [".", "..", *names]

    def open(self, path: str, flags: int) -> int:
        with self.errors():
            held = self._tree.open(path.strip("/"), self._rights())
        with self._lock:
            number = next(self._numbers)
            self.held[number] = held
        return number

    def release(self, path: str, fh: int) -> int:
        with self._lock:
            held = self.held.pop(fh)
        held.release()
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        with self.errors():
            view = self.held[fh].view
            return view.read(offset, max(0, min(size, view.size - offset)))

    def lseek(self, path: str, offset: int, whence: int, fh: int) -> int:
        """Returns the offset of the next data or hole, as lseek for SEEK_DATA and SEEK_HOLE."""
        with self.errors():
            return _seek(self.held[fh].view, offset, data=whence == os.SEEK_DATA)

    def _rights(self) -> Rights:
        return rights_of(*mfusepy.fuse_get_context()) if self._others else OWN

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns vmconv's errors, and defects, into EIO, and prints each once on standard error."""
        try:
            yield
        except OSError:
            raise
        except VmconvError as exc:
            self._say(str(exc))
            raise mfusepy.FuseOSError(errno.EIO) from exc
        except Exception as exc:
            self._say(printable(f"defect of vmconv or of a plugin: {type(exc).__name__}: {exc}"))
            raise mfusepy.FuseOSError(errno.EIO) from exc

    def _say(self, text: str) -> None:
        with self._lock:
            if text in self._said or len(self._said) >= MAX_SAID:
                return
            self._said.add(text)
        with suppress(OSError, ValueError):
            print(f"vmconv: {text}", file=sys.stderr, flush=True)


class _Session(mfusepy.FUSE):  # type: ignore[misc]
    """Reads into libfuse's buffer, because returning `bytes` would copy payload twice."""

    _thread = threading.local()

    def read(self, path: Any, buf: Any, size: int, offset: int, fip: Any) -> int:
        self._keep_thread()
        filesystem: Filesystem = self.operations
        with filesystem.errors():
            view = filesystem.held[fip.contents.fh].view
            length = max(0, min(size, view.size - offset))
            address = ctypes.cast(buf, ctypes.c_void_p).value
            if length and address:
                view.read_into(offset, memoryview((ctypes.c_char * length).from_address(address)).cast("B"))
            return length

    def lseek(self, path: Any, offset: int, whence: int, fip: Any) -> int:
        found: int = self.operations.lseek("", offset, whence, fip.contents.fh)
        return found

    def _keep_thread(self) -> None:
        """Keeps Python's state of a libfuse thread, which ctypes would otherwise create again for each call.

        Measured without it: 1.4 instead of 2.1 GB/s in reads of 128 KiB.
        """
        if not hasattr(self._thread, "known"):
            self._thread.known = True
            ctypes.pythonapi.PyGILState_Ensure()


def mount(
    tree: Shelf,
    point: str,
    ready: Callable[[], None],
    *,
    allow_other: bool,
    operations: type[Filesystem] = Filesystem,
    read_only: bool = True,
) -> None:
    """Mounts the tree and returns when it is unmounted: by fusermount -u, by umount, by SIGINT or SIGTERM."""
    mounted = threading.Event()

    def note_ready() -> None:
        mounted.set()
        ready()

    options: dict[str, Any] = {}
    if allow_other:
        # Answers differ per user, so the kernel must not cache them.
        options |= {"allow_other": True, "attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    # libfuse 3.14 warns about its own default.
    options["max_idle_threads"] = IDLE_THREADS
    if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= (3, 12):
        options["max_threads"] = MAX_THREADS
    try:
        _Session(
            operations(tree, note_ready, others=allow_other),
            point,
            foreground=True,
            ro=read_only,
            direct_io=True,
            default_permissions=True,
            fsname="vmconv",
            subtype="vmconv",
            **options,
        )
    except RuntimeError as exc:
        if not mounted.is_set() or exc.args != (_ENDED_BY_SIGNAL,):
            raise BackendError(
                f"{point}: cannot be mounted: libfuse returned {exc}",
                hint="its own message is above; without root, mounting needs fusermount3 (apt-get install fuse3)",
            ) from exc


def _attributes(node: Node) -> dict[str, int]:
    status = node.status
    # The common permissions of all files of the image, without write.
    mode = node.mode & 0o444
    found = {
        "st_uid": status.st_uid,
        "st_gid": status.st_gid,
        "st_mtime": status.st_mtime_ns,
        "st_ctime": status.st_ctime_ns,
        "st_atime": status.st_mtime_ns,
    }
    if stat.S_ISDIR(status.st_mode) or stat.S_ISDIR(node.mode):
        return {**found, "st_mode": stat.S_IFDIR | node.mode & 0o555, "st_nlink": 2}
    # A directory needs search permission (1) where its files have read permission (4).
    if node.view is None:
        return {**found, "st_mode": stat.S_IFDIR | mode | mode >> 2, "st_nlink": 2}
    return {
        **found,
        "st_mode": stat.S_IFREG | (node.mode & 0o666 if node.is_writable else mode),
        "st_nlink": 1,
        "st_size": node.view.size,
        "st_blocks": -(-node.view.data_size // 512),
    }


def _seek(view: View, offset: int, *, data: bool) -> int:
    if not 0 <= offset < view.size:
        raise mfusepy.FuseOSError(errno.ENXIO)
    at = offset
    for length, is_data in view.spans(offset, view.size - offset):
        if is_data == data:
            return at
        at += length
    if data:
        raise mfusepy.FuseOSError(errno.ENXIO)
    return view.size
