"""The strategies of a conversion in place: share, stay and shift.

A strategy returns a proposal, or the reason against it, before anything is laid out. Then it checks the plan of its
proposal: payload must not move.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from vmconv.errors import PlanError, VmconvError
from vmconv.inplace import moves, space
from vmconv.inplace.names import UNDO, beside
from vmconv.inplace.rules import Own
from vmconv.inplace.share import ReplacingBackend
from vmconv.inplace.shift import ShiftingBackend
from vmconv.inplace.site import Site
from vmconv.inplace.stay import Claim, InPlaceBackend
from vmconv.interface.backend import Backend, Proposal, Survey
from vmconv.interface.format import Format
from vmconv.io import attributes
from vmconv.model.extents import Extents, Kind, distinct
from vmconv.model.layout import Placement
from vmconv.model.plan import Action, Plan
from vmconv.model.sources import Decoded, File
from vmconv.placing.pinning import MOST_MOVED


class Wanted(NamedTuple):
    """The goal of a conversion in place: the disk's table, the target's directory and format."""

    table: Extents
    directory: str
    format: Format


class Unsuitable(PlanError):  # noqa: N818 an answer of a strategy, raised for its callers in here only
    """The strategy does not apply here; another strategy gives the reason for the user."""


class Strategy(ABC):
    """One way to convert in place."""

    refusal_is_final = False
    """True if no other strategy can lay out a disk that this one cannot."""
    is_last_resort = False
    """True if any plan of another strategy is better."""

    def __init__(self, site: Site, wanted: Wanted) -> None:
        self.site = site
        self.wanted = wanted

    @abstractmethod
    def propose(self) -> Proposal | PlanError:
        """Returns the strategy's proposal, or the error that explains why there is none; lays nothing out."""

    @abstractmethod
    def names(self, plan: Plan) -> frozenset[str]:
        """Returns the names of source files that the target may reuse.

        Raises `PlanError` if the plan moves payload.
        """

    def _survey(self, backend: Backend) -> Survey:
        return backend.survey(self.wanted.directory, self.site.image.payload_files())


class Share(Strategy):
    """New files share the source's payload, then replace the source; needs a filesystem that shares blocks."""

    # Payload may lie anywhere here, so the format cannot hold the disk at all.
    refusal_is_final = True

    def propose(self) -> Proposal | PlanError:
        site = self.site
        if site.keep_undo:
            # Undo needs the payload at its old offsets, which only the old file has.
            return Unsuitable("in place, an undo file needs the payload where it lies")
        if not all(attributes.can_give(os.fstat(file.descriptor)) for file in site.files):
            return Unsuitable("in place, the new file would be another user's, or another group's")
        backend = ReplacingBackend(site.own, site.directory, site.image.file, owner=site.owner)
        survey = self._survey(backend)
        if survey.refusals:
            return Unsuitable(f"in place, blocks cannot be shared: {next(iter(survey.refusals.values()))}")
        return Proposal(backend, survey)

    def names(self, plan: Plan) -> frozenset[str]:
        return frozenset(own.name for own in self.site.own)


class _OneFile(Strategy):
    """Base of strategies that change the one file with all payload."""

    def _claim(self) -> Claim:
        site, file = self.site, carrier_of(self.site, self.wanted.table)
        own = next(own for own in site.own if own.file is file)
        leftovers = tuple(other for other in site.own if other is not own)
        descriptor = site.descriptors[id(file)]
        return Claim(own, descriptor, leftovers, site.image.format_name, site.directory, site.owner)

    def _own_name(self, plan: Plan) -> frozenset[str]:
        """Returns the carrier's name if the target has the same."""
        carrier = self.carrier
        return frozenset({carrier.name} & {space.carrier_plan(plan, carrier.file).name})

    carrier: Own


class Stay(_OneFile):
    """The file with the payload becomes the target: only the metadata around the payload is replaced."""

    def propose(self) -> Proposal | PlanError:
        if self.site.chain:
            return PlanError(
                "in place, several layers need a filesystem that shares blocks, and have no undo",
                hint="convert the top alone, with -B",
            )
        try:
            claim = self._claim()
        except PlanError as exc:
            return exc
        self.carrier = claim.carrier
        backend = InPlaceBackend(claim, keep_undo=self.site.keep_undo)
        return Proposal(backend, self._survey(backend), claim.carrier.file)

    def names(self, plan: Plan) -> frozenset[str]:
        _refuse_moves(plan, self.carrier.file, self.wanted.format)
        undo = beside(plan.files[-1].name, UNDO)
        if self.site.keep_undo and self.site.directory.has(undo):
            path = self.site.directory.join(undo)
            raise PlanError(f"{path}: already exists", hint="remove it, if it is no longer needed")
        return self._own_name(plan)


class Shift(_OneFile):
    """The file becomes a flat disk: its payload is shifted to the flat disk's offsets."""

    # New files that copy a little are better: shifting cannot be rolled back.
    is_last_resort = True

    def propose(self) -> Proposal | PlanError:
        site = self.site
        if site.chain or site.keep_undo:
            return Unsuitable("in place, several layers and undo files need payload that stays where it lies")
        if not moves.supported(site.directory):
            return Unsuitable(f"in place, the filesystem of {site.directory.path} cannot shift payload inside a file")
        try:
            claim = self._claim()
        except PlanError as exc:
            return exc
        self.carrier = claim.carrier
        backend = ShiftingBackend(claim, keep_undo=False)
        return Proposal(backend, self._survey(backend))

    def names(self, plan: Plan) -> frozenset[str]:
        main = space.carrier_plan(plan, self.carrier.file)
        others = [file for file in plan.files if file is not main and len(file.shares())]
        if plan.copies or others or plan.totals.written > moves.MOST_WRITTEN:
            raise Unsuitable("in place, payload cannot be shifted to the target's offsets")
        # Only the refusal counts. The transaction asks again: the filesystem may have moved blocks since.
        moves.physical_pieces(main, self.carrier.file)
        return self._own_name(plan)


STRATEGIES: tuple[type[Strategy], ...] = (Share, Stay, Shift)
"""In the order of preference."""


def carrier_of(site: Site, table: Extents) -> File:
    """Returns the one file with all payload. Raises `PlanError` if there are several, or payload is encoded."""
    used = [table.sources[index] for index in distinct(table.source[table.kind == Kind.DATA]).tolist()]
    for source in used:
        if isinstance(source, Decoded):
            raise PlanError(
                f"{source.file.name}: {source.reason}: in place, payload cannot be decoded",
                hint="convert to another file",
            )
    carriers = [file for file in site.files if file in used] or [site.files[-1]]
    if len(used) > 1 or used not in ([], carriers):
        names = ", ".join(source.name for source in used)
        raise PlanError(
            f"{site.source}: its payload lies in {names}; in place, it must lie in one file of the image itself",
            hint="-B keeps the layers below" if site.image.parent_reference else "convert to another file",
        )
    return carriers[0]


def formats_that_hold(site: Site, wanted: Wanted) -> str:
    """Returns a hint that lists the other formats whose writers can lay out the payload in place."""
    every: Sequence[Format] = list(site.opener.registry.formats.values())
    names = " or ".join(
        one.name for one in every if one.in_place and one is not wanted.format and _can_hold(site, one, wanted.table)
    )
    return f"{names} can hold it in place; or convert to another file" if names else "convert to another file"


def _can_hold(site: Site, one: Format, table: Extents) -> bool:
    try:
        carrier = carrier_of(site, table)
        layout = one.write(site.image, one.options()(), Placement(1, carrier.name, carrier=carrier))
    except VmconvError:
        return False
    return len(layout.files) == 1


def _refuse_moves(plan: Plan, carrier: File, target: Format) -> None:
    """Raises `PlanError` if more than `MOST_MOVED` bytes would move, or a copy would overwrite old content."""
    moved = space.written(space.carrier_plan(plan, carrier), Action.COPY)
    inside = space.clipped(moved, 0, carrier.size)
    total = plan.totals.copied
    # Copies into other files than the carrier count as moves.
    if total > MOST_MOVED or len(inside) or total != int(moved[:, 1].sum()):
        raise PlanError(f"in place, payload cannot stay where it lies: {target.name} would have to move {total} bytes")
