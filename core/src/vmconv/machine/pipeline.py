"""The conversion of a whole machine: configuration, firmware variables and disks as one transaction."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import clean, open_directory, refuse_directory, refuse_outside
from vmconv.conversion.choice import choose_backend
from vmconv.conversion.execute import carry_out
from vmconv.conversion.refusals import no_collisions, refuse_copies, refuse_too_large
from vmconv.conversion.verify import verify_mode
from vmconv.errors import UsageError
from vmconv.interface.backend import Access, Proposal
from vmconv.interface.machines import Member
from vmconv.io.registry import installed
from vmconv.machine import losses
from vmconv.machine.decoding import decoded, decoded_plan, undecoded_notes
from vmconv.machine.digests import refuse_damaged
from vmconv.machine.firmware import variables
from vmconv.machine.layout import NewMachine, lay_out_machine
from vmconv.machine.places import directory_at, existing_parent
from vmconv.machine.plans import machine_plan
from vmconv.machine.request import MachinePlan, MachineRequest, MachineResult
from vmconv.machine.source import Source, source_of
from vmconv.machine.target import Target, target_of
from vmconv.machine.verify import verify as verify_machine
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.interface.arguments import Verify
    from vmconv.interface.backend import Backend, Created
    from vmconv.io.directory import Directory
    from vmconv.io.registry import Registry
    from vmconv.model.image import Image
    from vmconv.model.plan import Progress


class Prepared(NamedTuple):
    """A planned conversion; the source's files are open."""

    source: Source
    target: Target
    made: NewMachine
    plan: MachinePlan
    way: Proposal


def plan(request: MachineRequest) -> MachinePlan:
    """Returns what becomes of each setting and of each disk. Changes nothing."""
    with source_of(request) as source:
        target = target_of(request, source.machine)
        if request.in_place:
            from vmconv.machine.in_place import planned_in_place

            return planned_in_place(request, source, target).plan
        # The directory may be made by the conversion. Storage is the same as above it.
        directory = existing_parent(target.directory)
        if request.confined:
            with open_directory(directory) as opened:
                refuse_outside(opened, request.allow_external)
                return _planned(_prepared(request, source, target, opened.by_descriptor()), directory)
        return _planned(_prepared(request, source, target, directory), directory)


def _planned(ready: Prepared, directory: str) -> MachinePlan:
    """Returns the plan as users are told of it before anything is done."""
    return undecoded_notes(ready.source, ready.plan, directory) if ready.source.compression else ready.plan


def run(
    request: MachineRequest,
    *,
    verify: bool | Verify = True,
    announce: Callable[[MachinePlan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    created: Created | None = None,
) -> MachineResult:
    """Converts a machine: all its files appear under their names, the configuration last, or none does."""
    if request.in_place:
        from vmconv.machine.in_place import run_in_place

        return run_in_place(request, verify=verify, announce=announce, progress=progress, created=created)
    if request.keep_undo:
        raise UsageError("--keep-undo is for conversions in place", hint="without --in-place, the source is kept")
    began = time.perf_counter()
    done: list[MachineResult] = []
    with source_of(request) as source:
        target = target_of(request, source.machine)
        with directory_at(target.directory, within=request.allow_external if request.confined else None) as directory:
            refuse_directory(directory)
            storage = directory.by_descriptor() if request.confined else target.directory
            ready = _prepared(request, source, target, storage)
            with ExitStack() as stack:
                if source.compression:
                    ready = stack.enter_context(_decoded(request, ready, directory, announce, progress))
                stack.enter_context(_checked(request, ready, directory))
                if announce and not source.compression:
                    announce(ready.plan)
                _make(request, ready, directory, verify_mode(verify), (progress, verifying, created), done, began)
    return done[0]


@contextmanager
def _decoded(
    request: MachineRequest,
    ready: Prepared,
    directory: Directory,
    announce: Callable[[MachinePlan], None] | None,
    progress: Progress | None,
) -> Iterator[Prepared]:
    """Yields the conversion of a compressed package, decoded; what can be refused is refused before."""
    refuse_copies(request.target, request.zero_copy, ready.made.plan)
    hint = ready.target.hint_if_taken(directory, ready.made.plan)
    with no_collisions(ready.made.plan, directory, ready.source.opener.files, force=request.force, hint=hint):
        if announce:
            announce(_planned(ready, ready.target.directory))
    with decoded(ready.source, directory, progress) as source:
        # Its variables may say that Secure Boot is on.
        found = _prepared(request, source, target_of(request, source.machine), ready.target.directory)
        yield found._replace(plan=decoded_plan(source, found.plan))


def _prepared(request: MachineRequest, source: Source, target: Target, directory: str) -> Prepared:
    """Returns the planned conversion, with the storage of an existing `directory`."""
    registry = installed()
    images = source.images()
    kept = _kept(source, target, images, request)
    payload = [file for image in images if image is not None for file in _payload(image, chain=request.chain)]
    payload += [each for member in kept.values() for each in member.table.sources if isinstance(each, File)]
    way = _way(registry, request, target, directory, payload)
    firmware = variables(source, target)
    made = lay_out_machine(target, images, firmware, request, way, registry, kept)
    found = machine_plan(source, target, made, images, firmware)
    losses.refuse(found.losses, strict=request.strict, keep=request.keep)
    return Prepared(source, target, made, found, way)


def _way(
    registry: Registry, request: MachineRequest, target: Target, directory: str, payload: Sequence[File]
) -> Proposal:
    """Returns the backend of a conversion with its survey of the files with payload."""
    if target.compression is None:
        return choose_backend(registry, request.backend, directory, payload)
    if request.backend != "auto":
        hint = "end its name in the suffix of packages that are not compressed"
        raise UsageError(f"--backend {request.backend}: {target.name} will be compressed, by no backend", hint=hint)
    backend = _compressing(target.compression)
    return Proposal(backend, backend.survey(directory, payload))


def _compressing(compression: str, *, read_back: bool = False) -> Backend:
    from vmconv.backends.compress import CompressBackend

    return CompressBackend(compression, read_back=read_back)


def _kept(source: Source, target: Target, images: Sequence[Image | None], request: MachineRequest) -> dict[int, Member]:
    """Returns the disks that may go into a new package with all their bytes, by their numbers."""
    if not target.format.is_package or request.disk_options:
        return {}
    digests = {each.file: each for each in source.manifest.digests} if source.manifest else {}
    return {
        number: Member(disk.file or "", source.bytes_of(image), digests.get(disk.file or ""))
        for number, (disk, image) in enumerate(zip(source.machine.disks, images, strict=True))
        if image is not None and target.format.keeps(image, target.options)
    }


def _payload(image: Image, *, chain: bool) -> list[File]:
    """Returns the files with payload of the disk as the guest sees it, or with `chain` of any layer."""
    if chain:
        return image.payload_files()
    return [each for each in image.flat.sources if isinstance(each, File)]


@contextmanager
def _checked(request: MachineRequest, ready: Prepared, directory: Directory) -> Iterator[None]:
    """Refuses what the plan does not allow; during the block, files that will be replaced are locked."""
    clean(directory, [file.name for file in ready.made.plan.files])
    refuse_copies(request.target, request.zero_copy, ready.made.plan)
    refuse_too_large(ready.made.plan)
    hint = ready.target.hint_if_taken(directory, ready.made.plan)
    with no_collisions(ready.made.plan, directory, ready.source.opener.files, force=request.force, hint=hint):
        yield


def _make(
    request: MachineRequest,
    ready: Prepared,
    directory: Directory,
    mode: Verify | None,
    callbacks: tuple[Progress | None, Progress | None, Created | None],
    done: list[MachineResult],
    began: float,
) -> None:
    progress, verifying, created = callbacks
    target, opener = ready.target, ready.source.opener
    # Decoding a package compares its checksums anyway.
    if mode in ("sample", "bytes") and not ready.source.compression:
        refuse_damaged(ready.source, verifying, sample=mode == "sample")

    def check(files: list[File]) -> None:
        if mode:
            verify_machine(ready.made, files, target, installed(), mode, verifying)

    def note() -> None:
        configuration = os.path.normpath(directory.join(target.name))
        done.append(MachineResult(request.source, configuration, ready.plan, time.perf_counter() - began))

    backend = ready.way.backend
    if target.compression:
        backend = _compressing(target.compression, read_back=mode in ("sample", "bytes"))
    transaction = backend.begin(
        directory, force=request.force, durable=request.cache != "unsafe", access=Access(opener.files, request.mode)
    )
    carry_out(
        ready.made.plan,
        transaction,
        opener.files,
        request.target,
        verify=check,
        progress=progress,
        created=created,
        done=note,
    )
