"""One file becoming another in place: forward or back as a whole, from wherever it is stopped.

    journal durable -> file out of the way -> new bytes written, durable -> verified -> COMMIT, durable
    -> dead space freed, durable -> names, durable -> no journal

Before the commit everything can be taken back, after it everything can be finished; both may be stopped and done again.
While the file is neither one nor the other it has a working name, so nobody opens it by the name that it had or will
have. What must not overtake something else is kept apart by making that durable: no order is asked of the filesystem.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from vmconv.errors import BackendError, PlanError, os_errors
from vmconv.inplace import ownership, shifting, undofile
from vmconv.inplace.calls import Calls
from vmconv.inplace.journal import MAX_SIZE, Journal, Leftover, commit_record
from vmconv.inplace.names import JOURNAL, WORKING, refuse_interrupted

_PIECE = 4 << 20


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps signals waiting that would end the run between two steps, which would then have to be recovered."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Change:
    """A change of the file `journal.source` of a directory. `descriptor` is the file, open for writing."""

    def __init__(self, directory: str, journal: Journal, calls: Calls, descriptor: int) -> None:
        self.directory = directory
        self.journal = journal
        self.calls = calls
        self.descriptor = descriptor
        self.record = -1
        """Descriptor of the journal; it is locked as long as this run lives."""
        self.committed = False

    @property
    def source(self) -> str:
        """The path that the file had."""
        return self._path(self.journal.source)

    @property
    def target(self) -> str:
        """The path that the file gets."""
        return self._path(self.journal.target)

    @property
    def working(self) -> str:
        """The path of the file while it is changed."""
        return self.source + WORKING

    def beside(self, name: str) -> str:
        """The path of one of `journal.made` until it gets its name."""
        return self._path(name + WORKING)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    # -- before the commit

    def begin(self) -> None:
        """Makes the journal durable, and then moves the file out of the way; only then may anything be written."""
        refuse_interrupted(self.source)
        encoded = self._encoded()
        if len(encoded) > MAX_SIZE:
            raise PlanError(f"{self.source}: {len(encoded)} bytes would be written over, {MAX_SIZE} at most in place")
        self.record = self.calls.create(self.source + JOURNAL)
        fcntl.flock(self.record, fcntl.LOCK_EX)
        if not os.fstat(self.record).st_nlink:
            # Between the two, somebody took it for the journal of a dead run.
            self.close()
            raise BackendError(f"{self.source}: was being recovered by another process", hint="try again")
        self.calls.write(self.record, encoded, 0)
        self.calls.sync(self.record)
        self.calls.sync_directory(self.directory)
        if self.journal.carried:
            self.calls.rename(self.source, self.working, replace=False)
            self.calls.sync_directory(self.directory)

    def _encoded(self) -> bytes:
        return self.journal.encode(lambda digest: ownership.mark(self.directory, digest))

    def make(self, name: str, mode: int) -> int:
        """Returns a new file, open for writing, that gets its name with the target; it is one of `journal.made`."""
        return self.calls.create(self.beside(name), mode)

    def complete(self) -> None:
        """Commits, when all that was written is durable, and does what is left to be done."""
        with _undisturbed():
            with os_errors("cannot be committed", where=self.target):
                if self.journal.made:
                    self.calls.sync_directory(self.directory)
                encoded = self._encoded()
                self.calls.write(self.record, commit_record(encoded), len(encoded))
                self.calls.sync(self.record)
            self.committed = True
            try:
                self.finish()
            except OSError as exc:
                raise BackendError(
                    f"{self.target}: is not finished: {exc.strerror}", hint=f"vmconv recover {self.source}"
                ) from exc

    def give_up(self) -> None:
        """Takes everything back, unless it is committed or was never begun."""
        try:
            if self.record >= 0 and not self.committed:
                with _undisturbed():
                    self.roll_back()
        finally:
            self.close()

    # -- forward

    def finish(self) -> None:
        """Does what is left to be done after the commit."""
        if self.journal.carried:
            self._finish_file()
        for name in self.journal.made:
            self._name(self.beside(name), self._path(name))
        if self.journal.carried:
            self._name(self.working, self.target)
        for leftover in self.journal.leftovers:
            self._remove(leftover)
        self.calls.sync_directory(self.directory)
        self._forget()

    def _finish_file(self) -> None:
        if os.path.lexists(self.working):
            self._free()
            if self.journal.undo:
                self._tell_undo(self.journal.undo)
        elif not os.path.lexists(self.target):
            raise self._lost(self.working)

    def _free(self) -> None:
        """Gives dead space back, and makes that durable while nobody else can find the file."""
        if len(self.journal.pieces):
            shifting.shift(self.descriptor, self.journal.pieces, self.calls)
        self.calls.truncate(self.descriptor, self.journal.new_size)
        at = 0
        for offset, length in self.journal.later.tolist():
            self.calls.write(self.descriptor, self.journal.new[at : at + length], offset)
            at += length
        for offset, length in self.journal.dead.tolist():
            self.calls.punch(self.descriptor, offset, length)
        if self.journal.mtime is not None:
            self.calls.set_times(self.descriptor, self.journal.mtime)
        self.calls.sync(self.descriptor)

    def _tell_undo(self, name: str) -> None:
        """Writes into the undo file what the result looks like, so that a later change of it is noticed."""
        path = self.beside(name)
        path = path if os.path.lexists(path) else self._path(name)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            stamp = undofile.Stamp.of(self.descriptor, undofile.read(path).metadata)
            self.calls.write(descriptor, stamp.encode(), undofile.STAMP_OFFSET)
            self.calls.sync(descriptor)
        finally:
            os.close(descriptor)

    def _name(self, old: str, new: str) -> None:
        """Gives a file its final name, unless it has it already."""
        if not os.path.lexists(old):
            return
        try:
            self.calls.rename(old, new, replace=self.journal.replace)
        except FileExistsError as exc:
            raise BackendError(
                f"{new}: appeared meanwhile", hint=f"move it away, then vmconv recover {self.source}"
            ) from exc

    def _remove(self, leftover: Leftover) -> None:
        path = self._path(leftover.name)
        if os.path.lexists(path) and Leftover.of(path) == leftover:
            self.calls.unlink(path)

    # -- back

    def roll_back(self) -> None:
        """Makes the file what it was, under its old name."""
        if self.journal.carried:
            self._roll_back_file()
        for name in self.journal.made:
            path = self.beside(name)
            if os.path.lexists(path):
                self.calls.unlink(path)
        self.calls.sync_directory(self.directory)
        self._forget()

    def _roll_back_file(self) -> None:
        if os.path.lexists(self.working):
            self._restore()
            self._back_to_its_name()
        elif not self._is_untouched():
            raise self._lost(self.source)

    def _restore(self) -> None:
        at = 0
        for offset, length in self.journal.saved.tolist():
            self.calls.write(self.descriptor, self.journal.old[at : at + length], offset)
            at += length
        for offset, length in self.journal.holes.tolist():
            self.calls.punch(self.descriptor, offset, length)
        self.calls.truncate(self.descriptor, self.journal.old_size)
        self.calls.set_times(self.descriptor, self.journal.old_mtime)
        self.calls.sync(self.descriptor)

    def _back_to_its_name(self) -> None:
        try:
            self.calls.rename(self.working, self.source, replace=False)
        except FileExistsError as exc:
            raise BackendError(
                f"{self.source}: appeared meanwhile", hint=f"move it away, then vmconv recover {self.working}"
            ) from exc

    def _is_untouched(self) -> bool:
        """True when the file was never moved out of the way, or is back, and is as it was: nothing was done to it."""
        if not os.path.lexists(self.source):
            return False
        status = os.stat(self.source)
        return (status.st_size, status.st_mtime_ns) == (self.journal.old_size, self.journal.old_mtime)

    # -- the end

    def _lost(self, path: str) -> BackendError:
        return BackendError(
            f"{path}: is not what the interrupted conversion left behind",
            hint=f"give the file its working name again, {self.working}; "
            f"or, if it is good as it is, remove {self.source + JOURNAL}",
        )

    def _forget(self) -> None:
        if os.path.lexists(self.source + JOURNAL):
            self.calls.unlink(self.source + JOURNAL)
            self.calls.sync_directory(self.directory)
        self.close()

    def close(self) -> None:
        """Gives up the journal's lock, whatever has become of the change."""
        if self.record >= 0:
            os.close(self.record)
            self.record = -1
