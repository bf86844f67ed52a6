"""Conversion: any reader, any writer, any backend, composed at run time."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from vmconv import checking, references, signals
from vmconv.arguments import Cache, FilePath, FilePaths, Mode, Verify, WriterOptions, ZeroCopy
from vmconv.commit import Progress, make
from vmconv.containers import Container, Kept, Target, lay_out, parts_of, source_itself, sources_of
from vmconv.directory import Directory
from vmconv.errors import AccessError, PlanError, UsageError, os_errors
from vmconv.image import Image
from vmconv.layout import Backing
from vmconv.opener import Opener
from vmconv.options import parse_options
from vmconv.planner import CopyReason, Plan, Totals, joined, plan_layout
from vmconv.refusals import no_collisions, refuse_changed, refuse_copies, refuse_too_large
from vmconv.registry import Registry, installed
from vmconv.sources import File
from vmconv.storage import Access, Backend, Survey
from vmconv.targets import clean, located, refuse_directory, refuse_kept_names
from vmconv.verify import chosen, refuse_impossible
from vmconv.verify import verify as verify_result

if TYPE_CHECKING:
    from vmconv.inplace.planning import Planned, Site, Way


class Request(NamedTuple):
    """What to convert and how; the names are those of the command line's options.

    `source_format` and `target_format` override what the file names speak of. `source_backing_format` is the format of
    the source's backing files where the image above them does not state it. `chain` makes an image of each layer of
    the source, beside the target. `backing_file` keeps the chain as it is from a layer on: it is the layer that what is
    made will have as its parent, as it is to be written into the target, with `backing_format`.
    `zero_copy="require"` refuses to copy a single byte of payload. `cache="unsafe"` does not wait until the target is
    on storage, as `qemu-img convert` does not. `mode` has the permission bits of what is made; without it nobody may
    open a new file who may not open each file of the source, and one that `force` replaces keeps its owner, mode and
    attributes. `in_place` turns the source's own file into the target; `keep_undo` keeps what it takes to turn it back;
    `any_owner` lets it change files that are not the source's owner's.
    """

    source: FilePath
    target: FilePath
    source_format: str | None = None
    target_format: str | None = None
    options: WriterOptions = MappingProxyType({})
    snapshot: str | None = None
    chain: bool = False
    backing_file: FilePath | None = None
    backing_format: str | None = None
    backend: str = "auto"
    zero_copy: ZeroCopy = "auto"
    cache: Cache = "writeback"
    force: bool = False
    in_place: bool = False
    keep_undo: bool = False
    any_owner: bool = False
    force_share: bool = False
    allow_external: FilePaths = ()
    source_backing_format: str | None = None
    mode: Mode | None = None

    def opener(self, registry: Registry) -> Opener:
        """Returns what the source is opened with."""
        return Opener(
            registry,
            allow_external=self.allow_external,
            force_share=self.force_share,
            backing_format=self.source_backing_format,
        )


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


class Conversion(NamedTuple):
    """What is made for one request: its images, the one that the user named last, and the plan that makes them."""

    request: Request
    containers: tuple[Container, ...]
    plan: Plan

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the layers that become images, the top first."""
        return tuple(dict.fromkeys(text for made in reversed(self.containers) for text in made.source.warnings))


class Prepared(NamedTuple):
    """Conversions of one source that were planned and can be made real, as one; the source's files are open."""

    image: Image
    backend: Backend
    conversions: tuple[Conversion, ...]
    plan: Plan
    opener: Opener
    directory: Directory

    @property
    def containers(self) -> list[Container]:
        """All images, in the order in which they appear."""
        return [made for conversion in self.conversions for made in conversion.containers]


@contextmanager
def prepared(request: Request, *others: Request) -> Iterator[Prepared]:
    """Yields the planned conversion: everything has been read and checked, nothing has been touched.

    With `others`, which want other targets of the same source in the same directory, all of them are one.
    """
    registry = installed()
    with request.opener(registry) as opener, _places(request, *others) as places:
        targets = [
            (each, _target(registry, each, place)) for each, place in zip((request, *others), places, strict=True)
        ]
        directory = _only_directory(places)
        refuse_directory(directory)
        image = opener.image(request.source, request.source_format, snapshot=request.snapshot)
        # Before the layers below are opened: only what is its own goes.
        site = _site(request, others, image, opener)
        image.warnings += tuple(checking.warnings(image, opener))

        def planned(backend: Backend, survey: Survey, carrier: File | None = None) -> tuple[Conversion, ...]:
            return tuple(_conversion(*each, image, backend, survey, registry, carrier) for each in targets)

        with _in_place(site, *targets[0], image, registry, planned) if site else nullcontext() as way:
            if way:
                backend, conversions, own = way
            else:
                backend, survey = _choose(registry, request.backend, directory.path, sources_of(image))
                conversions, own = planned(backend, survey), frozenset()
            plan = joined([conversion.plan for conversion in conversions])
            with no_collisions(plan, directory, opener.files, force=request.force, but=own):
                single = len(plan.files) == 1 and not directory.has(plan.files[0].name)
                if not (way or single):
                    refuse_kept_names(directory)
                yield Prepared(image, backend, conversions, plan, opener, directory)


def run(
    request: Request,
    *others: Request,
    verify: bool | Verify = True,
    announce: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> tuple[Result, ...]:
    """Plans and makes one conversion, or several of one source as one; see `vmconv.api`.

    A signal that arrives while the files get their names is delivered afterwards. `KeyboardInterrupt`, and what other
    handlers raise, has the attribute `results`: what would have been returned, empty when nothing was made.
    """
    began = time.perf_counter()
    done: list[Result] = []
    try:
        with _places(request, *others) as places:
            clean(_only_directory(places), [name for _, name in places])
        with prepared(request, *others) as ready:
            for conversion in ready.conversions:
                refuse_copies(conversion.request.target, request.zero_copy, conversion.plan)
            refuse_too_large(ready.plan)
            _refuse_unverifiable(ready, chosen(verify))
            if announce:
                announce(ready.plan)

            def note() -> None:
                seconds = time.perf_counter() - began
                done.extend(_result(conversion, ready, seconds) for conversion in ready.conversions)

            _make(ready, verify=chosen(verify), progress=progress, verifying=verifying, done=note)
    except BaseException as exc:
        if not isinstance(exc, Exception):
            vars(exc)["results"] = tuple(done)
        raise
    return tuple(done)


def _refuse_unverifiable(ready: Prepared, mode: Verify | None) -> None:
    request = ready.conversions[0].request
    if mode == "qemu" and request.snapshot is not None:
        raise UsageError("--verify=qemu: qemu-img compares no internal snapshots", hint="use --verify=bytes")
    refuse_impossible(mode, ready.containers, ready.opener.registry, way="in place" if request.in_place else "files")


def _make(
    ready: Prepared,
    *,
    verify: Verify | None,
    progress: Progress | None,
    verifying: Progress | None,
    done: Callable[[], None],
) -> None:
    """Makes all files of the plan appear, or none; calls `done` when they are there."""
    request = ready.conversions[-1].request
    durable = request.cache != "unsafe"
    access = Access(ready.opener.files, request.mode)
    transaction = ready.backend.begin(ready.directory, force=request.force, durable=durable, access=access)
    try:
        with os_errors("cannot be written", where=request.target):
            files = make(ready.plan, transaction, progress)
        if verify:
            verify_result(ready.containers, files, ready.opener.registry, verify, verifying)
        if ready.plan.references:
            references.settle(ready.opener.files)
        refuse_changed(ready.opener.files)
        with signals.held():
            transaction.commit()
            done()
    finally:
        with signals.held():
            transaction.abort()


def _result(conversion: Conversion, ready: Prepared, seconds: float) -> Result:
    request, made, plan = conversion
    return Result(
        request.source,
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
    site: Site, request: Request, target: Target, image: Image, registry: Registry, planned: Planned
) -> AbstractContextManager[Way]:
    from vmconv.inplace.planning import Wish

    kept = _kept(request, target, image, registry)
    table = image.onto(kept.image).guest if kept else image.flat
    return site.planned(Wish(table, target.directory, target.format, planned))


def _conversion(
    request: Request,
    target: Target,
    image: Image,
    backend: Backend,
    survey: Survey,
    registry: Registry,
    carrier: File | None = None,
) -> Conversion:
    kept = _kept(request, target, image, registry)
    parts = parts_of(image, target, registry, kept, chain=request.chain)
    containers = lay_out(parts, target, survey.unit, registry, kept, carrier)
    for made in containers:
        references.confirm(made.layout.references, target.directory)
    plans = [_plan(made, target.directory, backend, survey, alone=len(parts) == 1) for made in containers]
    return Conversion(request, tuple(containers), joined(plans))


def _plan(made: Container, directory: str, backend: Backend, survey: Survey, *, alone: bool) -> Plan:
    """Returns the plan of one image; where there are several, its losses say whose they are."""
    losses = tuple(loss if alone else f"{made.source.file.name}: {loss}" for loss in made.losses())
    return plan_layout(made.layout, made.name, directory, backend.name, survey, losses)


_Place = tuple[Directory, str]
"""The directory of a target, open, and the target's name in it."""


@contextmanager
def _places(*requests: Request) -> Iterator[list[_Place]]:
    """Yields where the targets are or will be; symbolic links are followed, so that they go on naming the files."""
    with ExitStack() as stack:
        places = []
        for request in requests:
            if os.path.isdir(request.target):
                raise PlanError(f"{request.target}: is a directory", hint="name the file to make in it")
            try:
                place = located(request.target)
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise PlanError(f"{request.target}: its directory does not exist") from exc
            except OSError as exc:
                raise PlanError(f"{request.target}: its directory cannot be opened: {exc.strerror}") from exc
            stack.enter_context(place[0])
            places.append(place)
        yield places


def _target(registry: Registry, request: Request, place: _Place) -> Target:
    """Returns what is to be made at its place."""
    wanted = registry.format(_target_format(registry, request))
    options = parse_options(wanted.options(), request.options, wanted.name)
    directory, name = place
    there = directory.status(name)
    if there and not stat.S_ISREG(there.st_mode):
        raise PlanError(f"{request.target}: is not a regular file")
    return Target.of(wanted, options, directory.path, name)


def _only_directory(places: Sequence[_Place]) -> Directory:
    """Returns the directory of all targets: what appears together appears in one."""
    directory = places[0][0]
    for other, name in places:
        if not os.path.samestat(os.fstat(other.descriptor), os.fstat(directory.descriptor)):
            raise PlanError(
                f"{other.join(name)}: is in another directory than the other targets",
                hint="a symbolic link is followed: remove it",
            )
    return directory


def _site(request: Request, others: Sequence[Request], image: Image, opener: Opener) -> Site | None:
    """Returns where the conversion happens when it is one in place; refuses what makes no sense with it."""
    if not request.in_place:
        for given, name in ((request.keep_undo, "--keep-undo"), (request.any_owner, "--any-owner")):
            if given:
                raise UsageError(f"{name} is for conversions in place", hint="without --in-place, the source is kept")
        return None
    for wrong, name in (
        (os.path.isdir(request.source), "a bundle, which is a directory,"),
        (others, "several targets"),
        (request.snapshot, "a snapshot"),
        (request.force_share, "--force-share"),
        (request.mode is not None, "--mode"),
        (request.backend != "auto", f"--backend {request.backend}"),
        (request.cache == "unsafe", "-t unsafe"),
        (request.mode is not None, "--mode"),
    ):
        if wrong:
            raise UsageError(f"{name} and --in-place exclude each other")
    from vmconv.inplace.planning import Site

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
        raise UsageError(f"{request.target}: its name speaks of no format", hint="name the format with -O")
    return name


def _kept(request: Request, target: Target, image: Image, registry: Registry) -> Kept | None:
    """Returns the layer of the source that becomes the parent of what is made, as it is."""
    if target.format.keeps_source(target.options):
        for asked, what in ((request.backing_file, "-B"), (request.snapshot, "--snapshot"), (request.chain, "--chain")):
            if asked:
                raise UsageError(
                    f"{what}: the target's backing file would be the source as it is, with nothing above it"
                )
        return source_itself(image, registry, target.directory)
    if request.backing_file is None:
        if request.backing_format is not None:
            raise UsageError(
                "a backing format needs a backing file", hint="name it with -B; --backing-format is for SOURCE's"
            )
        return None
    if not target.format.can_back:
        raise UsageError(f"{target.format.name} cannot have a backing file")
    path = os.path.join(os.path.dirname(request.target), request.backing_file)
    with os_errors("cannot be used as backing file", AccessError):
        wanted = os.stat(path)
    for layer in image.chain():
        if layer is not image and (layer.file.stamp.device, layer.file.stamp.inode) == (wanted.st_dev, wanted.st_ino):
            _refuse_other_format(request.backing_format, layer, registry)
            return Kept(layer, Backing(references.plain(request.backing_file), layer.format_name))
    raise PlanError(
        f"{path}: is not a backing file of {image.file.name}",
        hint="-B keeps a part of the source's own chain; its path is relative to the target's directory",
    )


def _refuse_other_format(stated: str | None, layer: Image, registry: Registry) -> None:
    """Raises `UsageError` when a layer is to be stated in another format than it was read in: another disk."""
    if stated is not None and registry.format(stated).name != layer.format_name:
        raise UsageError(
            f"{layer.file.name}: is read as {layer.format_name} in this chain, and cannot be stated as {stated}",
            hint=f"leave the backing format out, or give it as {layer.format_name}",
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
