"""In place to a flat disk: the source file becomes the target, its payload is shifted to the flat disk's offsets."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmconv.backends.planned import PlannedOutput
from vmconv.inplace import moves, space
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal
from vmconv.inplace.stay import InPlaceBackend, InPlaceTransaction
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Output, Survey, Transaction
from vmconv.io.directory import Directory
from vmconv.model.plan import Action, FilePlan
from vmconv.model.sources import File, stamp_of


class ShiftingBackend(InPlaceBackend):
    """Changes the file of one claim by shifting its blocks."""

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        # Any offset is fine for a single row; `moves` checks the plan as a whole.
        return Survey(1, self._elsewhere(sources))

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return ShiftingTransaction(self, force=force)


class ShiftingTransaction(InPlaceTransaction):
    """One file whose payload is shifted after the commit, because a partial shift can only be completed.

    Nothing is written to the file before the commit. Verification reads the planned file.
    """

    def _journal(self, main: FilePlan, others: tuple[str, ...], named: str) -> Journal:
        later = space.written(main, Action.WRITE)
        return self._base_journal(main, others)._replace(
            pieces=moves.physical_pieces(main, self.carrier),
            later=later,
            # Filesystems may preallocate blocks around later writes.
            dead=space.unused(main, os.fstatvfs(self.claim.descriptor).f_bsize),
            new=b"".join(main.table.read(offset, length) for offset, length in later.tolist()),
        )

    def _carrier_output(self, change: Change) -> Output:
        return LaterOutput(self._main, self.carrier)


class LaterOutput(PlannedOutput):
    """The planned file: the carrier is written after the commit, from the journal."""

    def __init__(self, main: FilePlan, carrier: File) -> None:
        super().__init__(main)
        self.carrier = carrier

    def finish(self) -> File:
        # The rename to the working name changed the ctime.
        self.carrier.stamp = stamp_of(os.fstat(self.carrier.descriptor))
        return super().finish()
