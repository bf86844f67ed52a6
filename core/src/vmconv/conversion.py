"""Conversion: any reader, any writer, any backend, composed at run time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from vmconv.commit import Progress, make
from vmconv.errors import AccessError, PlanError, UsageError, ZeroCopyError, os_errors
from vmconv.extents import Extents
from vmconv.formats import Format
from vmconv.image import Image
from vmconv.layout import Backing, Layout, Placement
from vmconv.opener import Opener
from vmconv.options import parse_options
from vmconv.planner import CopyReason, Plan, Totals, plan_layout
from vmconv.registry import Registry, installed
from vmconv.sources import File
from vmconv.storage import Backend, Survey
from vmconv.verify import verify as verify_result

ZeroCopy = Literal["auto", "require"]
Cache = Literal["writeback", "unsafe"]


class Request(NamedTuple):
    """What to convert and how; the names are those of the command line's options.

    `source_format` and `target_format` override what the file names speak of. `backing_file` keeps the chain: it is
    the layer that the target will have as its parent, as it is to be written into the target, with `backing_format`.
    `zero_copy="require"` refuses to copy a single byte of payload. `cache="unsafe"` does not wait until the target is
    on storage, as `qemu-img convert` does not.
    """

    source: str
    target: str
    source_format: str | None = None
    target_format: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    snapshot: str | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    backend: str = "auto"
    zero_copy: ZeroCopy = "auto"
    cache: Cache = "writeback"
    force: bool = False
    force_share: bool = False
    allow_external: Sequence[str] = ()


class Result(NamedTuple):
    """What was done: bytes by kind, the reason for each copied byte, what was lost, and the seconds it took."""

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


class Prepared(NamedTuple):
    """A conversion that was planned and can be made real; its source files are open."""

    request: Request
    image: Image
    format: Format
    backend: Backend
    layout: Layout
    plan: Plan
    below: Extents | None
    opener: Opener


@contextmanager
def prepared(request: Request) -> Iterator[Prepared]:
    """Yields the planned conversion: everything has been read and checked, nothing has been touched."""
    registry = installed()
    with ExitStack() as stack:
        opener = stack.enter_context(
            Opener(registry, allow_external=request.allow_external, force_share=request.force_share)
        )
        target_format = registry.format(_target_format(registry, request))
        options = parse_options(target_format.options(), request.options, target_format.name)
        image = opener.image(request.source, request.source_format, snapshot=request.snapshot)
        layered, backing = _backing(request, target_format, image)
        directory, name = _target(request)
        files = [source for source in image.flat.sources if isinstance(source, File)]
        backend, survey = _choose(registry, request.backend, directory, files)
        layout = target_format.write(layered, options, Placement(survey.unit, name), backing=backing)
        losses = image.losses + tuple(_losses(image, target_format))
        plan = plan_layout(layout, name, directory, backend.name, survey, losses)
        _refuse_collisions(plan, opener.files, request.force)
        below = layered.parent.flat if backing and layered.parent else None
        yield Prepared(request, image, target_format, backend, layout, plan, below, opener)


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
        totals = ready.plan.totals
        refuse_copies(request, ready.plan)
        _refuse_too_large(ready.plan)
        if announce:
            announce(ready.plan)
        durable = request.cache != "unsafe"
        transaction = ready.backend.begin(ready.plan.directory, force=request.force, durable=durable)
        try:
            with os_errors(f"{request.target}: cannot be written"):
                files = make(ready.plan, transaction, progress)
            if verify:
                verify_result(ready.format, ready.layout.files, files, ready.image, ready.opener.registry, ready.below)
            _refuse_changed(ready.opener.files)
            transaction.commit()
        finally:
            transaction.abort()
        return Result(
            request.source,
            request.target,
            ready.image.format_name,
            ready.format.name,
            ready.backend.name,
            totals,
            ready.plan.copies,
            ready.plan.losses,
            ready.image.warnings,
            time.perf_counter() - began,
        )


def refuse_copies(request: Request, plan: Plan) -> None:
    """Raises `ZeroCopyError` when the request wants no payload copied and the plan copies some."""
    if request.zero_copy == "require" and plan.copies:
        why = "; ".join(f"{copy.bytes} bytes would have to be copied because {copy.reason}" for copy in plan.copies)
        raise ZeroCopyError(f"{request.target}: {why}")


def _target_format(registry: Registry, request: Request) -> str:
    if os.path.isdir(request.target):
        raise PlanError(f"{request.target}: is a directory", hint="name the file to make in it")
    name = request.target_format or registry.format_by_suffix(request.target)
    if name is None:
        raise UsageError(f"{request.target}: its name speaks of no format", hint="name the format with -O")
    return name


def _target(request: Request) -> tuple[str, str]:
    """Returns the directory and name of the target; a symbolic link is followed, so that it goes on naming the file."""
    path = os.path.realpath(request.target)
    directory, name = os.path.split(path)
    if not os.path.isdir(directory):
        raise PlanError(f"{request.target}: its directory does not exist")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise PlanError(f"{request.target}: is not a regular file")
    return directory, name


def _backing(request: Request, target: Format, image: Image) -> tuple[Image, Backing | None]:
    """Returns the image as the target is to hold it, and the parent that the target keeps."""
    if request.backing_file is None:
        if request.backing_format is not None:
            raise UsageError("a backing format needs a backing file", hint="name it with -B")
        return image, None
    if not target.can_back:
        raise UsageError(f"{target.name} cannot have a backing file")
    path = os.path.join(os.path.dirname(request.target), request.backing_file)
    with os_errors("cannot be used as backing file", AccessError):
        wanted = os.stat(path)
    for layer in image.chain():
        if layer is not image and (layer.file.stamp.device, layer.file.stamp.inode) == (wanted.st_dev, wanted.st_ino):
            return image.onto(layer), Backing(request.backing_file, request.backing_format or layer.format_name)
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


def _losses(image: Image, target: Format) -> Iterator[str]:
    for name, value in image.metadata.items():
        if name not in target.carries and value is not None:
            yield f"{name.replace('_', ' ')} {value}: {target.name} has no place for it"


def _refuse_collisions(plan: Plan, sources: Sequence[File], force: bool) -> None:
    for file in plan.files:
        path = os.path.join(plan.directory, file.name)
        if not os.path.lexists(path):
            continue
        there = os.stat(path)
        for source in sources:
            if (source.stamp.device, source.stamp.inode) == (there.st_dev, there.st_ino):
                raise PlanError(f"{path}: is part of the source", hint="choose another name for the target")
        if not force:
            raise PlanError(f"{path}: already exists", hint="--force replaces it")


def _refuse_too_large(plan: Plan) -> None:
    """Refuses now what the filesystem would refuse after hours of copying."""
    need = plan.totals.copied + plan.totals.written
    if not os.path.isdir(plan.directory):
        return
    space = os.statvfs(plan.directory)
    free = space.f_bavail * space.f_frsize
    if need > free:
        raise PlanError(f"{plan.directory}: {need} bytes would have to be written, {free} are free")


def _refuse_changed(files: Sequence[File]) -> None:
    for file in files:
        if file.changed():
            raise AccessError(
                f"{file.name}: changed while it was being converted",
                hint="nothing was created; stop who writes to it and try again",
            )
