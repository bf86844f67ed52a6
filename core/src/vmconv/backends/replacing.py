"""Sharing blocks with a source that goes when the target is there: in place, for filesystems that can share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmconv.backends.reflink import ReflinkBackend, ReflinkTransaction
from vmconv.backends.temporary import already_exists
from vmconv.directory import Directory
from vmconv.inplace.calls import Calls
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal, Leftover
from vmconv.inplace.names import WORKING
from vmconv.planner import Plan
from vmconv.sources import File
from vmconv.storage import DEFAULT_ACCESS, Access, Transaction


class ReplacingBackend(ReflinkBackend):
    """Replaces certain files, those of a source; made for them, and so registered nowhere."""

    automatic = False

    def __init__(self, files: Sequence[File], calls: Calls | None = None) -> None:
        self.files = files
        self.calls = calls or Calls()

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return ReplacingTransaction(directory, self, force=force)


class ReplacingTransaction(ReflinkTransaction):
    """New files, and old ones that go with the commit; stopped anywhere, it is recovered as a change in place is."""

    def __init__(self, directory: Directory, backend: ReplacingBackend, *, force: bool) -> None:
        super().__init__(directory, force=force, durable=True)
        self.files = backend.files
        self.calls = backend.calls
        self._change: Change | None = None

    def prepare(self, plan: Plan) -> None:
        old = [os.path.realpath(file.path) for file in self.files]
        made = tuple(file.name for file in plan.files)
        journal = Journal(
            source=os.path.basename(old[0]),
            target=made[-1],
            made=made,
            leftovers=tuple(Leftover.of(path) for path in old),
            replace=self.force or any(os.path.basename(path) in made for path in old),
            carried=False,
        )
        self._change = Change(self.directory.real(), journal, self.calls, -1)
        self._change.begin()

    def temporary_name(self, name: str) -> str:
        return name + WORKING

    def commit(self) -> None:
        change = self._change
        if change is None:
            return
        own = {leftover.name for leftover in change.journal.leftovers}
        for name in change.journal.made:
            if not self.force and name not in own and self.directory.has(name):
                raise already_exists(self.directory, name)
        change.complete()
        self._close()
        self._outputs.clear()

    def abort(self) -> None:
        try:
            self._close()
            if self._change:
                self._change.give_up()
        finally:
            self._outputs.clear()
