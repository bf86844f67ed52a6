"""The source file becomes the target, with its payload shifted to where a flat disk has it; see `vmconv.inplace`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmconv.backends.planned import PlannedOutput
from vmconv.inplace import moves as shifting
from vmconv.inplace import space
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal
from vmconv.inplace.stay import InPlaceBackend, InPlaceTransaction
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Output, Survey, Transaction
from vmconv.io.directory import Directory
from vmconv.model.plan import Action, FilePlan
from vmconv.model.sources import File, stamp_of


class ShiftingBackend(InPlaceBackend):
    """Changes the file of one claim, whose blocks it shifts."""

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        # Which blocks can be shifted is for the plan as a whole to say.
        return Survey(1, self._elsewhere(sources))

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        return ShiftingTransaction(self, force=force)


class ShiftingTransaction(InPlaceTransaction):
    """One file whose payload is shifted after the commit: there is no way back from the middle, only the one forward.

    So nothing is written to it before, and what is verified is what the file will be.
    """

    def _journal(self, main: FilePlan, others: tuple[str, ...], named: str) -> Journal:
        later = space.written(main, Action.WRITE)
        return self._base_journal(main, others)._replace(
            pieces=shifting.physical_pieces(main, self.carrier),
            later=later,
            # Where filesystems set space aside around what is written later.
            dead=space.unused(main, os.fstatvfs(self.claim.descriptor).f_bsize),
            new=b"".join(main.table.read(offset, length) for offset, length in later.tolist()),
        )

    def _carrier_output(self, change: Change) -> Output:
        return _ShiftedOutput(self._main, self.carrier)


class _ShiftedOutput(PlannedOutput):
    """The file as it will be: payload is shifted after the commit, and the journal has the rest."""

    def __init__(self, main: FilePlan, carrier: File) -> None:
        super().__init__(main)
        self.carrier = carrier

    def finish(self) -> File:
        # Only its name has changed.
        self.carrier.stamp = stamp_of(os.fstat(self.carrier.descriptor))
        return super().finish()
