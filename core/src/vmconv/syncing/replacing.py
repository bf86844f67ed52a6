"""A layer that gets another table: in a new file that shares what it can, or behind the end of its own file."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vmconv.conversion import pipeline
from vmconv.conversion.choice import choose_backend
from vmconv.conversion.containers import Kept, Target
from vmconv.conversion.execute import carry_out
from vmconv.conversion.refusals import refuse_too_large
from vmconv.conversion.request import Request
from vmconv.conversion.verify import planned_image
from vmconv.conversion.verify import verify as verify_result
from vmconv.errors import PlanError
from vmconv.interface.backend import Access, Proposal
from vmconv.model.extents import Extents
from vmconv.model.identity import fresh
from vmconv.model.image import Image
from vmconv.model.sources import File
from vmconv.syncing import in_place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmconv.conversion.pipeline import Conversion
    from vmconv.io.directory import Directory
    from vmconv.io.registry import Registry
    from vmconv.syncing.old import Old


class Replacement(NamedTuple):
    """A planned layer: its conversion, the way, and the files that may not change meanwhile."""

    conversion: Conversion
    way: Proposal
    directory: Directory
    files: tuple[File, ...]

    def run(self, registry: Registry, done: Callable[[], None] = lambda: None) -> None:
        """Makes the layer, reads it back, and gives it the name of the old one."""
        refuse_too_large(self.conversion.plan)
        access = Access(list(self.files))
        carry_out(
            self.conversion.plan,
            self.way.backend.begin(self.directory, force=True, durable=True, access=access),
            self.files,
            self.conversion.request.target,
            verify=lambda files: verify_result(self.conversion.containers, files, registry),
            progress=None,
            created=None,
            done=done,
        )


def planned(
    old: Old,
    table: Extents,
    kept: Kept | None,
    place: tuple[Directory, str],
    registry: Registry,
    sources: Sequence[File],
    stack: ExitStack,
) -> Replacement:
    """Returns the plan of the layer `old` with another table, on the parent `kept`; `sources` are files of its rows."""
    directory, name = place
    target = _target(old, directory, name)
    disk = Image(
        old.format.name,
        old.image.file,
        table.size,
        lambda: table,
        load_parent=(lambda: kept.image) if kept else None,
        facts=old.image.facts,
        losses=old.image.losses,
    )
    asked = Request(directory.join(name), directory.join(name), target_format=old.format.name, force=True)
    # Those of the parent, too: a unit that the layer has only a part of is filled from there.
    way = choose_backend(registry, "auto", directory.path, disk.payload_files())
    if way.survey.refusals:
        inside = _inside(asked, target, disk, kept, old, directory, registry, stack)
        if inside:
            conversion, way = inside
            return _settled(old, conversion, way, directory, sources)
    conversion = pipeline.conversion_of(asked, target, disk, way, registry, kept)
    return _settled(old, conversion, way, directory, sources)


def _target(old: Old, directory: Directory, name: str) -> Target:
    found = Target.of(old.format, old.options, directory.path, name)
    stated = old.image.facts.identity
    return found._replace(identity=found.identity if stated is None else stated.bytes, content=fresh())


def _inside(
    asked: Request,
    target: Target,
    disk: Image,
    kept: Kept | None,
    old: Old,
    directory: Directory,
    registry: Registry,
    stack: ExitStack,
) -> tuple[Conversion, Proposal] | None:
    """Returns the conversion inside the layer's own file, None if its format or storage does not allow it."""
    if not old.format.in_place:
        return None
    try:
        place = in_place.opened(old, directory)
        stack.callback(os.close, place.descriptor)
        backend = in_place.SyncBackend(place, old, directory)
        way = Proposal(backend, backend.survey(directory.path, disk.payload_files()), place.carrier.file)
        made = pipeline.conversion_of(asked, target, disk, way, registry, kept)
        if old.format.options_of(planned_image(made.containers, registry)) != old.options:
            return None
        backend.settle(made.plan)
    except PlanError:
        return None
    return made, way


def _settled(
    old: Old, conversion: Conversion, way: Proposal, directory: Directory, sources: Sequence[File]
) -> Replacement:
    """Returns the replacement. Raises `PlanError` if files of other names would be made, or some would be left."""
    names = {file.name for file in conversion.plan.files}
    for name in sorted(names - old.names):
        if directory.has(name):
            raise PlanError(f"{directory.join(name)}: already exists, and is no part of the image", hint="move it away")
    for name in sorted(old.names - names):
        raise PlanError(
            f"{directory.join(name)}: is a part of the image, and has not the name that vmconv gives it",
            hint="convert the image to a new file first",
        )
    own = [file for file in old.files if not way.carrier or file.stamp[:2] != way.carrier.stamp[:2]]
    return Replacement(conversion, way, directory, (*sources, *own, *([way.carrier] if way.carrier else [])))
