"""In place with payload that stays: the source file becomes the target, only the metadata around it is replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from vmconv.errors import AccessError, BackendError
from vmconv.inplace import rules, space, undofile
from vmconv.inplace.change import Change
from vmconv.inplace.codec import Ranges
from vmconv.inplace.confirm import Expected, confirm
from vmconv.inplace.journal import Journal, Leftover
from vmconv.inplace.names import UNDO, beside
from vmconv.inplace.rules import Own
from vmconv.inplace.syscalls import Syscalls
from vmconv.interface.backend import (
    DEFAULT_ACCESS,
    Access,
    Backend,
    Capabilities,
    Congruence,
    Output,
    Survey,
    Transaction,
)
from vmconv.io import attributes, ownership
from vmconv.io.directory import Directory
from vmconv.model.plan import Action, FilePlan, Plan, ShareSteps
from vmconv.model.sources import File, Source, stamp_of
from vmconv.system import linux


class Claim(NamedTuple):
    """A checked and locked file to change: `descriptor` is `carrier`, open for writing.

    `leftovers` are the other files of the source image, which the commit removes; `format_name` is its format. All are
    in `directory` and belong to `owner`; None allows any.
    """

    carrier: Own
    descriptor: int
    leftovers: tuple[Own, ...]
    format_name: str
    directory: Directory
    owner: int | None


class InPlaceBackend(Backend):
    """Changes the file of one claim; made per conversion, so not registered."""

    name = "in-place"
    title = "changes the source file itself"
    automatic = False
    destination = "source"

    def __init__(self, claim: Claim, *, keep_undo: bool, calls: Syscalls | None = None) -> None:
        self.claim = claim
        self.keep_undo = keep_undo
        self.calls = calls or Syscalls()

    def capabilities(self, directory: str) -> Capabilities:
        return Capabilities(usable=True, shares=True)

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        return Survey(1, self._elsewhere(sources), Congruence.EQUAL)

    def _elsewhere(self, sources: Sequence[File]) -> dict[int, str]:
        """Returns the reason of copies from files other than the carrier."""
        return {id(file): "it lies in another file" for file in sources if file is not self.claim.carrier.file}

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        # The claim's directory is used: it was open when the source was checked.
        return InPlaceTransaction(self, force=force)


class InPlaceTransaction(Transaction):
    """Changes one file, and creates small ones beside it."""

    keeps_record = False
    """True if the file's record of a sync is of what it becomes."""

    def __init__(self, backend: InPlaceBackend, *, force: bool) -> None:
        self.claim = backend.claim
        self.carrier = backend.claim.carrier.file
        self.keep_undo = backend.keep_undo
        self.calls = backend.calls
        self.directory = backend.claim.directory
        self.force = force
        self._change: Change | None = None
        self._main: FilePlan
        self._outputs: list[_Output] = []

    def prepare(self, plan: Plan) -> None:
        """Begins the change: writes the journal and gives the file its working name."""
        if self.carrier.changed():
            raise AccessError(f"{self.carrier.name}: changed while the command ran")
        main = space.carrier_plan(plan, self.carrier)
        self._main = main
        others = tuple(file.name for file in plan.files if file is not main)
        journal = self._journal(main, others, plan.files[-1].name)
        self._change = Change(self.directory, journal, self.calls, self.claim.descriptor)
        expected = Expected.of(self._exact(main), self.carrier)
        self._change.confirm = lambda: confirm(self.carrier.name, self.claim.descriptor, expected, journal)
        self._change.begin()
        if journal.undo:
            self._write_undo(self._change, journal.undo, main)

    def _exact(self, main: FilePlan) -> FilePlan:
        """Returns the plan of the carrier with its slack, if parts of blocks may keep old bytes."""
        return main

    def _journal(self, main: FilePlan, others: tuple[str, ...], named: str) -> Journal:
        carrier = self.carrier
        inside = space.clipped(space.written(main, Action.WRITE), 0, carrier.size)
        rules.refuse_too_much(carrier.name, inside)
        undo = beside(named, UNDO) if self.keep_undo else None
        return self._base_journal(main, (*others, undo) if undo else others)._replace(
            saved=inside,
            old=b"".join(carrier.read(offset, length) for offset, length in inside.tolist()),
            dead=space.dead_ranges(main, carrier, os.fstatvfs(self.claim.descriptor).f_bsize),
            undo=undo,
            # An explicit mtime: any later write changes it, even within one tick of the clock.
            mtime=time.time_ns() if undo else None,
        )

    def _base_journal(self, main: FilePlan, made: tuple[str, ...]) -> Journal:
        """Returns the part of the journal that all strategies share: names, sizes, other files."""
        carrier = self.carrier
        return Journal(
            source=self.claim.carrier.name,
            target=main.name,
            old_size=carrier.size,
            new_size=main.size,
            old_mtime=carrier.stamp.mtime,
            made=made,
            leftovers=tuple(Leftover.of(own.name, os.fstat(own.file.descriptor)) for own in self.claim.leftovers),
            replace=self.force,
            owner=self.claim.owner,
        )

    def _write_undo(self, change: Change, name: str, main: FilePlan) -> None:
        """Writes the undo file, before anything of the old container is overwritten."""
        journal, carrier, leftovers = change.journal, self.carrier, self.claim.leftovers
        kept = min(journal.new_size, carrier.size)
        cut_off: Ranges = np.array([(kept, carrier.size - kept)], dtype=np.int64)
        lost = space.clipped(np.concatenate([journal.saved, journal.dead, cut_off]), 0, carrier.size)
        undo = undofile.Undo(
            source=journal.source,
            target=journal.target,
            source_format=self.claim.format_name,
            size=carrier.size,
            mtime=carrier.stamp.mtime,
            ranges=lost,
            siblings=tuple(undofile.Sibling.of(own.name, own.file) for own in leftovers),
            made=tuple(other for other in journal.made if other != name),
            metadata=space.written(main, Action.WRITE, Action.COPY),
        )
        pieces = [(carrier, offset, length) for offset, length in lost.tolist()]
        pieces += [(own.file, 0, own.file.size) for own in leftovers]
        head = undo.head(lambda digest: ownership.mark(None, digest))
        # It stays mode 0600 and this user's: it holds data of the source, and undo trusts only the user's own files.
        descriptor = change.make(name)
        try:
            undofile.write(descriptor, head, pieces, self.calls)
        finally:
            linux.close(descriptor)

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        if self._change is None:
            raise BackendError(f"{name}: the change in place is not prepared")
        if name == self._main.name:
            return self._carrier_output(self._change)
        output = SiblingOutput(self._change, name, size)
        self._outputs.append(output)
        return output

    def _carrier_output(self, change: Change) -> Output:
        output = _CarrierOutput(change, self.carrier, self._main.size)
        self._outputs.append(output)
        return output

    def commit(self) -> None:
        change = self._change
        if change is None:
            return
        for name in (change.journal.target, *change.journal.made):
            if not self.force and self.directory.has(name):
                raise BackendError(f"{self.directory.join(name)}: already exists", hint="--force replaces it")
        change.complete()
        if not self.keeps_record:
            attributes.remove_record(self.carrier.descriptor)
        self._close()

    def abort(self) -> None:
        try:
            if self._change:
                self._change.give_up()
        finally:
            self._close()

    def _close(self) -> None:
        for output in self._outputs:
            output.close()
        self._outputs.clear()


class _Output(Output):
    """A file of the change during writing."""

    descriptor: int
    name: str

    def __init__(self, change: Change, size: int) -> None:
        self.change = change
        self.size = size
        self.file: File | None = None

    def share(self, steps: ShareSteps) -> None:
        """Does nothing: the payload is in place."""

    def finish(self) -> File:
        # Grow only: the old end is cut off after the commit, because a rollback needs it.
        if os.fstat(self.descriptor).st_size < self.size:
            self.change.calls.truncate(self.descriptor, self.size)
        self.change.calls.sync(self.descriptor)
        directory = self.change.directory
        self.file = File(directory.join(self.name), directory.open(self.name))
        # The old end is still there, and verification must not see it.
        self.file.size = self.size
        rules.refuse_exchanged(directory, Own(self.file, self.name), self.descriptor)
        return self.file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class _CarrierOutput(_Output):
    """The changed file: writes behind its old end happen at once, writes inside it last."""

    def __init__(self, change: Change, carrier: File, size: int) -> None:
        super().__init__(change, size)
        self.carrier = carrier
        self.descriptor = change.descriptor
        self.name = change.working
        self._inside: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        old_end = max(0, min(len(data), self.carrier.size - offset))
        if old_end:
            # Payload to copy may still be there.
            self._inside.append((offset, data[:old_end]))
        if old_end < len(data):
            self.change.calls.write(self.descriptor, data[old_end:], offset + old_end)

    def copy(self, source: Source, source_offset: int, offset: int, length: int) -> None:
        super().copy(source, source_offset, offset, length)
        # Starts writeback while the next piece is read, so that the sync at the end waits for less.
        with suppress(OSError):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def finish(self) -> File:
        for offset, data in self._inside:
            self.change.calls.write(self.descriptor, data, offset)
        self._inside.clear()
        file = super().finish()
        # Restamp: `changed()` now guards the modified file.
        self.carrier.stamp = stamp_of(os.fstat(self.descriptor))
        return file


class SiblingOutput(_Output):
    """A small new file beside the changed one, such as a VMDK descriptor."""

    def __init__(self, change: Change, name: str, size: int) -> None:
        super().__init__(change, size)
        self.descriptor = change.make(name)
        self.name = self.change.beside(name)
        self.origin = change.descriptor
        """The file whose owner, mode and attributes it gets."""

    def write(self, offset: int, data: bytes) -> None:
        self.change.calls.write(self.descriptor, data, offset)

    def finish(self) -> File:
        self.change.calls.carry(self.origin, self.descriptor)
        return super().finish()

    def close(self) -> None:
        super().close()
        if self.descriptor >= 0:
            linux.close(self.descriptor)
            self.descriptor = -1
