"""A target whose storage shares no blocks: the file itself is brought up to date, by the protocol of `vmconv.inplace`.

Two ways: where payload can stay, what changed goes behind the end of the file, and the metadata is exchanged. Else, for
flat disks, what changed is first made durable in the journal, and written after the commit: twice the bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from vmconv.backends.files import refuse_reader, unnamed_sources
from vmconv.errors import PlanError, VmconvError
from vmconv.inplace import rules, space
from vmconv.inplace.change import Change
from vmconv.inplace.codec import MAX_BODY
from vmconv.inplace.journal import Journal
from vmconv.inplace.rules import Own
from vmconv.inplace.shift import LaterOutput
from vmconv.inplace.stay import Claim, InPlaceBackend, InPlaceTransaction, SiblingOutput
from vmconv.inplace.syscalls import Syscalls
from vmconv.interface.backend import DEFAULT_ACCESS, Access, Output, Survey, Transaction
from vmconv.io.directory import Directory
from vmconv.model.extents import Kind, distinct
from vmconv.model.plan import Action, FilePlan, Plan
from vmconv.model.sources import File
from vmconv.syncing.old import Old

MOST_JOURNALLED = MAX_BODY - (8 << 20)
"""Bytes of changes that a journal holds, besides its tables."""


class Place(NamedTuple):
    """The file to change, open for writing by `descriptor`, and its time afterwards, ns."""

    carrier: Own
    descriptor: int
    mtime: int


def carrier_of(old: Old) -> Own:
    """Returns the file with all payload of the target. Raises `PlanError` if there are several."""
    table = old.image.stored
    used = [table.sources[index] for index in distinct(table.source[table.kind == Kind.DATA]).tolist()]
    if len(used) > 1 or not all(isinstance(source, File) for source in used):
        raise PlanError(f"{old.image.file.name}: its payload is not in one file as it is")
    wanted = used[0] if used else old.image.file
    assert isinstance(wanted, File)
    for own in old.own:
        if own.file.stamp[:2] == wanted.stamp[:2]:
            # The table's own object: what is written must not look like another file's.
            return own._replace(file=wanted)
    raise PlanError(f"{old.image.file.name}: its payload is not in a file of its own")


def opened(old: Old, directory: Directory) -> Place:
    """Returns the file to change; the caller closes it. Raises `PlanError` if it may not be changed."""
    carrier = carrier_of(old)
    rules.refuse_places(old.own, directory)
    rules.refuse_leftovers(directory, old.own)
    if len({os.fstat(file.descriptor).st_uid for file in old.files}) > 1:
        raise PlanError(f"{directory.join(carrier.name)}: its files belong to several users")
    try:
        descriptor = directory.open(carrier.name, os.O_RDWR)
    except OSError as exc:
        raise PlanError(f"{directory.join(carrier.name)}: cannot be changed: {exc.strerror}") from exc
    try:
        rules.refuse_exchanged(directory, carrier, descriptor)
    except VmconvError:
        os.close(descriptor)
        raise
    return Place(carrier, descriptor, time.time_ns())


class SyncBackend(InPlaceBackend):
    """Brings the file of one target up to date; made per sync, so not registered."""

    title = "changes the target file itself"

    def __init__(self, place: Place, old: Old, directory: Directory, *, calls: Syscalls | None = None) -> None:
        owner = os.fstat(place.descriptor).st_uid
        claim = Claim(place.carrier, place.descriptor, (), old.format.name, directory, owner)
        super().__init__(claim, keep_undo=False, calls=calls)
        self.place = place
        self.own = old.own
        self.rolls_forward = False
        """True if the changes go through the journal."""

    def survey(self, directory: str, sources: Sequence[File]) -> Survey:
        found = super().survey(directory, sources)
        return found._replace(refusals=dict.fromkeys(found.refusals, "it changed, and lies in another file"))

    def settle(self, plan: Plan) -> None:
        """Chooses between appending and the journal. Raises `PlanError` if neither fits the plan."""
        carrier = self.place.carrier.file
        main = space.carrier_plan(plan, carrier)
        self.rolls_forward = False
        if any(
            file.sources[index] is carrier for file in plan.files for _, _, index, _ in file.steps.rows(Action.COPY)
        ):
            raise PlanError(f"{main.name}: its payload lies elsewhere than vmconv would place it")
        if any(len(file.shares()) for file in plan.files if file is not main):
            raise PlanError(f"{main.name}: its payload is not in one file")
        if not len(space.clipped(space.written(main, Action.COPY), 0, carrier.size)):
            return
        count = int(space.written(main, Action.COPY, Action.WRITE)[:, 1].sum())
        if count > MOST_JOURNALLED:
            raise PlanError(f"{main.name}: {count} bytes would be journalled, {MOST_JOURNALLED} at most")
        self.rolls_forward = True

    def begin(
        self, directory: Directory, *, force: bool = False, durable: bool = True, access: Access = DEFAULT_ACCESS
    ) -> Transaction:
        refuse_reader(
            self.claim.directory.join(self.claim.carrier.name),
            self.place.descriptor,
            unnamed_sources(access.sources),
            "remove the permissions of other users, or convert it again",
        )
        kind = _RollForward if self.rolls_forward else _Stay
        return kind(self, force=True)


class _Stay(InPlaceTransaction):
    """What changed is behind the end before the commit; the file keeps the rest."""

    keeps_record = True

    def __init__(self, backend: SyncBackend, *, force: bool) -> None:
        super().__init__(backend, force=force)
        self.mtime = backend.place.mtime
        self.own = backend.own

    def create(self, name: str, size: int, sources: Sequence[File]) -> Output:
        output = super().create(name, size, sources)
        for own in self.own:
            if own.name == name and isinstance(output, SiblingOutput):
                output.origin = own.file.descriptor
        return output

    def _journal(self, main: FilePlan, others: tuple[str, ...], named: str) -> Journal:
        # An explicit time: the record of the sync is written before the commit, and states it.
        return super()._journal(main, others, named)._replace(mtime=self.mtime)


class _RollForward(_Stay):
    """What changed is in the journal before the commit, and written after it. Verification reads the planned file."""

    def _exact(self, main: FilePlan) -> FilePlan:
        # Zeros of the disk are in blocks that a guest reads: parts of blocks have to become zero, too.
        return main._replace(slack=False)

    def _journal(self, main: FilePlan, others: tuple[str, ...], named: str) -> Journal:
        later = space.written(main, Action.WRITE, Action.COPY)
        return self._base_journal(main, others)._replace(
            later=later,
            new=b"".join(main.table.read(offset, length) for offset, length in later.tolist()),
            dead=space.dead_ranges(self._exact(main), self.carrier, os.fstatvfs(self.claim.descriptor).f_bsize),
            mtime=self.mtime,
        )

    def _carrier_output(self, change: Change) -> Output:
        return LaterOutput(self._main, self.carrier)
