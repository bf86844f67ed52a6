"""Conversion: any reader, any writer, any backend, composed at run time."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import clean, locate, refuse_directory, refuse_kept_names, refuse_outside
from vmconv.conversion.choice import choose_backend
from vmconv.conversion.containers import Container, Kept, Target, lay_out, parts_of
from vmconv.conversion.device import claimed, on_device
from vmconv.conversion.execute import carry_out
from vmconv.conversion.keeping import kept_layer
from vmconv.conversion.planner import merge_plans, plan_layout
from vmconv.conversion.refusals import (
    no_collisions,
    refuse_bitmaps,
    refuse_copies,
    refuse_existing,
    refuse_other_kind,
    refuse_other_states,
    refuse_too_large,
)
from vmconv.conversion.request import Request, Result, encryptor_of, options_of
from vmconv.conversion.streaming import refuse_elsewhere, target_elsewhere
from vmconv.conversion.verify import refuse_impossible, verify_mode
from vmconv.conversion.verify import verify as verify_result
from vmconv.errors import AccessError, PlanError, UsageError, os_errors
from vmconv.inspect import checking
from vmconv.interface.arguments import Verify
from vmconv.interface.backend import Backend, Proposal, Survey, Transaction
from vmconv.interface.scheme import without_secrets
from vmconv.io.directory import Directory
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed
from vmconv.io.scratch import ScratchFile
from vmconv.model import references
from vmconv.model.identity import fresh
from vmconv.model.image import Image
from vmconv.model.plan import Plan, Progress
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.inplace.site import Site
    from vmconv.interface.backend import Created


_WRITTEN_TWICE = (
    "payload is written twice: decompressed into a file without a name, and from there into the new image, which does "
    "not share it"
)


class Conversion(NamedTuple):
    """The plan of one request and its images, the user's target last."""

    request: Request
    containers: tuple[Container, ...]
    plan: Plan

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the converted layers, the top first."""
        return tuple(dict.fromkeys(text for made in reversed(self.containers) for text in made.source.warnings))


class Prepared(NamedTuple):
    """Planned conversions of one source, executed as one transaction; the source's files are open.

    `begin` returns a new transaction for the plan.
    """

    image: Image
    backend: Backend
    conversions: tuple[Conversion, ...]
    plan: Plan
    opener: Opener
    begin: Callable[[], Transaction]

    @property
    def containers(self) -> list[Container]:
        """All images, in the order in which they are named."""
        return [made for conversion in self.conversions for made in conversion.containers]


@contextmanager
def prepared(request: Request, *others: Request) -> Iterator[Prepared]:
    """Yields the planned conversion: all is read and checked, nothing is changed.

    `others` are requests for other targets of the same source in the same directory; all form one transaction.
    """
    if not request.is_local:
        with _prepared_elsewhere(request, *others) as ready:
            yield ready
        return
    registry = installed()
    if request.no_create:
        from vmconv.conversion.existing import as_it_is

        request = as_it_is(request, registry)
    with (
        request.opener(registry) as opener,
        places(request, *others) as found,
        claimed(request, *found[0]) as device,
        ExitStack() as stack,
    ):
        targets = [
            (each, _target(registry, each, place)) for each, place in zip((request, *others), found, strict=True)
        ]
        directory = _only_directory(found)
        scratch = stack.enter_context(closing(_scratch(None if device else directory.path)))
        targets = [(each, target._replace(scratch=scratch)) for each, target in targets]
        refuse_directory(directory)
        image = _source(request, opener)
        for _, wanted in targets:
            refuse_other_kind(image.file.name, image.kind, wanted.format, registry)
            refuse_bitmaps(image, wanted.format)
        # Before the lower layers are opened, so that only this image's own files are replaced.
        site = _site(request, others, image, opener)
        image.warnings += tuple(checking.warnings(image, opener))
        # Compressing would take long, only to be refused.
        for each, wanted in targets if request.compress and not (site or device) else ():
            refuse_existing(directory, wanted.name, opener.files, force=each.force)
        with site.claimed(directory.path) if site else nullcontext():
            if site:
                backend, conversions, own = _in_place(site, *targets[0], image, registry)
            else:
                storage = directory.by_descriptor() if request.confined else directory.path
                files = image.payload_files()
                way = (
                    Proposal(device, device.survey("", files))
                    if device
                    else choose_backend(registry, request.backend, storage, files)
                )
                backend, own = way.backend, frozenset()
                conversions = tuple(
                    conversion_of(request, target, image, way, registry, kept_layer(request, target, image, opener))
                    for request, target in targets
                )
            plan = merge_plans([conversion.plan for conversion in conversions])
            plan = plan._replace(opened=tuple(file.real_path() for file in opener.files))
            refuse_other_states((made for one in conversions for made in one.containers), directory)
            if site and any(file.allocation != "holes" for file in plan.files):
                raise UsageError("--in-place: nothing can be preallocated", hint="omit preallocation")
            if device:
                plan = on_device(plan, device, [made for one in conversions for made in one.containers], opener)
            image.warnings += tuple(_doubts(request, plan, directory, registry, others=not (site or device)))
            collisions = no_collisions(
                plan, directory, opener.files, force=request.force, but=own, spared=request.spared
            )
            with nullcontext() if device else collisions:
                # A single new file is linked. All else is renamed, which an append-only directory refuses.
                single = len(plan.files) == 1 and not directory.has(plan.files[0].name)
                if not (site or single or device):
                    refuse_kept_names(directory)
                begin = partial(
                    backend.begin,
                    directory,
                    force=request.force,
                    durable=request.cache != "unsafe",
                    access=opener.access(request.mode),
                )
                yield Prepared(image, backend, conversions, plan, opener, begin)


def _doubts(request: Request, plan: Plan, directory: Directory, registry: Registry, *, others: bool) -> Iterator[str]:
    """Yields warnings on a plan; `others` tells whether its files may take the place of others."""
    # The end of a disk may be copied everywhere.
    if request.decompress and plan.totals.copied > plan.totals.shared:
        yield _WRITTEN_TWICE
    if request.force and others:
        from vmconv.inplace.neighbours import replaced_bases

        yield from replaced_bases(directory, [file.name for file in plan.files], registry)


def _scratch(directory: str | None) -> ScratchFile:
    """Returns room for what writers make, in a target's directory; elsewhere if the target is a device or a stream."""
    if directory is None:
        from tempfile import gettempdir

        directory = gettempdir()
    return ScratchFile(directory)


def _source(request: Request, opener: Opener) -> Image:
    """Returns the image to convert."""
    if request.blank is not None:
        from vmconv.conversion.blank import blank_image

        return blank_image(request, opener).stating(**request.facts)
    if request.more_sources:
        from vmconv.conversion.joining import joined

        image = joined(request, opener)
    else:
        image = opener.image(request.source, request.source_format, snapshot=request.snapshot).stating(**request.facts)
    opener.given.refuse_unused()
    image = _part(request, image)
    if request.bitmaps:
        one = opener.registry.format(image.format_name)
        image = one.with_bitmaps(image, skip_broken=request.skip_broken_bitmaps)
    if request.no_create and request.size is not None and image.size > request.size:
        raise PlanError(
            f"{request.target}: has a disk of {request.size} bytes, and the source has {image.size}",
            hint="vmconv resize makes it larger",
        )
    if request.size is not None:
        image = image.sized(request.size)
    if request.sparse is None:
        return image
    from vmconv.conversion.zeros import without_zeros

    return without_zeros(image, request.sparse)


def _part(request: Request, image: Image) -> Image:
    """Returns the part of the disk that the request asks for. Raises `UsageError` if the disk ends before it does."""
    if not request.is_part:
        return image
    if image.kind != "disk":
        raise UsageError(f"{image.file.name}: a part of a memory image is no memory image")
    length = image.size - request.offset if request.length is None else request.length
    if length <= 0 or request.offset + length > image.size:
        raise UsageError(
            f"{image.file.name}: has {image.size} bytes, and no {max(length, 1)} from {request.offset} on",
            hint="--offset and --length name bytes of the guest's disk",
        )
    return image.part(request.offset, length)


@contextmanager
def _prepared_elsewhere(*requests: Request) -> Iterator[Prepared]:
    """Yields the planned conversions to a stream, or to objects of a store.

    Raises `PlanError` if an image has more than one file.
    """
    from vmconv.backends.stream import StreamBackend
    from vmconv.conversion.views import refuse_source_kept

    request = requests[0]
    for each in requests:
        refuse_elsewhere(each)
    storage = request.storage
    stream = StreamBackend(-1 if request.descriptor is None else request.descriptor)
    backend: Backend = storage or stream
    registry = installed()
    with request.opener(registry) as opener, closing(_scratch(None)) as scratch:
        targets = [(each, target_elsewhere(each, registry)._replace(scratch=scratch)) for each in requests]
        image = _source(request, opener)
        for _, target in targets:
            refuse_source_kept(target.format, target.options)
            refuse_other_kind(image.file.name, image.kind, target.format, registry)
            refuse_bitmaps(image, target.format)
        image.warnings += tuple(checking.warnings(image, opener))
        if storage:
            if image.kind != "disk":
                raise UsageError(f"{image.file.name}: is a memory image, and only disks become objects of a store")
            image = storage.staged(image)
        way = Proposal(backend, backend.survey("", image.payload_files()))
        conversions = tuple(
            conversion_of(each, target, image, way, registry, kept_layer(each, target, image, opener))
            for each, target in targets
        )
        for conversion in conversions:
            _refuse_several_files(conversion)
        if storage:
            conversions = tuple(each._replace(plan=storage.planned(each.plan)) for each in conversions)
        plan = merge_plans([conversion.plan for conversion in conversions])
        begin: Callable[[], Transaction] = partial(stream.send, opener.files)
        if storage:
            begin = partial(storage.start, opener.files, force=request.force)
        yield Prepared(image, backend, conversions, plan, opener, begin)


def _refuse_several_files(conversion: Conversion) -> None:
    files = len(conversion.plan.files)
    if files > 1:
        what = "a stream" if conversion.request.storage is None else "an object"
        raise PlanError(
            f"{conversion.containers[-1].format.name} would be {files} files, and {what} is one",
            hint="choose another -o subformat, or convert to a file",
        )


def run(
    request: Request,
    *others: Request,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    created: Created | None = None,
    sharing: Progress | None = None,
    examine: Callable[[Prepared], None] | None = None,
) -> tuple[Result, ...]:
    """Plans and executes one conversion, or several of one source as one transaction; see `vmconv.api`.

    `sharing` gets the bytes that are shared, before `progress` gets others. `examine` may refuse what is prepared.

    Signals are held while the files are named. `KeyboardInterrupt`, and exceptions of other signal handlers, carry the
    attribute `results`: the return value, empty if nothing was made.
    """
    began = time.perf_counter()
    done: list[Result] = []
    if request.rate is not None:
        from vmconv.conversion.rate import limited

        progress = limited(progress, request.rate)
    try:
        if request.is_local:
            with places(request, *others) as found:
                # Before planning: completing an interrupted run changes which files exist.
                clean(_only_directory(found), [name for _, name in found])
        with prepared(request, *others) as ready:
            for conversion in ready.conversions:
                refuse_copies(conversion.request.target, request.zero_copy, conversion.plan)
            refuse_too_large(ready.plan, None if others else request)
            _refuse_unverifiable(ready, verify_mode(verify))
            if examine:
                examine(ready)
            if announce:
                announce(ready.plan)

            def note() -> None:
                seconds = time.perf_counter() - began
                done.extend(_result(conversion, ready, seconds) for conversion in ready.conversions)

            _make(
                ready,
                verify=verify_mode(verify),
                progress=progress,
                verifying=verifying,
                created=created,
                done=note,
                sharing=sharing,
            )
    except BaseException as exc:
        # For signals only, which may arrive after the commit. How much of a stream was read is unknown.
        if not isinstance(exc, Exception) and request.descriptor is None:
            vars(exc)["results"] = tuple(done)
        raise
    return tuple(done)


def _refuse_unverifiable(ready: Prepared, mode: Verify | None) -> None:
    request = ready.conversions[0].request
    if mode == "qemu" and request.snapshot is not None:
        raise UsageError("--verify=qemu: qemu-img compares no internal snapshots", hint="use --verify=bytes")
    if mode == "qemu" and request.more_sources:
        raise UsageError("--verify=qemu: qemu-img compares one disk with one", hint="use --verify=bytes")
    if mode == "qemu" and request.is_part:
        raise UsageError("--verify=qemu: qemu-img compares no parts of disks", hint="use --verify=bytes")
    if mode == "qemu" and ready.plan.destination == "objects":
        raise UsageError("--verify=qemu: qemu-img reads no object before it appears", hint="use --verify=bytes")
    if mode == "qemu" and ready.plan.destination == "device":
        raise UsageError("--verify=qemu: a device cannot be read before all is written", hint="use --verify=bytes")
    refuse_impossible(mode, ready.containers, ready.opener.registry, request)


def _make(
    ready: Prepared,
    *,
    verify: Verify | None,
    progress: Progress | None,
    verifying: Progress | None,
    created: Created | None,
    done: Callable[[], None],
    sharing: Progress | None,
) -> None:
    """Creates all files of the plan, or none; calls `done` after the commit."""

    def check(files: list[File]) -> None:
        if verify:
            verify_result(ready.containers, files, ready.opener.registry, verify, verifying)

    carry_out(
        ready.plan,
        ready.begin(),
        ready.opener.files,
        ready.conversions[-1].request.target,
        verify=check,
        progress=progress,
        created=created,
        done=done,
        sharing=sharing,
    )


def _result(conversion: Conversion, ready: Prepared, seconds: float) -> Result:
    request, made, plan = conversion
    return Result(
        without_secrets(request.source),
        request.target,
        ready.image.format_name,
        made[-1].format.name,
        ready.backend.name,
        plan.totals,
        plan.copies,
        plan.losses,
        conversion.warnings,
        seconds,
        tuple(below.name for below in made[-2::-1]),
    )


def _in_place(
    site: Site, request: Request, target: Target, image: Image, registry: Registry
) -> tuple[Backend, tuple[Conversion, ...], frozenset[str]]:
    """Returns the conversion of the first strategy that moves no payload, and the source names it may reuse."""
    from vmconv.inplace.strategies import STRATEGIES, Unsuitable, Wanted, formats_that_hold

    kept = kept_layer(request, target, image, site.opener)
    wanted = Wanted(image.onto(kept.image).guest if kept else image.flat, target.directory, target.format)
    second_best = None
    refused: list[PlanError] = []
    for kind in STRATEGIES:
        if kind.is_last_resort and second_best:
            break
        strategy = kind(site, wanted)
        proposal = strategy.propose()
        if isinstance(proposal, PlanError):
            refused.append(proposal)
            continue
        try:
            conversion = conversion_of(request, target, image, proposal, registry, kept)
            found = proposal.backend, (conversion,), strategy.names(conversion.plan)
            site.refuse_plan(conversion.plan)
        except PlanError as exc:
            if kind.refusal_is_final:
                raise
            refused.append(exc)
            continue
        if site.chain or not conversion.plan.copies or proposal.carrier:
            return found
        second_best = found
    if second_best:
        return second_best
    # The last strategy that could apply gives the reason.
    *_, why = (exc for exc in refused if not isinstance(exc, Unsuitable))
    why.hint = why.hint or formats_that_hold(site, wanted)
    raise why


def conversion_of(
    request: Request, target: Target, image: Image, way: Proposal, registry: Registry, kept: Kept | None
) -> Conversion:
    """Returns the conversion of one request, planned for the backend of `way`."""
    parts = parts_of(image, target, registry, kept, chain=request.chain)
    containers = lay_out(parts, target, way.survey, registry, kept, way.carrier)
    for made in containers:
        if not request.is_local:
            from vmconv.conversion.views import refuse_references

            refuse_references(target.format, made.layout)
        within = request.allow_external if request.confined else None
        references.confirm(made.layout.references, target.directory, within=within)
    plans = [plan_of(made, target.directory, way.backend, way.survey, alone=len(parts) == 1) for made in containers]
    return Conversion(request, tuple(containers), merge_plans(plans))


def plan_of(made: Container, directory: str, backend: Backend, survey: Survey, *, alone: bool) -> Plan:
    """Returns the plan of one image; unless it is `alone`, its losses name the layer."""
    losses = tuple(loss if alone else type(loss)(f"{made.source.file.name}: {loss}") for loss in made.losses())
    plan = plan_layout(made.layout, made.name, directory, backend.name, survey, losses, destination=backend.destination)
    return plan._replace(notes=(*plan.notes, *backend.notes(plan)))


_Place = tuple[Directory, str]
"""The directory of a target, open, and the target's name in it."""


@contextmanager
def places(*requests: Request) -> Iterator[list[_Place]]:
    """Yields the targets' directories and names. Symbolic links are followed, so that they keep naming the target."""
    with ExitStack() as stack:
        places = []
        for request in requests:
            if not request.target:
                raise UsageError("argument target: '' is empty")
            if os.path.isdir(request.target):
                raise PlanError(f"{request.target}: is a directory", hint="name the file to make in it")
            try:
                place = locate(request.target)
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise PlanError(f"{request.target}: its directory does not exist") from exc
            except OSError as exc:
                raise PlanError(f"{request.target}: its directory cannot be opened: {exc.strerror}") from exc
            stack.enter_context(place[0])
            if request.confined:
                refuse_outside(place[0], request.allow_external)
            places.append(place)
        yield places


def _target(registry: Registry, request: Request, place: _Place) -> Target:
    """Returns the target of a request. Raises `PlanError` if a special file has its name."""
    wanted = registry.writer(_target_format(registry, request))
    options = options_of(request, wanted, registry)
    directory, name = place
    there = directory.status(name)
    if there and stat.S_ISBLK(there.st_mode) and not request.no_create:
        raise PlanError(f"{request.target}: is a block device", hint="-n writes into it, and its content is lost")
    if there and not stat.S_ISREG(there.st_mode) and not request.no_create:
        raise PlanError(f"{request.target}: is not a regular file")
    # The image keeps its ids, but not those of its content.
    found = Target.of(wanted, options, directory.path, name)
    return found._replace(
        content=fresh() if request.no_create else None, encryptor=encryptor_of(request, wanted, registry)
    )


def _only_directory(places: Sequence[_Place]) -> Directory:
    """Returns the directory of all targets. Raises `PlanError` if there are several: renames are atomic in one only."""
    directory = places[0][0]
    for other, name in places:
        if not os.path.samestat(os.fstat(other.descriptor), os.fstat(directory.descriptor)):
            raise PlanError(
                f"{other.join(name)}: is not in the directory of the other targets",
                hint="a symbolic link is followed: remove it",
            )
    return directory


def _site(request: Request, others: Sequence[Request], image: Image, opener: Opener) -> Site | None:
    """Returns the site of a conversion in place, else None. Raises `UsageError` for options that exclude each other."""
    if not request.in_place:
        for given, name in ((request.keep_undo, "--keep-undo"), (request.any_owner, "--any-owner")):
            if given:
                raise UsageError(f"{name} is for conversions in place", hint="without --in-place, the source is kept")
        return None
    for wrong, name in (
        (os.path.isdir(request.source), "a bundle, which is a directory,"),
        (image.kind != "disk", "a memory image"),
        (others, "several targets"),
        (request.snapshot, "a snapshot"),
        (request.force_share, "--force-share"),
        (request.mode is not None, "--mode"),
        (request.backend != "auto", f"--backend {request.backend}"),
        (request.cache == "unsafe", "-t unsafe"),
    ):
        if wrong:
            raise UsageError(f"{name} and --in-place exclude each other")
    from vmconv.inplace.site import Site

    base = request.backing_file
    path = os.path.join(os.path.dirname(request.target), base) if base else None
    with os_errors("cannot be used as backing file", AccessError):
        return Site(
            image,
            opener,
            request.source,
            keep_undo=request.keep_undo,
            any_owner=request.any_owner,
            chain=request.chain,
            base=path,
        )


def _target_format(registry: Registry, request: Request) -> str:
    name = request.target_format
    if name is None:
        name = registry.format_by_suffix(request.target)
    if name is None:
        option = "-O" if request.blank is None else "-f"
        raise UsageError(f"{request.target}: its name has no format's suffix", hint=f"name the format with {option}")
    return name
