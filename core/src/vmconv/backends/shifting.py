"""The source file becomes the target, with its payload shifted to where a flat disk has it; see `vmconv.inplace`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmconv.backends.inplace import InPlaceBackend, InPlaceTransaction
from vmconv.directory import Directory
from vmconv.inplace import shifting, space
from vmconv.inplace.change import Change
from vmconv.inplace.journal import Journal
from vmconv.planned import PlannedFile
from vmconv.planner import Action, FilePlan, ShareSteps
from vmconv.sources import File, stamp_of
from vmconv.storage import DEFAULT_ACCESS, Access, Output, Survey, Transaction


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
        return self._both_ways(main, others)._replace(
            pieces=shifting.placed(main, self.carrier),
            later=later,
            # Where filesystems set space aside around what is written later.
            dead=space.unused(main, os.fstatvfs(self.claim.descriptor).f_bsize),
            new=b"".join(main.table.read(offset, length) for offset, length in later.tolist()),
        )

    def _carried(self, change: Change) -> Output:
        return _Planned(self._main, self.carrier)


class _Planned(Output):
    """The file that will be."""

    def __init__(self, main: FilePlan, carrier: File) -> None:
        self.main = main
        self.carrier = carrier

    def share(self, steps: ShareSteps) -> None:
        """Does nothing: what is shifted is so after the commit."""

    def write(self, offset: int, data: bytes) -> None:
        """Does nothing: the journal has it."""

    def finish(self) -> File:
        # It got another name, and that is all that may change.
        self.carrier.stamp = stamp_of(os.fstat(self.carrier.descriptor))
        return PlannedFile(self.main.name, self.main.table)
