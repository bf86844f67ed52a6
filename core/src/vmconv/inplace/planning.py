"""The plan of a conversion in place: which file becomes the target, whether it may, and what little has to move."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmconv import locks
from vmconv.backends.inplace import Claim, InPlaceBackend
from vmconv.backends.replacing import ReplacingBackend
from vmconv.backends.shifting import ShiftingBackend
from vmconv.containers import sources_of
from vmconv.errors import PlanError, VmconvError, os_errors
from vmconv.extents import Extents, Kind, distinct
from vmconv.formats import Format
from vmconv.image import Image
from vmconv.inplace import rules, shifting, space
from vmconv.inplace.names import UNDO
from vmconv.layout import Placement
from vmconv.opener import Opener
from vmconv.planner import Action, Plan
from vmconv.sources import Decoded, File
from vmconv.staying import MOST_MOVED
from vmconv.storage import Backend, Survey

if TYPE_CHECKING:
    from vmconv.conversion import Conversion

Planned = Callable[[Backend, Survey, File | None], tuple["Conversion", ...]]
"""Returns the conversion that a backend is to make, in place when there is a carrier."""


class Wish(NamedTuple):
    """What is wanted: what the target is to hold, its directory and format, and how a conversion is planned."""

    table: Extents
    directory: str
    target: Format
    planned: Planned


class Way(NamedTuple):
    """How it is done. `names` are those of the source's files that files of the target may have."""

    backend: Backend
    conversions: tuple[Conversion, ...]
    names: frozenset[str]

    @property
    def plan(self) -> Plan:
        return self.conversions[0].plan


class Site:
    """Where a conversion in place happens: the image, and the files that become others, without those below it.

    With `chain` all layers do, down to and without the one in the file `base`.
    """

    def __init__(
        self, image: Image, opener: Opener, source: str, *, keep_undo: bool, chain: bool, base: str | None
    ) -> None:
        self.image = image
        self.opener = opener
        self.source = source
        self.keep_undo = keep_undo
        self.chain = chain
        self.layers: list[Image] = []
        below = os.stat(base) if base else None
        for layer in image.chain():
            if below and os.path.samestat(below, os.fstat(layer.file.descriptor)):
                break
            # The table names the files with the payload; those of the layers below are not open yet.
            layer.guest  # noqa: B018 opens them
            self.layers.append(layer)
            self.own = tuple(opener.files)
            if not chain:
                break

    @contextmanager
    def planned(self, wish: Wish) -> Iterator[Way]:
        """Yields the way that turns the source's files into the target."""
        losses = [loss for layer in self.layers for loss in layer.losses]
        rules.refuse_losses(losses, keep_undo=self.keep_undo)
        rules.refuse_places(self.source, self.own, wish.directory)
        rules.refuse_foreign(self.layers, self.own, self.opener.registry)
        rules.refuse_dependents(self.own, self.opener, wish.directory)
        with ExitStack() as claims:
            descriptors = [self._claim(file, claims) for file in self.own]
            yield self._chosen(wish, descriptors)

    def _claim(self, file: File, claims: ExitStack) -> int:
        """Returns a descriptor to write to a file that nobody else uses, and may not use from now on."""
        locks.refuse_users(file)
        with os_errors("cannot be changed", PlanError):
            descriptor = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
        claims.callback(os.close, descriptor)
        locks.claim(descriptor)
        return descriptor

    def _chosen(self, wish: Wish, descriptors: Sequence[int]) -> Way:
        """Returns the way that moves no payload: by sharing blocks where that can be, else inside the file."""
        shared = self._shared(wish)
        if shared and (self.chain or not shared.plan.copies):
            return shared
        if self.chain:
            raise PlanError(
                "in place, several layers take a filesystem that shares blocks, and have no undo",
                hint="convert the top alone, with -B",
            )
        try:
            return self._inside(wish, descriptors)
        except PlanError as exc:
            if shared:
                return shared
            if self.keep_undo or not shifting.ability(wish.directory):
                raise
            with self._hinting(wish):
                return self._shifted(wish, descriptors, exc)

    def _shared(self, wish: Wish) -> Way | None:
        """Returns the plan of new files that share with the source and then replace it; None where that cannot be."""
        if self.keep_undo:
            # Only the file itself still holds the payload at the places that the old container needs.
            return None
        backend = ReplacingBackend(self.own)
        survey = backend.survey(wish.directory, sources_of(self.image))
        if survey.refusals:
            return None
        names = frozenset(os.path.basename(os.path.realpath(file.path)) for file in self.own)
        return self._way(backend, wish.planned(backend, survey, None), names)

    def _inside(self, wish: Wish, descriptors: Sequence[int]) -> Way:
        """Returns the plan of changing the file that holds the payload."""
        with self._hinting(wish):
            claim = self._claimed(wish, descriptors)
            backend = InPlaceBackend(claim, keep_undo=self.keep_undo)
            survey = backend.survey(wish.directory, sources_of(self.image))
            conversions = wish.planned(backend, survey, claim.carrier)
            plan = conversions[0].plan
            _refuse_moves(plan, claim.carrier, wish.target)
        self._refuse_old_undo(os.path.join(wish.directory, plan.files[-1].name + UNDO))
        return self._way(backend, conversions, _own_name(plan, claim.carrier))

    def _shifted(self, wish: Wish, descriptors: Sequence[int], why: PlanError) -> Way:
        """Returns the plan of shifting payload inside its file; raises `why` when that is no help."""
        claim = self._claimed(wish, descriptors)
        backend = ShiftingBackend(claim, keep_undo=False)
        conversions = wish.planned(backend, backend.survey(wish.directory, sources_of(self.image)), None)
        plan = conversions[0].plan
        main = space.carried(plan, claim.carrier)
        others = [file for file in plan.files if file is not main and len(file.shares())]
        if plan.copies or others or plan.totals.written > shifting.MOST_WRITTEN:
            raise why
        shifting.placed(main, claim.carrier)
        return self._way(backend, conversions, _own_name(plan, claim.carrier))

    def _way(self, backend: Backend, conversions: tuple[Conversion, ...], names: frozenset[str]) -> Way:
        """Returns a way; raises `PlanError` when what is made would refer to what is gone then."""
        if conversions[0].plan.references:
            raise PlanError(
                "in place, the target cannot refer to the source, which is gone then", hint="leave --in-place out"
            )
        return Way(backend, conversions, names)

    def _claimed(self, wish: Wish, descriptors: Sequence[int]) -> Claim:
        carrier = self._carrier(wish.table)
        leftovers = tuple(file for file in self.own if file is not carrier)
        return Claim(carrier, descriptors[self.own.index(carrier)], leftovers, self.image.format_name)

    @contextmanager
    def _hinting(self, wish: Wish) -> Iterator[None]:
        """Names the formats that payload could stay in, where a plan fails without a better hint."""
        try:
            yield
        except PlanError as exc:
            exc.hint = exc.hint or self._others(wish)
            raise

    def _carrier(self, table: Extents) -> File:
        """Returns the one file that holds all payload."""
        used = [table.sources[index] for index in distinct(table.source[table.kind == Kind.DATA]).tolist()]
        for source in used:
            if isinstance(source, Decoded):
                raise PlanError(
                    f"{source.file.name}: {source.reason}: in place, payload has to stay as it is",
                    hint="convert to another file",
                )
        carriers = [file for file in self.own if file in used] or [self.own[-1]]
        if len(used) > 1 or used not in ([], carriers):
            names = ", ".join(source.name for source in used)
            raise PlanError(
                f"{self.source}: its payload lies in {names}; in place, it has to lie in one file of its own",
                hint="-B keeps the layers below" if self.image.parent_reference else "convert to another file",
            )
        return carriers[0]

    def _refuse_old_undo(self, path: str) -> None:
        if self.keep_undo and os.path.lexists(path):
            raise PlanError(f"{path}: already exists", hint="remove it, when it is not needed any more")

    def _others(self, wish: Wish) -> str:
        """Returns which formats can hold the payload where it lies: those that lay it out when they are asked."""
        every = self.opener.registry.formats.values()
        names = " or ".join(
            one.name for one in every if one.in_place and one is not wish.target and self._can_hold(one, wish.table)
        )
        return f"{names} can hold it where it lies; or convert to another file" if names else "convert to another file"

    def _can_hold(self, one: Format, table: Extents) -> bool:
        try:
            carrier = self._carrier(table)
            layout = one.write(self.image, one.options()(), Placement(1, carrier.name, carrier=carrier))
        except VmconvError:
            return False
        return len(layout.files) == 1


def _own_name(plan: Plan, carrier: File) -> frozenset[str]:
    """Returns the name of the file when the target has the same."""
    return frozenset({os.path.basename(os.path.realpath(carrier.path))} & {space.carried(plan, carrier).name})


def _refuse_moves(plan: Plan, carrier: File, target: Format) -> None:
    """Raises when more than a block would have to move, or something would be written over what is still needed."""
    moved = space.written(space.carried(plan, carrier), Action.COPY)
    inside = space.clipped(moved, 0, carrier.size)
    total = plan.totals.copied
    # What goes to another file than the one that stays is moved, too.
    if total > MOST_MOVED or len(inside) or total != int(moved[:, 1].sum()):
        raise PlanError(f"in place, payload cannot stay where it lies: {target.name} would have to move {total} bytes")
