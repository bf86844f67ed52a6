"""A change behind a journal with a commit: before it is durable all is old in the end, afterwards all is new."""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod

from vmconv.errors import BackendError, VmconvError, os_errors
from vmconv.inplace.journal import commit_record
from vmconv.inplace.syscalls import Syscalls
from vmconv.io.directory import Directory
from vmconv.system import linux, signals


class Journalled(ABC):
    """A change of files of a directory; `entry` is the name of its journal.

    `record` is the descriptor of the journal, locked while it is open: the lock shows others that this run is alive.
    """

    def __init__(self, directory: Directory, calls: Syscalls, entry: str) -> None:
        self.directory = directory
        self.calls = calls
        self.entry = entry
        self.record = -1
        self.committed = False
        self._commit_record = b""
        self._commit_offset = 0
        self._in_doubt = False

    @abstractmethod
    def roll_back(self) -> None:
        """Makes all files as they were; may be repeated."""

    @abstractmethod
    def _not_rolled_back(self, exc: OSError | VmconvError) -> BackendError:
        """Returns the error for a rollback that failed."""

    def _start(self, encoded: bytes, path: str) -> None:
        """Makes the journal durable. Nothing may be changed before."""
        self._commit_record, self._commit_offset = commit_record(encoded), len(encoded)
        self.record = self.calls.create(self.directory, self.entry)
        fcntl.flock(self.record, fcntl.LOCK_EX)
        if not os.fstat(self.record).st_nlink:
            # Before it was locked, another process took it for the journal of a dead run and removed it.
            self.close()
            raise BackendError(f"{path}: was being recovered by another process", hint="try again")
        self.calls.write(self.record, encoded, 0)
        self.calls.sync(self.record)
        # The journal's name must be durable before any file is renamed.
        self.calls.sync_directory(self.directory)

    def _commit(self, path: str) -> None:
        """The moment from which on the change is completed, by this run or by another one."""
        with os_errors("cannot be committed", where=path):
            self._in_doubt = True
            try:
                self.calls.write(self.record, self._commit_record, self._commit_offset)
                self.calls.sync(self.record)
            except OSError:
                self._withdraw()
                raise
            self._in_doubt, self.committed = False, True

    def _withdraw(self) -> None:
        """Takes back a commit that may have reached storage: a rollback must not be taken for a completion."""
        self.calls.truncate(self.record, self._commit_offset)
        self.calls.sync(self.record)
        self._in_doubt = False

    def give_up(self) -> None:
        """Rolls the change back, unless it is committed or was never begun."""
        try:
            if self.record >= 0 and not self.committed:
                with signals.held():
                    self._take_back()
        finally:
            self.close()

    def _take_back(self) -> None:
        try:
            if self._in_doubt:
                self._withdraw()
            self.roll_back()
        except (OSError, VmconvError) as exc:
            raise self._not_rolled_back(exc) from exc

    def _remove_journal(self) -> None:
        if self.directory.has(self.entry):
            self.calls.unlink(self.directory, self.entry)
            self.calls.sync_directory(self.directory)
        self.close()

    def close(self) -> None:
        """Releases the journal's lock."""
        if self.record >= 0:
            linux.close(self.record)
            self.record = -1
