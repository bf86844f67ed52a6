"""In place on filesystems that share blocks: new files share the source's payload, then replace the source."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmconv.backends.files import refuse_reader
from vmconv.backends.reflink import ReflinkBackend, ReflinkOutput, ReflinkTransaction
from vmconv.backends.temporary import Temporary, already_exists
from vmconv.errors import warn
from vmconv.inplace import rules
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal, Leftover
from vmconv.inplace.names import WORKING, beside
from vmconv.inplace.rules import Own
from vmconv.inplace.syscalls import Syscalls
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Output, Transaction
from vmconv.io.directory import Directory
from vmconv.model.plan import Plan
from vmconv.model.sources import File


class ReplacingBackend(ReflinkBackend):
    """Replaces the files of one source; made per conversion, so not registered.

    `own` are in `directory` and belong to `owner`; None allows any. A new file gets the attributes of the file whose
    payload it shares, or else of `named`, one of `own`.
    """

    automatic = False

    def __init__(
        self,
        own: Sequence[Own],
        directory: Directory,
        named: File,
        *,
        owner: int | None,
        calls: Syscalls | None = None,
    ) -> None:
        self.own = own
        self.directory = directory
        self.named = named
        self.owner = owner
        self.calls = calls or Syscalls()

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        # `self.directory` is used: it was open when the source was checked.
        return ReplacingTransaction(self, force=force)


class _Replacement(ReflinkOutput):
    """A new file with the owner, mode and attributes of `origin`, readable to no user whom `others` exclude."""

    calls: Syscalls
    origin: File
    others: Sequence[File]

    def finish(self) -> File:
        # Before the sync, so that attributes are durable before the old file is removed.
        missing = self.calls.carry(self.origin.descriptor, self.descriptor, [other.descriptor for other in self.others])
        if missing:
            warn(f"{self.origin.name}: not carried over to its replacement: {', '.join(missing)}")
        return super().finish()


class ReplacingTransaction(ReflinkTransaction):
    """Creates new files and removes the old ones with the commit; recovered like any change in place."""

    output = _Replacement

    def __init__(self, backend: ReplacingBackend, *, force: bool) -> None:
        super().__init__(backend.directory, force=force, durable=True)
        self.own = backend.own
        self.named = backend.named
        self.owner = backend.owner
        self.calls = backend.calls
        self._change: Change | None = None

    def prepare(self, plan: Plan) -> None:
        rules.refuse_places(self.own, self.directory)
        made = tuple(file.name for file in plan.files)
        old = [Leftover.of(own.name, os.fstat(own.file.descriptor)) for own in self.own]
        journal = Journal(
            source=old[0].name,
            target=made[-1],
            made=made,
            leftovers=tuple(old),
            # The target may reuse a name of the source.
            replace=self.force or any(leftover.name in made for leftover in old),
            carried=False,
            owner=self.owner,
        )
        self._change = Change(self.directory, journal, self.calls, -1)
        self._change.begin()

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        output = super().create(name, size, sources)
        if isinstance(output, _Replacement):
            files = [own.file for own in self.own]
            output.calls = self.calls
            output.origin = next((file for file in sources if file in files), self.named)
            output.others = [file for file in (*sources, *files) if file is not output.origin]
            if self.owner is not None:
                refuse_reader(output.path, output.origin.descriptor, output.others, "--any-owner allows it")
        return output

    def _give_access(self, temporary: Temporary) -> None:
        """Does nothing: the file stays mode 0600 until `finish` carries the attributes over."""

    def temporary_name(self, name: str) -> str:
        return beside(name, WORKING)

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
