"""Another parent for a layer, without a change of the guest's disk.

Where the layer has a hole, and the old parent and the new one differ, the old content becomes the layer's own. Ranges
with the same physical blocks are known to be equal, and not read.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.backends.targets import clean, refuse_directory, refuse_kept_names
from vmconv.conversion import pipeline, readback
from vmconv.conversion.containers import Kept, keep_source
from vmconv.conversion.verify import read_back
from vmconv.errors import PlanError, UsageError, VmconvError
from vmconv.inplace import neighbours
from vmconv.inplace.settling import settle
from vmconv.io import locks
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Extents, Kind
from vmconv.model.image import Image
from vmconv.model.layout import Backing
from vmconv.model.plan import CopyReason, Plan, Totals
from vmconv.model.planned import PlannedFile
from vmconv.model.references import plain
from vmconv.model.sources import File
from vmconv.syncing import changes as changing
from vmconv.syncing import old as olds
from vmconv.syncing import replacing
from vmconv.syncing.request import SyncRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmconv.inplace.neighbours import Neighbours
    from vmconv.interface.arguments import Rebasing
    from vmconv.io.registry import Registry
    from vmconv.syncing.old import Old
    from vmconv.syncing.replacing import Replacement


class RebaseResult(NamedTuple):
    """The outcome: `own` bytes of the old parent are the layer's own now; `compared` bytes were read to find them."""

    path: str
    backing_file: str
    format_name: str
    backend: str
    own: int
    compared: int
    totals: Totals
    copies: tuple[CopyReason, ...]
    warnings: tuple[str, ...]
    seconds: float


def rebase(asked: Rebasing, announce: Callable[[Plan], None] | None = None) -> RebaseResult:
    """Gives a layer the parent `backing_file`, or none for an empty name; the guest's disk stays as it is.

    Raises `PlanError` if the format has no parents, or the image would lose snapshots or the like.
    """
    began = time.perf_counter()
    registry = installed()
    request = SyncRequest(
        asked.path,
        asked.path,
        target_format=asked.source_format,
        record=False,
        allow_external=asked.allow_external,
        parents=asked.parents,
    )
    settle(asked.path)
    with ExitStack() as stack:
        place = stack.enter_context(pipeline.places(request.conversion(None, force=True)))[0]
        if place[0].status(place[1]) is None:
            raise PlanError(f"{asked.path}: does not exist")
        refuse_directory(place[0])
        refuse_kept_names(place[0])
        clean(place[0], [place[1]])
        above: list[Neighbours] = []
        old = stack.enter_context(olds.opened(*place, request, (), registry, is_layer=True, judge=above.append))
        # Others know it by its name, and read the same disk as before.
        if hasattr(old.options, "identity"):
            for found in above:
                neighbours.refuse(found)
        kept = _new_parent(asked, old, place[0].path, registry, stack)
        files = [*_files(_old_parent(old.image)), *(_files(kept.image) if kept else ())]
        # A guest that writes to a parent meanwhile would give the layer another disk.
        for file in files:
            locks.share(file)
        table, compared = _table(old.image, kept.image if kept else None)
        made = replacing.planned(old, table, kept, place, registry, files, stack)
        _check(made, old, registry)
        if announce:
            announce(made.conversion.plan)
        own = table.total(Kind.DATA) - old.image.stored.total(Kind.DATA)
        made.run(registry)
    plan = made.conversion.plan
    return RebaseResult(
        asked.path,
        asked.backing_file,
        old.format.name,
        made.way.backend.name,
        own,
        compared,
        plan.totals,
        plan.copies,
        old.image.warnings,
        time.perf_counter() - began,
    )


def _new_parent(asked: Rebasing, old: Old, directory: str, registry: Registry, stack: ExitStack) -> Kept | None:
    """Returns the new parent, open, under the name that the user gave it; None for no name."""
    if not asked.backing_file:
        if asked.backing_format is not None:
            raise UsageError("-F is the format of a parent, and -b names none")
        return None
    if not old.format.supports_backing:
        raise PlanError(f"{asked.path}: {old.format.name} cannot have a backing file")
    opener = stack.enter_context(
        Opener(registry, allow_external=asked.allow_external, force_share=True, format_option="-F", settle=settle)
    )
    parent = opener.image(os.path.join(directory, asked.backing_file), asked.backing_format)
    if any(layer.file.stamp[:2] == old.image.file.stamp[:2] for layer in parent.chain()):
        raise PlanError(f"{asked.backing_file}: is {asked.path} itself, or on top of it")
    kept = keep_source(parent, registry, directory)
    return kept._replace(backing=Backing(plain(asked.backing_file), parent.format_name))


def _old_parent(image: Image) -> Image | None:
    try:
        return image.parent
    except VmconvError as exc:
        exc.hint = exc.hint or "rebase -u changes only the stored name, if the new parent has the same content"
        raise


def _table(image: Image, parent: Image | None) -> tuple[Extents, int]:
    """Returns the layer's table on the new parent, and the number of bytes that were read for it."""
    own, size = image.stored, image.size
    before = _below(image.parent, size)
    if parent is None:
        return own.over(before).without_holes(), 0
    # Only where the layer has holes do its parents matter.
    mask = Extents(size, own.columns._replace(kind=np.minimum(own.kind, np.uint8(Kind.ZERO))), own.sources)
    new, old = mask.over(_below(parent, size)), mask.over(before)
    unknown = changing.by_address(new, old, "")
    nothing = Extents.filled(size, Kind.ZERO)
    new, old = (nothing.replaced(table, unknown.start, unknown.length) for table in (new, old))
    found = changing.by_reading(new, old, "", None)
    differing = Extents.filled(size, Kind.HOLE).replaced(before, found.start, found.length)
    return own.over(differing), found.compared


def _below(parent: Image | None, size: int) -> Extents:
    """Returns what a layer of `size` bytes reads through its holes."""
    if parent is None:
        return Extents.filled(size, Kind.ZERO)
    return parent.flat.window(0, size, Kind.ZERO).without_holes()


def _files(parent: Image | None) -> Iterator[File]:
    """Yields the files of a chain."""
    for layer in parent.chain() if parent else ():
        files = {id(each): each for each in (layer.file, *layer.guest.sources) if isinstance(each, File)}
        yield from files.values()


def _check(made: Replacement, old: Old, registry: Registry) -> None:
    """Raises `VerifyError` unless the planned layer reads on its parent as the present one on its own."""
    containers = made.conversion.containers
    planned = [PlannedFile(out.name or one.name, out.table) for one in containers for out in one.layout.files]
    *_, read = read_back(containers, planned, registry)
    wanted = [layer.guest for layer in old.image.chain()]
    readback.check_places(readback.Sides(old.image.file.name, wanted, read.sides.found, read.sides.layouts))
