"""The plan of a conversion in place: which file becomes the target, whether it may, and what little has to move."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmconv import attributes, linux, locks
from vmconv.backends.inplace import Claim, InPlaceBackend
from vmconv.backends.replacing import ReplacingBackend
from vmconv.backends.shifting import ShiftingBackend
from vmconv.containers import sources_of
from vmconv.directory import Directory
from vmconv.errors import AccessError, PlanError, VmconvError, os_errors
from vmconv.extents import Extents, Kind, distinct
from vmconv.formats import Format
from vmconv.image import Image
from vmconv.inplace import neighbours, ownership, rules, shifting, space
from vmconv.inplace.names import UNDO, beside
from vmconv.inplace.rules import Own
from vmconv.layout import Placement
from vmconv.opener import Opener
from vmconv.planner import Action, Plan
from vmconv.sources import Decoded, File
from vmconv.staying import MOST_MOVED
from vmconv.storage import Backend, Survey
from vmconv.targets import located

if TYPE_CHECKING:
    from vmconv.conversion import Conversion

Planned = Callable[[Backend, Survey, File | None], tuple["Conversion", ...]]
"""Returns the conversion that a backend is to make, in place when there is a carrier."""


_UNMARKED = (
    "there is no home to keep a key in: if this is interrupted, only vmconv recover --trust brings the disk back"
)


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
        self,
        image: Image,
        opener: Opener,
        source: str,
        *,
        keep_undo: bool,
        any_owner: bool,
        chain: bool,
        base: str | None,
    ) -> None:
        self.image = image
        self.opener = opener
        self.source = source
        self.keep_undo = keep_undo
        self.any_owner = any_owner
        self.chain = chain
        self.layers: list[Image] = []
        below = os.stat(base) if base else None
        for layer in image.chain():
            if below and os.path.samestat(below, os.fstat(layer.file.descriptor)):
                break
            # The table names the files with the payload; those of the layers below are not open yet.
            layer.guest  # noqa: B018 opens them
            self.layers.append(layer)
            files = tuple(opener.files)
            if not chain:
                break
        self.own = tuple(Own(file, rules.own_name(file)) for file in files)

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(own.file for own in self.own)

    @contextmanager
    def planned(self, wish: Wish) -> Iterator[Way]:
        """Yields the way that turns the source's files into the target."""
        losses = [loss for layer in self.layers for loss in layer.losses]
        rules.refuse_losses(losses, keep_undo=self.keep_undo)
        rules.refuse_links(self.source)
        with ExitStack() as claims:
            # From here on the directory is reached by its descriptor: its owner might exchange it.
            self.directory = claims.enter_context(self._directory(wish))
            self._refuse_led_away()
            self._refuse()
            descriptors = [self._claim(own, claims) for own in self.own]
            yield self._chosen(wish, descriptors)

    def _directory(self, wish: Wish) -> Directory:
        """Returns the directory of the target, which has to be that of the source."""
        with os_errors("cannot be opened", PlanError):
            return Directory.at(wish.directory)

    def _refuse_led_away(self) -> None:
        """Raises `AccessError` where another user's link, on the way to the source, says which file it is."""
        with os_errors("cannot be opened", PlanError):
            directory, name = located(self.source)
        with directory:
            if not directory.holds(name, self.image.file.descriptor):
                raise AccessError(f"{self.source}: was exchanged while it was being looked at", hint="try again")

    def _refuse(self) -> None:
        rules.refuse_places(self.own, self.directory)
        rules.refuse_leftovers(self.directory, self.own)
        if not self.any_owner:
            named = rules.own_name(self.image.file)
            rules.refuse_other_owners(self.directory, named, [own.name for own in self.own], "--any-owner")
        rules.refuse_foreign(self.layers, self.files, self.opener.registry)
        found = neighbours.look(self.directory, self.own, self.opener.registry)
        neighbours.refuse(found)
        unmarked = None if ownership.can_mark() else _UNMARKED
        self.image.warnings += tuple(text for text in (neighbours.warning(found), unmarked) if text)

    def _claim(self, own: Own, claims: ExitStack) -> int:
        """Returns a descriptor to write to a file that nobody else uses, and may not use from now on."""
        locks.refuse_users(own.file)
        with os_errors("cannot be changed", PlanError):
            descriptor = self.directory.open(own.name, os.O_RDWR)
        claims.callback(linux.close, descriptor)
        rules.refuse_exchanged(self.directory, own, descriptor)
        locks.claim(descriptor)
        return descriptor

    @property
    def _owner(self) -> int | None:
        """Whose all files are; None when they may be anybody's."""
        return None if self.any_owner else os.fstat(self.image.file.descriptor).st_uid

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
            if self.keep_undo or not shifting.ability(self.directory):
                raise
            with self._hinting(wish):
                return self._shifted(wish, descriptors, exc)

    def _shared(self, wish: Wish) -> Way | None:
        """Returns the plan of new files that share with the source and then replace it; None where that cannot be."""
        if self.keep_undo:
            # Only the file itself still holds the payload at the places that the old container needs.
            return None
        if not all(attributes.can_give(os.fstat(file.descriptor)) for file in self.files):
            # The new file would be another user's, or another group's.
            return None
        backend = ReplacingBackend(self.own, self.directory, self.image.file, owner=self._owner)
        survey = backend.survey(wish.directory, sources_of(self.image))
        if survey.refusals:
            return None
        names = frozenset(own.name for own in self.own)
        return self._way(backend, wish.planned(backend, survey, None), names)

    def _inside(self, wish: Wish, descriptors: Sequence[int]) -> Way:
        """Returns the plan of changing the file that holds the payload."""
        with self._hinting(wish):
            claim = self._claimed(wish, descriptors)
            backend = InPlaceBackend(claim, keep_undo=self.keep_undo)
            survey = backend.survey(wish.directory, sources_of(self.image))
            conversions = wish.planned(backend, survey, claim.carrier.file)
            plan = conversions[0].plan
            _refuse_moves(plan, claim.carrier.file, wish.target)
        self._refuse_old_undo(beside(plan.files[-1].name, UNDO))
        return self._way(backend, conversions, _own_name(plan, claim.carrier))

    def _shifted(self, wish: Wish, descriptors: Sequence[int], why: PlanError) -> Way:
        """Returns the plan of shifting payload inside its file; raises `why` when that is no help."""
        claim = self._claimed(wish, descriptors)
        backend = ShiftingBackend(claim, keep_undo=False)
        conversions = wish.planned(backend, backend.survey(wish.directory, sources_of(self.image)), None)
        plan = conversions[0].plan
        main = space.carried(plan, claim.carrier.file)
        others = [file for file in plan.files if file is not main and len(file.shares())]
        if plan.copies or others or plan.totals.written > shifting.MOST_WRITTEN:
            raise why
        shifting.placed(main, claim.carrier.file)
        return self._way(backend, conversions, _own_name(plan, claim.carrier))

    def _way(self, backend: Backend, conversions: tuple[Conversion, ...], names: frozenset[str]) -> Way:
        """Returns a way; raises `PlanError` when what is made would refer to what is gone then, or replace others'."""
        if conversions[0].plan.references:
            raise PlanError(
                "in place, the target cannot refer to the source, which is gone then", hint="leave --in-place out"
            )
        if not self.any_owner:
            # Those that are there are replaced with --force, and are no more the image's business than its own.
            made = [file.name for conversion in conversions for file in conversion.plan.files]
            rules.refuse_other_owners(self.directory, rules.own_name(self.image.file), made, "--any-owner")
        return Way(backend, conversions, names)

    def _claimed(self, wish: Wish, descriptors: Sequence[int]) -> Claim:
        file = self._carrier(wish.table)
        carrier = next(own for own in self.own if own.file is file)
        leftovers = tuple(own for own in self.own if own is not carrier)
        descriptor = descriptors[self.own.index(carrier)]
        return Claim(carrier, descriptor, leftovers, self.image.format_name, self.directory, self._owner)

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
        carriers = [file for file in self.files if file in used] or [self.files[-1]]
        if len(used) > 1 or used not in ([], carriers):
            names = ", ".join(source.name for source in used)
            raise PlanError(
                f"{self.source}: its payload lies in {names}; in place, it has to lie in one file of its own",
                hint="-B keeps the layers below" if self.image.parent_reference else "convert to another file",
            )
        return carriers[0]

    def _refuse_old_undo(self, name: str) -> None:
        if self.keep_undo and self.directory.has(name):
            raise PlanError(
                f"{self.directory.join(name)}: already exists", hint="remove it, when it is not needed any more"
            )

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


def _own_name(plan: Plan, carrier: Own) -> frozenset[str]:
    """Returns the name of the file when the target has the same."""
    return frozenset({carrier.name} & {space.carried(plan, carrier.file).name})


def _refuse_moves(plan: Plan, carrier: File, target: Format) -> None:
    """Raises when more than a block would have to move, or something would be written over what is still needed."""
    moved = space.written(space.carried(plan, carrier), Action.COPY)
    inside = space.clipped(moved, 0, carrier.size)
    total = plan.totals.copied
    # What goes to another file than the one that stays is moved, too.
    if total > MOST_MOVED or len(inside) or total != int(moved[:, 1].sum()):
        raise PlanError(f"in place, payload cannot stay where it lies: {target.name} would have to move {total} bytes")
