"""The planning of a sync: what changed, and the way that moves only that."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vmconv.conversion import pipeline
from vmconv.conversion.choice import choose_backend
from vmconv.conversion.containers import Container, Target
from vmconv.conversion.planner import merge_plans
from vmconv.conversion.verify import planned_image
from vmconv.errors import PlanError
from vmconv.interface.backend import Access, Backend, Proposal, Transaction
from vmconv.model.extents import Extents, Kind, distinct
from vmconv.model.identity import fresh
from vmconv.model.image import Image
from vmconv.model.sources import Decoded, File
from vmconv.syncing import changes as changing
from vmconv.syncing.changes import Changes
from vmconv.syncing.evidence import UNCHANGED, Evidence
from vmconv.syncing.request import SyncPlan

if TYPE_CHECKING:
    from vmconv.conversion.pipeline import Conversion
    from vmconv.conversion.request import Request
    from vmconv.io.directory import Directory
    from vmconv.io.opener import Opener
    from vmconv.model.plan import Plan, Progress
    from vmconv.syncing.in_place import Place, SyncBackend
    from vmconv.syncing.old import Old
    from vmconv.syncing.record import Record
    from vmconv.syncing.request import SyncRequest

_BLOCK = 4096
"""Changes are widened to blocks that any filesystem can share, bytes."""


class Ready(NamedTuple):
    """A planned sync; all files are open. `image` is the source, `state` and `identity` its digests for the record.

    `record` is that of the last sync, if the target is as it was then, with `is_recorded` beyond doubt and of this
    source. `place` is the target's file, if that itself is
    changed. `begin` returns the transaction. `files` may not
    change until the target has its name.
    """

    request: SyncRequest
    conversion: Request
    image: Image
    plan: SyncPlan
    containers: tuple[Container, ...]
    backend: Backend | None
    begin: Callable[[], Transaction] | None
    files: tuple[File, ...]
    old: Old | None
    state: str
    identity: str
    record: Record | None
    place: Place | None
    is_recorded: bool = False


class _AsItLies(Image):
    """A disk whose writer sees windows onto holes of a file as payload: they have a place in it."""

    @property
    def flat(self) -> Extents:
        return self.guest


class Planning:
    """The planning of one sync of an existing target."""

    def __init__(
        self,
        request: SyncRequest,
        image: Image,
        opener: Opener,
        old: Old,
        place: tuple[Directory, str],
        *,
        comparing: Progress | None,
        stack: ExitStack,
    ) -> None:
        directory, name = place
        self.stack = stack
        self.place: Place | None = None
        self._read: tuple[tuple[Container, ...], Image] | None = None
        self.request = request
        self.image = image
        self.opener = opener
        self.old = old
        self.directory = directory
        self.registry = opener.registry
        self.comparing = comparing
        self.asked = request.conversion(old.format.name, force=True)
        self.evidence = Evidence(request, self.asked, image, old, self.registry)
        found = Target.of(old.format, old.options, directory.path, name)
        stated = old.image.facts.identity
        identity = found.identity if stated is None else stated.bytes
        self.target = found._replace(identity=identity, content=fresh())

    def ready(self) -> Ready:
        """Returns the plan. Raises `PlanError` if the disk would shrink, or the target is another's."""
        shares_all = self._shares_all()
        # Nothing has to be laid out to find that nothing changed.
        if self.evidence.is_recorded and not (self.request.compare or shares_all):
            return self._ready(SyncPlan(UNCHANGED, 0, 0, 0, None), self.old.files)
        changes, made, way = self._planned(shares_all)
        self._refuse_names(made.plan)
        size = self._result(made.containers).size
        if size < self.old.image.size and not self.request.shrink:
            raise PlanError(
                f"{self.request.target}: has a disk of {self.old.image.size} bytes, the source has {self.image.size}",
                hint="--shrink cuts the rest off, and what is in it",
            )
        same = not changes.bytes and size == self.old.image.size
        plan = SyncPlan(changes.evidence, changes.bytes, len(changes.start), changes.compared, None)
        begin = partial(
            way.backend.begin,
            self.directory,
            force=True,
            durable=self.request.cache != "unsafe",
            access=Access(self.opener.files),
        )
        kept = [file for file in self.old.files if not way.carrier or file.stamp[:2] != way.carrier.stamp[:2]]
        files = [*kept, *([way.carrier] if way.carrier else [])]
        return self._ready(plan if same else plan._replace(plan=made.plan), files, made.containers, way.backend, begin)

    def _ready(
        self,
        plan: SyncPlan,
        files: list[File],
        containers: tuple[Container, ...] = (),
        backend: Backend | None = None,
        begin: Callable[[], Transaction] | None = None,
    ) -> Ready:
        return Ready(
            self.request,
            self.asked,
            self.image,
            plan,
            containers,
            backend,
            begin,
            (*self.opener.files, *files),
            self.old,
            self.evidence.state,
            self.evidence.identity,
            self.evidence.record,
            self.place,
            self.evidence.is_recorded,
        )

    # -- the ways

    def _planned(self, shares_all: bool) -> tuple[Changes, Conversion, Proposal]:
        """Returns what changed, and the conversion by the first way that moves only that, if there is one."""
        new, old = self.image.flat, self.old.image.flat
        found = self.evidence.learned()
        if shares_all:
            # Compared for the report only: all payload is shared with the source.
            found = changing.by_address(new, old, "physical addresses: other blocks are at other places")
            if not self.evidence.is_same_disk:
                self._refuse_other_disk(found)
            return found, *self._shared(new)
        if self._may_share(old):
            found = self._known(found).widened(_BLOCK, max(new.size, old.size))
            return found, *self._shared(changing.merged(old, new, found.widened(_BLOCK, new.size)))
        if found is not None and not found.bytes:
            return found, *self._shared(new)
        way = self._in_place(found)
        if not isinstance(way, str):
            return way
        return changing.everything(new.size, f"none: all is copied, because {way}"), *self._shared(new)

    def _known(self, found: Changes | None) -> Changes:
        """Returns the changes, found by reading both disks if nothing else tells them."""
        if found is None:
            found = changing.by_reading(self.image.flat, self.old.image.flat, self.evidence.reason, self.comparing)
            self._refuse_other_disk(found)
        return found

    def _shared(self, table: Extents) -> tuple[Conversion, Proposal]:
        """Returns the conversion of a table to new files, which share what they can."""
        disk = self._disk(table)
        way = choose_backend(self.registry, "auto", self.directory.path, disk.payload_files())
        return pipeline.conversion_of(self.asked, self.target, disk, way, self.registry, None), way

    def _in_place(self, found: Changes | None) -> tuple[Changes, Conversion, Proposal] | str:
        """Returns the conversion inside the target's file, or why there is none."""
        # Imported late: most targets are made anew.
        from vmconv.syncing import in_place

        new, old = self.image.flat, self.old.image.flat
        try:
            place = in_place.opened(self.old, self.directory)
        except PlanError as exc:
            return str(exc)
        self.stack.callback(os.close, place.descriptor)
        backend = in_place.SyncBackend(place, self.old, self.directory)
        ways = [self._stay, self._overwrite]
        if found is None:
            # Before both disks are read: whether the present payload could stay.
            tried = [way(backend, changing.nothing("")) for way in ways]
            ways = [way for way, made in zip(ways, tried, strict=True) if not isinstance(made, str)]
            if not ways:
                return str(tried[-1])
        found = self._known(found).widened(_BLOCK, max(new.size, old.size))
        for way in ways:
            made = way(backend, found)
            if not isinstance(made, str):
                self.place = place
                return found, *made
        return str(made)

    def _stay(self, backend: SyncBackend, changes: Changes) -> tuple[Conversion, Proposal] | str:
        """Returns the conversion that appends what changed, in whole clusters, or why there is none."""
        if not self.old.format.in_place:
            return f"{self.old.format.name} cannot have payload at other places"
        new, old = self.image.flat, self.old.image.flat
        unit = max(_BLOCK, self.old.image.details.get("cluster-size", _BLOCK))
        disk = self._disk(changing.merged(old, new, changes.widened(unit, new.size)))
        way = self._proposal(backend, disk)
        try:
            return self._settled(
                backend, pipeline.conversion_of(self.asked, self.target, disk, way, self.registry, None), way
            )
        except PlanError as exc:
            return str(exc)

    def _overwrite(self, backend: SyncBackend, changes: Changes) -> tuple[Conversion, Proposal] | str:
        """Returns the conversion that writes what changed where the file has it now, or why there is none."""
        new, carrier = self.image.flat, backend.place.carrier.file
        changes = changes.widened(1, new.size)
        # Not through the holes of the file: a block of zeros has its place, too.
        old = self.old.image.guest.window(0, new.size, Kind.ZERO).without_holes()
        disk = self._disk(changing.merged(self.old.image.flat, new, changes))
        way = self._proposal(backend, disk)
        try:
            shape = self._disk(changing.allocated(old, new, changes), kind=_AsItLies)
            freely = way._replace(carrier=None)
            made = pipeline.conversion_of(self.asked, self.target, shape, freely, self.registry, None)
            return self._settled(
                backend, self._filled(made, disk, changing.overwritten(old, new, changes, carrier), way), way
            )
        except (PlanError, ValueError) as exc:
            return str(exc)

    def _filled(self, made: Conversion, disk: Image, content: Extents, way: Proposal) -> Conversion:
        """Returns the conversion with new content of the file that keeps its shape."""
        carrier = way.carrier
        assert carrier
        containers, plans = [], []
        for one in made.containers:
            files = tuple(out._replace(table=out.table.through(carrier, content)) for out in one.layout.files)
            filled = one._replace(source=disk, disk=disk, layout=one.layout._replace(files=files))
            containers.append(filled)
            plans.append(pipeline.plan_of(filled, self.directory.path, way.backend, way.survey, alone=True))
        return made._replace(containers=tuple(containers), plan=merge_plans(plans))

    def _proposal(self, backend: SyncBackend, disk: Image) -> Proposal:
        return Proposal(backend, backend.survey(self.directory.path, disk.payload_files()), backend.place.carrier.file)

    def _settled(self, backend: SyncBackend, made: Conversion, way: Proposal) -> tuple[Conversion, Proposal] | str:
        """Returns the conversion, or why it cannot be made in place. Raises `PlanError` if payload would move."""
        if self.old.format.options_of(self._result(made.containers)) != self.old.options:
            return f"{self.old.format.name} would get other options in place"
        backend.settle(made.plan)
        if backend.rolls_forward:
            twice = (copy._replace(reason=f"{copy.reason}: written to a journal first") for copy in made.plan.copies)
            made = made._replace(plan=made.plan._replace(copies=tuple(twice)))
        return made, way

    def _refuse_other_disk(self, changes: Changes) -> None:
        """Raises `PlanError` if source and target have payload, and nothing of it is known to be equal."""
        new, old = self.image.flat, self.old.image.flat
        if self.request.force or not (changes.certain and new.total(Kind.DATA) and old.total(Kind.DATA)):
            return
        if not _common(new, old, changes):
            raise PlanError(
                f"{self.request.target}: has nothing in common with {self.request.source}",
                hint="--force replaces it all the same",
            )

    # -- the plan

    def _shares_all(self) -> bool:
        """True if all payload can be shared with the source."""
        flat = self.image.flat
        used = [flat.sources[index] for index in distinct(flat.source[flat.kind == Kind.DATA]).tolist()]
        if any(isinstance(source, Decoded) for source in used):
            return False
        return not choose_backend(
            self.registry, "auto", self.directory.path, self.image.payload_files()
        ).survey.refusals

    def _may_share(self, old: Extents) -> bool:
        """True if the new target can share blocks with the old one."""
        files = [source for source in old.sources if isinstance(source, File)]
        return not choose_backend(self.registry, "auto", self.directory.path, files).survey.refusals

    def _disk(self, table: Extents, kind: type[Image] = Image) -> Image:
        """Returns the disk to write: the new table, with the facts of the old target."""
        return kind(
            self.image.format_name,
            self.image.file,
            table.size,
            lambda: table,
            facts=self.old.image.facts,
            losses=self.image.losses,
            warnings=(*self.image.warnings, *self.old.image.warnings),
        )

    def _refuse_names(self, plan: Plan) -> None:
        for file in plan.files:
            if file.name not in self.old.names and self.directory.has(file.name):
                raise PlanError(
                    f"{self.directory.join(file.name)}: already exists, and is no part of the target",
                    hint="move it away",
                )
        # An image names its parts, and could name any file of its directory.
        for name in sorted(self.old.names - {file.name for file in plan.files}):
            raise PlanError(
                f"{self.directory.join(name)}: is a part of the target, and has not the name that vmconv gives it",
                hint="convert it again: vmconv convert --force",
            )

    def _result(self, containers: tuple[Container, ...]) -> Image:
        """Returns the planned image."""
        if not (self._read and self._read[0] is containers):
            self._read = containers, planned_image(containers, self.registry)
        return self._read[1]


def _common(new: Extents, old: Extents, changes: Changes) -> int:
    """Returns the bytes of payload that both disks have, and that are known to be equal."""
    kept = changing.merged(Extents.filled(new.size), new.window(0, new.size), changes.widened(1, new.size))
    same = new.total(Kind.DATA) - kept.total(Kind.DATA)
    return min(same, old.total(Kind.DATA))
