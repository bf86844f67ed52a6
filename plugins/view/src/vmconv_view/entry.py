"""One image of a mounted directory: read on first access, and planned per variant on first access to that."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from vmconv.api import View, locks, new_name, stamp_of, views, volumes
from vmconv.plugin import (
    Blob,
    Extents,
    File,
    Format,
    FormatKind,
    Image,
    Opener,
    ReadError,
    RemoteFile,
    VmconvError,
    printable,
)
from vmconv_view.images import Images
from vmconv_view.rights import Rights
from vmconv_view.variants import Partitions, Shown

ERRORS = "vmconv-errors.txt"
"""The file with the reason, shown in place of an unreadable image."""

_RETRY_AFTER = 2.0
_COST_OF_A_FILE = 20_000

Files = Mapping[str, View]


class Entry:
    """An image, opened with a user's rights, and its planned views. Thread-safe.

    Unless it is held (`hold`), other processes may open the image for writing. Then its views are planned again.
    """

    def __init__(self, name: str, status: os.stat_result, opener: Opener, rights: Rights, *, force_share: bool) -> None:
        self.name = name
        self.status = status
        self.mode = stat.S_IMODE(status.st_mode)
        self.rights = rights
        self._opener = opener
        self._force_share = force_share
        self._image: Image | None = None
        self.error: Exception | None = None
        self._failure: Files | None = None
        self._until = 0.0
        self._plans: OrderedDict[str, Files] = OrderedDict()
        self._holders = 0
        self._planning = 0
        self._retired = False
        self._lock = threading.Lock()
        self._one_plan = threading.Lock()

    def read(self, images: Images, format_name: str | None = None) -> None:
        """Reads the image's header. Turns errors into a file, and keeps them as `error`."""
        try:
            image = self._opener.image(images.path(self.name), format_name)
            images.refuse_outside(image)
            self._opened()
            self._image = image
        except Exception as exc:
            self.error = exc
            self._failure = self._explain("", exc)
            self._until = time.monotonic() + _RETRY_AFTER
        # The opener has locked the files. Locks are held only while a view is open.
        self._unlock()

    def _opened(self) -> None:
        """Raises `AccessError` if a file may not be shown, and reduces the mode to the bits common to all files."""
        self.rights.refuse_files(self._opener.files)
        for file in self._local_files():
            self.mode &= os.fstat(file.descriptor).st_mode

    def _local_files(self) -> list[File]:
        return [file for file in self._opener.files if not file.is_remote]

    def _explain(self, what: str, exc: Exception) -> Files:
        if self.rights.explains:
            return _failure(what, exc)
        return text_file(f"{self.name}: {what}not shown, unless everybody may read all files of the image\n")

    def is_current(self, status: os.stat_result) -> bool:
        """True if the file, which has `status` now, is unchanged since it was read."""
        if self._failure and time.monotonic() > self._until:
            return False
        try:
            files = list(self._opener.files)
            if any(isinstance(file, RemoteFile) and file.failed for file in files):
                return False
            return stamp_of(status) == stamp_of(self.status) and self.rights.are_current(files)
        except (OSError, ReadError):
            # Another thread has retired this and closed its files, or a file was removed.
            return False

    @property
    def kind(self) -> FormatKind:
        """What the image holds; a disk if it is unreadable."""
        return self._image.kind if self._image else "disk"

    @property
    def failure(self) -> Files | None:
        """The files shown instead of an unreadable image."""
        return self._failure

    def planned(self, variant: Shown) -> Files | None:
        """Returns the files of the image in this variant by name, None if they are not planned."""
        with self._lock:
            if self._retired or variant.name not in self._plans:
                return None
            self._plans.move_to_end(variant.name)
            return self._plans[variant.name]

    def names(self, variant: Shown) -> Iterable[str]:
        """Returns the names of the files in this variant: those that are planned, else those that are expected."""
        files = self.planned(variant)
        return self.expected(variant) if files is None else files

    def expected(self, variant: Shown) -> tuple[str, ...]:
        """Returns the names that the files of this variant will have if they can be planned."""
        if isinstance(variant, Partitions):
            return ()
        size = self._image.size if self._image else 0
        return variant.format.file_names(variant.parsed(), self._target(variant.format), size)

    def _target(self, target: Format) -> str:
        return new_name(self.name, target, self._opener.registry)

    def plan(self, variant: Shown) -> Files | None:
        """Plans the files of the image in this variant and returns them by name, None if retired."""
        with self._lock:
            if self._retired or self._image is None:
                return None
            image = self._image
            self._planning += 1
        try:
            with self._one_plan:
                files = self.planned(variant)
                if files is None:
                    files = self._plan(image, variant)
            with self._lock:
                self._plans[variant.name] = files
            return files
        finally:
            with self._lock:
                self._planning -= 1
                self._close_if_unused()

    def _plan(self, image: Image, variant: Shown) -> Files:
        try:
            made = self._made(image, variant)
            # The format's writer may have opened more files of the chain.
            self._opened()
            return made
        except Exception as exc:
            return self._explain(f"{self.name} as {variant.name}: ", exc)

    def _made(self, image: Image, variant: Shown) -> Files:
        if isinstance(variant, Partitions):
            return volumes(image)
        return views(image, variant.format, variant.options, self._target(variant.format))

    def hold(self) -> bool:
        """Keeps the image's files open and locked until `release`; returns False if they are already closed.

        Raises `AccessError` if a process is writing to one of them.
        """
        with self._lock:
            if self._retired:
                return False
            if not self._holders:
                self._take_locks()
            self._holders += 1
            return True

    def _take_locks(self) -> None:
        try:
            for file in () if self._force_share else self._local_files():
                locks.share(file)
        except VmconvError:
            self._unlock()
            raise

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            self._close_if_unused()

    def retire(self) -> None:
        """Closes the image's files once it is no longer held."""
        with self._lock:
            self._retired = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._holders:
            self._unlock()
            if self._retired and not self._planning:
                self._opener.close()

    def _unlock(self) -> None:
        if not self._force_share:
            for file in self._local_files():
                locks.release(file)

    @property
    def is_held(self) -> bool:
        return self._holders > 0

    def cost(self) -> int:
        """Returns the memory cost in rows of tables; an open file counts as many."""
        rows = sum(len(view.table) for files in list(self._plans.values()) for view in files.values())
        return rows + _COST_OF_A_FILE * len(self._opener.files)

    def forget(self) -> None:
        """Drops all plans but the latest one. Open files keep their views."""
        with self._lock:
            while len(self._plans) > 1:
                self._plans.popitem(last=False)


def text_file(text: str) -> Files:
    """Returns a text as the file `ERRORS`."""
    return {ERRORS: View(Extents.whole(Blob(ERRORS, text.encode(errors="surrogateescape"))))}


def _failure(what: str, exc: Exception) -> Files:
    if not isinstance(exc, VmconvError):
        # A defect of a reader or a writer must not affect other images.
        return text_file(printable(f"{what}defect of vmconv or of a plugin: {type(exc).__name__}: {exc}") + "\n")
    hint = f"  hint: {exc.hint}\n" if exc.hint else ""
    return text_file(f"{what}{exc}\n{hint}")
