"""Brings the content of layers into their base: a sync of the base, with the layers' own rows as evidence.

The base is complete and verified before it counts. The layers still hide all that was brought into it, so the disk of
the top is the same at each moment. Only then an empty layer replaces the top.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import claim_for_replacement, clean, locate, refuse_directory, refuse_kept_names
from vmconv.conversion import pipeline, readback
from vmconv.conversion.containers import Kept
from vmconv.conversion.refusals import refuse_too_large
from vmconv.conversion.request import Request
from vmconv.conversion.results import Results
from vmconv.conversion.verify import read_back
from vmconv.errors import AccessError, PlanError, UsageError, VmconvError, warn
from vmconv.inplace.rules import own_name
from vmconv.inplace.settling import settle
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing
from vmconv.model.plan import CopyReason, Plan, Totals
from vmconv.model.planned import PlannedFile
from vmconv.model.references import name_for
from vmconv.model.sources import File, stamp_of
from vmconv.syncing import changes as changing
from vmconv.syncing import old as olds
from vmconv.syncing import replacing
from vmconv.syncing.evidence import Evidence
from vmconv.syncing.pipeline import replace as replace_target
from vmconv.syncing.planning import Planning
from vmconv.syncing.request import SyncRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmconv.conversion.containers import Container
    from vmconv.inplace.neighbours import Neighbours
    from vmconv.interface.arguments import Committing
    from vmconv.io.directory import Directory
    from vmconv.model.sources import Stamp
    from vmconv.syncing.changes import Changes
    from vmconv.syncing.old import Old


class CommitResult(NamedTuple):
    """The outcome: the base, the bytes brought into it by kind, and whether the top is an empty layer now."""

    path: str
    base: str
    base_format: str
    backend: str
    totals: Totals
    copies: tuple[CopyReason, ...]
    emptied: bool
    warnings: tuple[str, ...]
    seconds: float


_NOTHING = Totals(0, 0, 0, 0, 0)


class _Top(NamedTuple):
    """What is needed of the top once its files are closed; `path` leads through no link to its name."""

    path: str
    format: str
    size: int
    stamp: Stamp
    facts: dict[str, object]
    options: dict[str, object]
    reference: str


def commit(asked: Committing, announce: Callable[[Plan], None] | None = None) -> CommitResult:
    """Brings the layers from `asked.path` down to its base into that, and empties the top.

    Raises `PlanError` if the base has other layers than these, without `force`.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        made = _Commit(asked, stack)
        plan, backend = made.run(announce)
    if made.empties:
        _empty(asked, made.top, made.base)
    return CommitResult(
        asked.path,
        made.base.file.path,
        made.base.format_name,
        backend,
        plan.totals if plan else _NOTHING,
        plan.copies if plan else (),
        made.empties,
        made.warnings,
        time.perf_counter() - began,
    )


class _Commit:
    """One commit up to the new base; files stay open until the stack closes them."""

    def __init__(self, asked: Committing, stack: ExitStack) -> None:
        self.asked, self.stack = asked, stack
        self.registry = installed()
        if not asked.keep_top:
            _refuse_kept(asked.path)
        self.opener = stack.enter_context(
            Opener(
                self.registry,
                allow_external=asked.allow_external,
                backing_format=asked.source_backing_format,
                settle=settle,
            )
        )
        image = self.opener.image(asked.path, asked.source_format)
        self.upper, self.base, self.own = _layers(image, self.opener, asked)
        self.empties = not asked.keep_top and len(self.upper) == 1
        # Its claim would find this run's own lock.
        for file in [file for file in self.opener.files if file not in self.own]:
            self.opener.release(file)
        self.request = SyncRequest(
            asked.path,
            self.base.file.path,
            target_format=self.base.format_name,
            record=False,
            force=asked.force,
            allow_external=asked.allow_external,
            source_backing_format=asked.source_backing_format,
            parents=None,
        )
        self.warnings = tuple(
            f"{layer.file.name}: lies between, and no longer reads its own disk" for layer in self.upper[1:]
        )
        if self.empties:
            self._prepare_empty(image)
        ((self.directory, self.name),) = stack.enter_context(pipeline.places(self.request.conversion(None, force=True)))
        refuse_directory(self.directory)
        refuse_kept_names(self.directory)
        # The empty layer of a killed run would look like another layer on the base.
        clean(self.directory, [self.name])
        self.old = self._old()

    def _prepare_empty(self, image: Image) -> None:
        """Notes what the empty layer needs. Raises `PlanError` if the top cannot be replaced, or would lose content."""
        if image.losses:
            raise PlanError(f"{image.file.name}: would lose {image.losses[0]}", hint="-d leaves it as it is")
        directory, name = locate(self.asked.path)
        with directory:
            self.top = _top(image, self.base, directory, name, self.registry)

    def _old(self) -> Old:
        """Returns the base, locked."""
        mine = [own_name(file) for file in self.own if self.directory.holds(own_name(file), file.descriptor)]
        old = self.stack.enter_context(
            olds.opened(
                self.directory,
                self.name,
                self.request,
                (),
                self.registry,
                is_layer=True,
                but=mine,
                judge=self._judge,
            )
        )
        if old.image.file.stamp != self.base.file.stamp:
            raise AccessError(f"{self.base.file.path}: changed while it was being examined", hint="try again")
        self.warnings += old.image.warnings
        return old

    def _judge(self, found: Neighbours) -> None:
        """Raises `PlanError` if another layer is on the base, or warns if that is allowed."""
        if not found.refers:
            return
        name, own = found.refers
        said = f"{name}: is on top of {own}, too, and would read another disk"
        if not self.asked.force:
            raise PlanError(said, hint=f"convert {name} first, flattening it, or --force")
        warn(said)

    def run(self, announce: Callable[[Plan], None] | None) -> tuple[Plan | None, str]:
        """Makes the new base; returns its plan, None if nothing was to be brought into it, and the backend."""
        size = max(self.upper[0].size, self.base.size)
        rows = self.upper[0].onto(self.base).guest.window(0, size, Kind.HOLE)
        if size == self.base.size and not (rows.kind != Kind.HOLE).any():
            return None, "none"
        if self.old.image.parent is None:
            return self._synced(rows, announce)
        return self._layered(rows, self.old.image.parent, announce)

    def _synced(self, rows: Extents, announce: Callable[[Plan], None] | None) -> tuple[Plan | None, str]:
        """Makes a base without a parent, by a sync."""
        old = self.old
        image = Image(old.image.format_name, self.upper[0].file, rows.size, lambda: rows, load_parent=lambda: old.image)
        place = self.directory, self.name
        planning = Planning(self.request, image, self.opener, old, place, comparing=None, stack=self.stack)
        planning.evidence = _Rows(self.request, planning.asked, image, old, self.registry)
        ready = planning.ready()
        plan = ready.plan.plan
        if plan is None or ready.backend is None:
            return None, "none"
        self._check(ready.containers, plan, announce)
        replace_target(ready, plan, "metadata", None, None, lambda: None)
        return plan, ready.backend.name

    def _layered(
        self, rows: Extents, parent: Image, announce: Callable[[Plan], None] | None
    ) -> tuple[Plan | None, str]:
        """Makes a base that is itself a layer."""
        reference = self.old.image.parent_reference or name_for(parent.file, self.directory.path)
        kept = Kept(parent, Backing(reference, parent.format_name))
        table = rows.over(self.old.image.guest)
        made = replacing.planned(
            self.old, table, kept, (self.directory, self.name), self.registry, self.own, self.stack
        )
        self._check(made.conversion.containers, made.conversion.plan, announce)
        made.run(self.registry)
        return made.conversion.plan, made.way.backend.name

    def _check(self, containers: Sequence[Container], plan: Plan, announce: Callable[[Plan], None] | None) -> None:
        """Raises unless the layers read the same disk on the planned base as on the present one."""
        planned = [PlannedFile(out.name or made.name, out.table) for made in containers for out in made.layout.files]
        *_, made = read_back(containers, planned, self.registry)
        wanted = [layer.guest for layer in (*self.upper, *self.old.image.chain())]
        # As the emptied top reads.
        found = [Extents.filled(self.upper[0].size, Kind.HOLE), *made.sides.found]
        readback.check_places(readback.Sides(self.asked.path, wanted, found, made.sides.layouts))
        self._refuse_other_id(made.image, planned)
        refuse_too_large(plan)
        if announce:
            announce(plan)

    def _refuse_other_id(self, base: Image, files: Sequence[File]) -> None:
        """Raises `PlanError` if the lowest layer would not accept the planned base as its parent."""
        lowest = self.upper[-1]
        opener = _OnPlanned(self.registry, base)
        for file in files:
            opener.add(file.name, file, self.old.format)
        try:
            self.registry.format(lowest.format_name).read(lowest.file, opener).parent  # noqa: B018 asks for it
        except VmconvError as exc:
            raise PlanError(
                f"{lowest.file.name}: knows its parent by an id of its content, which changes: {exc}",
                hint=f"make the merged disk a new image, which replaces {self.base.file.name} and all its layers: "
                f"vmconv convert -O {self.base.format_name} {self.asked.path} NEW",
            ) from exc


def _refuse_kept(path: str) -> None:
    """Raises `PlanError` or `AccessError` if the file cannot be replaced."""
    settle(path)
    directory, name = locate(path)
    with directory:
        refuse_directory(directory)
        refuse_kept_names(directory)
        clean(directory, [name])
        if directory.status(name):
            with claim_for_replacement(directory, name):
                pass


class _Rows(Evidence):
    """The layers' own rows are what changed."""

    is_recorded = False
    is_same_disk = True

    def learned(self) -> Changes | None:
        return changing.by_layers(self.image, self.old.image, "what the layers hold")


class _OnPlanned(Results):
    """Opens the planned base as the parent of a layer, under any name."""

    def __init__(self, registry: Registry, base: Image) -> None:
        super().__init__(registry)
        self.base = base

    def named_parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        return self.base


def _layers(image: Image, opener: Opener, asked: Committing) -> tuple[list[Image], Image, list[File]]:
    """Returns the layers above the base, the top first, the base, and the open files of these layers."""
    if image.kind != "disk":
        raise UsageError(f"{image.file.name}: is a memory image")
    wanted = None if asked.base is None else _identity(image, asked.base)
    upper: list[Image] = []
    layer: Image | None = image
    while layer is not None:
        layer.guest  # noqa: B018 opens its files
        upper.append(layer)
        files = list(opener.files)
        layer = layer.parent
        if layer is not None and (wanted is None or layer.file.stamp[:2] == wanted):
            return upper, layer, files
    if wanted is None:
        raise PlanError(f"{image.file.name}: has no base, so there is nothing to bring its content into")
    raise PlanError(f"{asked.base}: is no layer below {image.file.name}", hint="vmconv info --backing-chain lists them")


def _identity(image: Image, base: str) -> tuple[int, int]:
    """Returns device and inode of the base that the user named, from here or from the image's directory."""
    beside = os.path.join(os.path.dirname(image.file.path), base)
    for path in (base, beside):
        try:
            return stamp_of(os.stat(path))[:2]
        except FileNotFoundError:
            continue
    raise PlanError(f"{base}: does not exist")


def _top(image: Image, base: Image, directory: Directory, name: str, registry: Registry) -> _Top:
    options = registry.format(image.format_name).options_of(image)
    reference = image.parent_reference
    if not reference or not _leads_to(os.path.join(directory.path, reference), base.file):
        reference = name_for(base.file, directory.path)
    facts = {name: value for name, value in image.facts.stated() if name != "identity"}
    path = directory.join(name)
    return _Top(path, image.format_name, image.size, image.file.stamp, facts, vars(options), reference)


def _leads_to(path: str, file: File) -> bool:
    try:
        return stamp_of(os.stat(path))[:2] == file.stamp[:2]
    except OSError:
        return False


def _empty(asked: Committing, top: _Top, base: Image) -> None:
    """Replaces the top by an empty layer of its size, options and ids on the new base."""

    def unchanged(_: Plan) -> None:
        if stamp_of(os.stat(asked.path)) != top.stamp:
            raise AccessError(
                f"{asked.path}: was written to meanwhile, and is kept as it is",
                hint="it is right on its base; commit again",
            )

    request = Request(
        top.path,
        top.path,
        target_format=top.format,
        options=top.options,  # type: ignore[arg-type]
        backing_file=top.reference,
        backing_format=base.format_name,
        blank=top.size,
        facts=top.facts,  # type: ignore[arg-type]
        force=True,
        allow_external=asked.allow_external,
        source_backing_format=asked.source_backing_format,
    )
    pipeline.run(request, announce=unchanged)
