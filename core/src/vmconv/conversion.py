"""Conversion: any reader, any writer, any backend, composed at run time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from vmconv.commit import Progress, make
from vmconv.containers import Container, Kept, Target, lay_out, parts_of, sources_of
from vmconv.errors import AccessError, PlanError, UsageError, os_errors
from vmconv.image import Image
from vmconv.known import known_format
from vmconv.layout import Backing
from vmconv.opener import Opener
from vmconv.options import parse_options
from vmconv.planner import CopyReason, Plan, Totals, joined, plan_layout
from vmconv.refusals import refuse_changed, refuse_collisions, refuse_copies, refuse_too_large
from vmconv.registry import Registry, installed
from vmconv.sources import File
from vmconv.storage import Backend, Survey
from vmconv.verify import verify as verify_result

ZeroCopy = Literal["auto", "require"]
Cache = Literal["writeback", "unsafe"]


class Request(NamedTuple):
    """What to convert and how; the names are those of the command line's options.

    `source_format` and `target_format` override what the file names speak of. `chain` makes an image of each layer of
    the source, beside the target. `backing_file` keeps the chain as it is from a layer on: it is the layer that what is
    made will have as its parent, as it is to be written into the target, with `backing_format`.
    `zero_copy="require"` refuses to copy a single byte of payload. `cache="unsafe"` does not wait until the target is
    on storage, as `qemu-img convert` does not.
    """

    source: str
    target: str
    source_format: str | None = None
    target_format: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    snapshot: str | None = None
    chain: bool = False
    backing_file: str | None = None
    backing_format: str | None = None
    backend: str = "auto"
    zero_copy: ZeroCopy = "auto"
    cache: Cache = "writeback"
    force: bool = False
    force_share: bool = False
    allow_external: Sequence[str] = ()


class Result(NamedTuple):
    """What was done: bytes by kind, the reason for each copied byte, what was lost, and the seconds it took.

    `layers` are the files of the images below the target that were made with it, the base last.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    backend: str
    totals: Totals
    copies: tuple[CopyReason, ...]
    losses: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    layers: tuple[str, ...] = ()


class Prepared(NamedTuple):
    """A conversion that was planned and can be made real; its source files are open.

    The images to make are in the order in which they appear: the last is the one that the user named.
    """

    request: Request
    image: Image
    backend: Backend
    containers: tuple[Container, ...]
    plan: Plan
    opener: Opener

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the layers that become images, the top first."""
        return tuple(dict.fromkeys(text for made in reversed(self.containers) for text in made.source.warnings))


@contextmanager
def prepared(request: Request) -> Iterator[Prepared]:
    """Yields the planned conversion: everything has been read and checked, nothing has been touched."""
    registry = installed()
    with Opener(registry, allow_external=request.allow_external, force_share=request.force_share) as opener:
        target = _target(registry, request)
        image = opener.image(request.source, request.source_format, snapshot=request.snapshot)
        kept = _kept(request, target, image)
        parts = parts_of(image, target, registry, kept, chain=request.chain)
        backend, survey = _choose(registry, request.backend, target.directory, sources_of(image))
        containers = lay_out(parts, target, survey.unit, registry, kept)
        plan = joined([_plan(made, target.directory, backend, survey, alone=len(parts) == 1) for made in containers])
        refuse_collisions(plan, opener.files, force=request.force)
        yield Prepared(request, image, backend, tuple(containers), plan, opener)


def run(
    request: Request,
    *,
    verify: bool = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Plans and makes one conversion; see `vmconv.api.convert`."""
    began = time.perf_counter()
    with prepared(request) as ready:
        refuse_copies(request.target, request.zero_copy, ready.plan)
        refuse_too_large(ready.plan)
        if announce:
            announce(ready.plan)
        _make(ready, verify=verify, progress=progress)
        return Result(
            request.source,
            request.target,
            ready.image.format_name,
            ready.containers[-1].format.name,
            ready.backend.name,
            ready.plan.totals,
            ready.plan.copies,
            ready.plan.losses,
            ready.warnings,
            time.perf_counter() - began,
            tuple(made.name for made in ready.containers[-2::-1]),
        )


def _make(ready: Prepared, *, verify: bool, progress: Progress | None) -> None:
    """Makes all files of the plan appear, or none."""
    durable = ready.request.cache != "unsafe"
    transaction = ready.backend.begin(ready.plan.directory, force=ready.request.force, durable=durable)
    try:
        with os_errors(f"{ready.request.target}: cannot be written"):
            files = make(ready.plan, transaction, progress)
        if verify:
            verify_result(ready.containers, files, ready.opener.registry)
        refuse_changed(ready.opener.files)
        transaction.commit()
    finally:
        transaction.abort()


def _plan(made: Container, directory: str, backend: Backend, survey: Survey, *, alone: bool) -> Plan:
    """Returns the plan of one image; where there are several, its losses say whose they are."""
    losses = tuple(loss if alone else f"{made.source.file.name}: {loss}" for loss in made.losses())
    return plan_layout(made.layout, made.name, directory, backend.name, survey, losses)


def _target(registry: Registry, request: Request) -> Target:
    """Returns what is to be made; a symbolic link is followed, so that it goes on naming the file."""
    wanted = registry.format(_target_format(registry, request))
    options = parse_options(wanted.options(), request.options, wanted.name)
    path = os.path.realpath(request.target)
    directory, name = os.path.split(path)
    if not os.path.isdir(directory):
        raise PlanError(f"{request.target}: its directory does not exist")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise PlanError(f"{request.target}: is not a regular file")
    return Target(wanted, options, directory, name)


def _target_format(registry: Registry, request: Request) -> str:
    if os.path.isdir(request.target):
        raise PlanError(f"{request.target}: is a directory", hint="name the file to make in it")
    name = request.target_format or registry.format_by_suffix(request.target)
    if name is None:
        raise UsageError(f"{request.target}: its name speaks of no format", hint="name the format with -O")
    return name


def _kept(request: Request, target: Target, image: Image) -> Kept | None:
    """Returns the layer of the source that becomes the parent of what is made, as it is."""
    if request.backing_file is None:
        if request.backing_format is not None:
            raise UsageError("a backing format needs a backing file", hint="name it with -B")
        return None
    if not target.format.can_back:
        raise UsageError(f"{target.format.name} cannot have a backing file")
    path = os.path.join(os.path.dirname(request.target), request.backing_file)
    with os_errors("cannot be used as backing file", AccessError):
        wanted = os.stat(path)
    for layer in image.chain():
        if layer is not image and (layer.file.stamp.device, layer.file.stamp.inode) == (wanted.st_dev, wanted.st_ino):
            said = request.backing_format or layer.format_name
            known = known_format(said)
            return Kept(layer, Backing(request.backing_file, known.name if known else said))
    raise PlanError(
        f"{path}: is not a backing file of {image.file.name}",
        hint="-B keeps a part of the source's own chain; its path is relative to the target's directory",
    )


def _choose(registry: Registry, name: str, directory: str, files: Sequence[File]) -> tuple[Backend, Survey]:
    """Returns the backend that shares something, or else the one that copies, with the reasons for copying."""
    if name != "auto":
        backend = registry.backend(name)
        ability = backend.ability(directory)
        if not ability.usable:
            raise PlanError(f"backend {name} cannot be used in {directory}: {ability.reason}")
        return backend, backend.survey(directory, files)
    refusals: dict[int, str] = {}
    for backend in registry.backends.values():
        if backend.automatic and backend.name != "copy":
            survey = backend.survey(directory, files)
            if len(survey.refusals) < len(files) or not files:
                return backend, survey
            refusals = {**survey.refusals, **refusals}
    return registry.backend("copy"), Survey(1, refusals)
