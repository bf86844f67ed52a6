"""A change of one file in place: rolled forward or back as a whole, wherever it is interrupted.

    journal durable -> working name -> new bytes written, durable -> verified -> COMMIT, durable
    -> dead space freed, durable -> confirmed -> final names, durable -> journal removed

Before the commit a change is rolled back, after it a change is completed. Both may be interrupted and repeated. In
between the file has a working name, so that nothing opens it under its old or new name. Each step is synced before the
next one: no write order is assumed of the filesystem.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from vmconv.errors import BackendError, PlanError, VerifyError, VmconvError, os_errors
from vmconv.inplace import moves as shifting
from vmconv.inplace import undofile
from vmconv.inplace.journal import MAX_SIZE, Journal, Leftover, parse
from vmconv.inplace.journalled import Journalled
from vmconv.inplace.names import JOURNAL, WORKING, beside
from vmconv.inplace.syscalls import Syscalls
from vmconv.io import ownership
from vmconv.io.directory import Directory
from vmconv.system import linux, signals


class Change(Journalled):
    """A change of the file `journal.source` of a directory. `descriptor` is the file, open for writing.

    Names are names in the directory, without slashes; `entry` is the journal's.
    """

    def __init__(self, directory: Directory, journal: Journal, calls: Syscalls, descriptor: int) -> None:
        super().__init__(directory, calls, beside(journal.source, JOURNAL))
        self.journal = journal
        self.descriptor = descriptor
        self.working = beside(journal.source, WORKING)
        """The file's name during the change."""
        self.confirm: Callable[[], None] | None = None
        """Raises `VmconvError` unless the file holds what it should once all is written; of this run only."""

    @property
    def source(self) -> str:
        """The file's old path, for messages."""
        return self.directory.join(self.journal.source)

    @property
    def target(self) -> str:
        """The file's new path, for messages."""
        return self.directory.join(self.journal.target)

    def beside(self, name: str) -> str:
        """The working name of one of `journal.made`."""
        return beside(name, WORKING)

    # -- before the commit

    def begin(self) -> None:
        """Syncs the journal, then gives the file its working name. Nothing may be written to the file before."""
        encoded = self.journal.encode(lambda digest: ownership.mark(self.directory, digest))
        if len(encoded) > MAX_SIZE:
            raise PlanError(f"{self.source}: {len(encoded)} bytes would be overwritten, {MAX_SIZE} at most in place")
        # A journal that cannot be read back must fail now, not during recovery.
        parse(encoded, self.source)
        with signals.held():
            self._refuse_leftovers()
            self._start(encoded, self.source)
            if self.journal.carried:
                self.calls.rename(self.directory, self.journal.source, self.working, replace=False)
                self.calls.sync_directory(self.directory)

    def _refuse_leftovers(self) -> None:
        """Raises `PlanError` if one of the working names exists."""
        for name in (self.entry, self.working, *map(self.beside, self.journal.made)):
            if self.directory.has(name):
                raise PlanError(
                    f"{self.directory.join(name)}: is in the way of a change in place",
                    hint=f"if a change was interrupted: vmconv recover {self.source}; else move it away",
                )

    def make(self, name: str) -> int:
        """Creates one of `journal.made`, mode 0600; the commit renames it to its final name. Returns its descriptor."""
        return self.calls.create(self.directory, self.beside(name))

    def complete(self) -> None:
        """Commits and finishes the change. The caller has synced all that was written."""
        with signals.held():
            if self.journal.made:
                # The commit promises the new files, so their names must be durable.
                with os_errors("cannot be committed", where=self.target):
                    self.calls.sync_directory(self.directory)
            self._commit(self.target)
            try:
                self.finish()
            except OSError as exc:
                raise BackendError(
                    f"{self.target}: the change is committed and not complete: {_where(exc)}{exc.strerror}; "
                    f"{self._whereabouts()}",
                    hint=f"vmconv recover {self.target}",
                ) from exc

    def _not_rolled_back(self, exc: OSError | VmconvError) -> BackendError:
        why = f"{_where(exc)}{exc.strerror}" if isinstance(exc, OSError) else str(exc)
        return BackendError(
            f"{self.source}: cannot be rolled back: {why}; {self._whereabouts()}",
            hint=f"vmconv recover {self.source}",
        )

    def _whereabouts(self) -> str:
        """Returns the disk's current name, as the end of a message."""
        names = [self.journal.source]
        if self.journal.carried:
            names = [self.working, self.journal.target] if self.committed else [self.working, *names]
        for name in names:
            try:
                if self.directory.has(name):
                    return f"the disk is {self.directory.join(name)} now"
            except OSError:
                continue
        return f"{' and '.join(map(self.directory.join, names))} cannot be examined"

    # -- forward

    def finish(self) -> None:
        """Completes a committed change; may be repeated."""
        if self.journal.carried:
            self._finish_file()
        # The target must not appear before the files that it refers to.
        for name in self.journal.made:
            self._rename(self.beside(name), name)
        if self.journal.carried:
            self._rename(self.working, self.journal.target)
        for leftover in self.journal.leftovers:
            self._remove(leftover)
        self.calls.sync_directory(self.directory)
        self._remove_journal()

    def _finish_file(self) -> None:
        if self.directory.has(self.working):
            self._free()
            if self.confirm:
                self._confirm(self.confirm)
            if self.journal.undo:
                self._stamp_undo(self.journal.undo)
        elif not self.directory.has(self.journal.target):
            raise self._lost(self.working)

    def _confirm(self, confirm: Callable[[], None]) -> None:
        try:
            confirm()
        except VmconvError as exc:
            raise VerifyError(
                f"{exc}; the change is committed, and {self._whereabouts()}",
                hint=f"this is a defect of vmconv or of the storage, please report it; vmconv recover {self.target} "
                "writes the change again, and gives the file its name",
            ) from exc

    def _free(self) -> None:
        """Frees dead space and syncs, while the file still has its working name."""
        if len(self.journal.pieces):
            shifting.shift(self.descriptor, self.journal.pieces, self.calls)
        self.calls.truncate(self.descriptor, self.journal.new_size)
        at = 0
        for offset, length in self.journal.later.tolist():
            self.calls.write(self.descriptor, self.journal.new[at : at + length], offset)
            at += length
        for offset, length in self.journal.dead.tolist():
            self.calls.punch(self.descriptor, offset, length)
        # Last, because each write changes the mtime.
        if self.journal.mtime is not None:
            self.calls.set_times(self.descriptor, self.journal.mtime)
        self.calls.sync(self.descriptor)

    def _stamp_undo(self, name: str) -> None:
        """Writes the stamp of the result into the undo file, so that undo notices later writes to the result."""
        # A repeated run may find the undo file under its final name.
        entry = self.beside(name)
        entry = entry if self.directory.has(entry) else name
        path = self.directory.join(entry)
        descriptor = ownership.opened(self.directory, entry, os.O_RDWR)
        try:
            head = undofile.read_head(descriptor, path)
            stamp = undofile.Stamp.of(self.descriptor, undofile.read(descriptor, path, head, name).metadata)
            self.calls.write(descriptor, stamp.encode(), undofile.STAMP_OFFSET)
            self.calls.sync(descriptor)
        finally:
            linux.close(descriptor)

    def _rename(self, old: str, new: str) -> None:
        """Renames a file to its final name, unless an earlier run did."""
        status = self.directory.status(old)
        if status is None:
            return
        self._refuse_foreign(old, status)
        try:
            self.calls.rename(self.directory, old, new, replace=self.journal.replace)
        except FileExistsError as exc:
            raise BackendError(
                f"{self.directory.join(new)}: was created during the change, which is committed; {self._whereabouts()}",
                hint=f"move it away, then vmconv recover {self.source}",
            ) from exc

    def _refuse_foreign(self, name: str, status: os.stat_result) -> None:
        """Raises `BackendError` if another process replaced the file under a working name."""
        owner = self.journal.owner
        known = stat.S_ISREG(status.st_mode) and (owner is None or status.st_uid in (owner, os.geteuid()))
        if name == self.working and self.descriptor >= 0:
            known = known and os.path.samestat(status, os.fstat(self.descriptor))
        if not known:
            raise BackendError(
                f"{self.directory.join(name)}: is not the file that vmconv made; another process replaced it",
                hint=f"find the original file, give it this name again, then vmconv recover {self.source}",
            )

    def _remove(self, leftover: Leftover) -> None:
        """Removes a file of the source, unless it was changed or belongs to another user."""
        status = self.directory.status(leftover.name)
        if status is None or Leftover.of(leftover.name, status) != leftover:
            return
        # Root's undo file of a user's disk belongs to root.
        if self.journal.owner is None or status.st_uid in (self.journal.owner, os.geteuid()):
            self.calls.unlink(self.directory, leftover.name)

    # -- back

    def roll_back(self) -> None:
        """Restores the file under its old name; may be repeated."""
        if self.journal.carried:
            self._roll_back_file()
        for name in self.journal.made:
            if self.directory.has(self.beside(name)):
                self.calls.unlink(self.directory, self.beside(name))
        self.calls.sync_directory(self.directory)
        self._remove_journal()

    def _roll_back_file(self) -> None:
        if self.directory.has(self.working):
            self._restore()
            self._rename_back()
        elif not self._is_untouched():
            raise self._lost(self.journal.source)

    def _restore(self) -> None:
        at = 0
        for offset, length in self.journal.saved.tolist():
            self.calls.write(self.descriptor, self.journal.old[at : at + length], offset)
            at += length
        for offset, length in self.journal.holes.tolist():
            self.calls.punch(self.descriptor, offset, length)
        self.calls.truncate(self.descriptor, self.journal.old_size)
        # The old mtime marks the file as restored: see `_is_untouched`.
        self.calls.set_times(self.descriptor, self.journal.old_mtime)
        self.calls.sync(self.descriptor)

    def _rename_back(self) -> None:
        try:
            self.calls.rename(self.directory, self.working, self.journal.source, replace=False)
        except FileExistsError as exc:
            raise BackendError(
                f"{self.source}: was created during the change",
                hint=f"move it away, then vmconv recover {self.directory.join(self.working)}",
            ) from exc

    def _is_untouched(self) -> bool:
        """True if the file has its old name, size and mtime: never renamed, or already restored."""
        status = self.directory.status(self.journal.source)
        if status is None:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.journal.old_size, self.journal.old_mtime)

    # -- the end

    def _lost(self, name: str) -> BackendError:
        return BackendError(
            f"{self.directory.join(name)}: is not the file of the interrupted change",
            hint=f"give the file its working name again, {self.directory.join(self.working)}; "
            f"or, if it is good as it is, remove {self.directory.join(self.entry)}",
        )


def _where(exc: OSError) -> str:
    name = exc.filename2 or exc.filename
    return f"{name}: " if isinstance(name, str) else ""
