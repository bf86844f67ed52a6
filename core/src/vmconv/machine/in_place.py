"""The conversion of a machine in place: each disk's own file becomes the new disk, and all are undone if one fails.

The disks are converted one after the other, each with its undo file; then the small files are made. The moment at which
the machine is the new one is that of `vmconv.inplace.group`. The source's configuration stays as it is, for undoing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import open_directory
from vmconv.conversion import pipeline
from vmconv.conversion.planner import merge_plans
from vmconv.conversion.refusals import refuse_copies
from vmconv.conversion.request import Request
from vmconv.conversion.verify import verify_mode
from vmconv.errors import BackendError, PlanError, UsageError, VmconvError, os_errors
from vmconv.inplace import group
from vmconv.inplace.syscalls import Syscalls
from vmconv.interface.backend import Proposal, Survey
from vmconv.io.registry import installed
from vmconv.machine import losses
from vmconv.machine.firmware import variables
from vmconv.machine.layout import (
    NewDisk,
    NewMachine,
    adapter,
    disk_format,
    named,
    plan_of_configs,
    suffix_of,
    with_files,
)
from vmconv.machine.plans import machine_plan
from vmconv.machine.request import MachinePlan, MachineRequest, MachineResult
from vmconv.machine.source import Source, source_of
from vmconv.machine.target import Target, target_of
from vmconv.machine.verify import verify_configs

if TYPE_CHECKING:
    from vmconv.interface.arguments import Verify
    from vmconv.interface.backend import Created
    from vmconv.io.directory import Directory
    from vmconv.model.image import Image
    from vmconv.model.plan import Plan, Progress


class Planned(NamedTuple):
    """A planned conversion in place: a request for each disk, and the new machine.

    `mode` are the permissions of the source's configuration, which the small files get.
    """

    requests: tuple[Request, ...]
    target: Target
    made: NewMachine
    small: Plan
    plan: MachinePlan
    mode: int


def planned_in_place(request: MachineRequest, source: Source, target: Target) -> Planned:
    """Returns the plan; raises `PlanError` if a disk cannot be converted in place. Changes nothing."""
    _refuse(request, source, target)
    images = _images(source, target)
    requests = tuple(_disk_request(number, image, request, target) for number, image in enumerate(images))
    # Only this plan is made while the source is open: a conversion in place wants its file for itself.
    firmware = variables(source, target)
    mode = os.fstat(source.file.descriptor).st_mode & 0o666
    source.opener.close()
    with ExitStack() as stack, _own_hints():
        ready = [stack.enter_context(pipeline.prepared(each)) for each in requests]
        disks = tuple(NewDisk(number, (one.containers[-1],), one.plan) for number, one in enumerate(ready))
        machine = with_files(target.adapted.machine, disks, firmware, target)
        configs = named(target.format.write(machine, target.options), machine, firmware, target)
        small = plan_of_configs(configs, target, Proposal(installed().backend("copy"), Survey()))
        _refuse_collisions(small, disks, target)
        plans = [*(disk.plan for disk in disks), small]
        made = NewMachine(machine, disks, configs, None, merge_plans(plans))
        refuse_copies(request.target, request.zero_copy, made.plan)
        found = machine_plan(source, target, made, images, firmware)
    losses.refuse(found.losses, strict=request.strict, keep=request.keep)
    return Planned(requests, target, made, small, found, mode)


@contextmanager
def _own_hints() -> Iterator[None]:
    """Replaces hints of disk conversions that name options which machines' do not have."""
    try:
        yield
    except PlanError as exc:
        if exc.hint and any(option in exc.hint for option in ("-B", "--any-owner", "--chain", "another file")):
            exc.hint = "convert without --in-place"
        raise


def run_in_place(
    request: MachineRequest,
    *,
    verify: bool | Verify,
    announce: Callable[[MachinePlan], None] | None,
    progress: Progress | None,
    created: Created | None,
) -> MachineResult:
    """Converts all disks in place and makes the configuration. If anything fails before, the disks are turned back."""
    began = time.perf_counter()
    with source_of(request) as source:
        target = target_of(request, source.machine)
        if os.path.lexists(target.directory):
            with _directory(target) as directory:
                group.refuse_interrupted(directory, {target.name})
        planned = planned_in_place(request, source, target)
    if announce:
        announce(planned.plan)
    whole = _group(planned, request)
    mode = verify_mode(verify)
    with _directory(target) as directory:
        group.refuse_interrupted(directory, whole.names)
        changing = group.Changing(directory, whole, Syscalls())
        try:
            changing.begin()
            for each in planned.requests:
                pipeline.run(each, verify=verify, progress=progress)
            with changing.written(created) as (transaction, made):
                if mode:
                    verify_configs(planned.made, made, target, made[-1])
                changing.finish(transaction)
        except VmconvError as exc:
            changing.give_up()
            if not changing.committed and exc.hint and "vmconv recover" in exc.hint:
                # Its disk has been recovered meanwhile.
                why = exc.__cause__ or exc
                raise BackendError(f"{directory.path}: a disk failed, and all are as they were: {why}") from exc
            raise
        finally:
            changing.give_up()
    path = os.path.normpath(os.path.join(target.directory, target.name))
    return MachineResult(request.source, path, planned.plan, time.perf_counter() - began)


def _group(planned: Planned, request: MachineRequest) -> group.Group:
    disks = tuple((os.path.basename(each.source), os.path.basename(each.target)) for each in planned.requests)
    files = tuple(group.Small(config.name, config.content) for config in planned.made.configs)
    return group.Group(disks, files, planned.mode, request.keep_undo)


def _directory(target: Target) -> Directory:
    with os_errors("cannot be opened", PlanError, where=target.directory):
        return open_directory(target.directory)


def _refuse(request: MachineRequest, source: Source, target: Target) -> None:
    for wrong, what in (
        (source.format.is_package, "a package as the source"),
        (target.format.is_package, "a package as the target"),
        (request.chain, "--chain"),
        (request.force, "--force"),
        (request.force_share, "--force-share"),
        (request.mode is not None, "--mode"),
        (request.backend != "auto", f"--backend {request.backend}"),
        (request.cache == "unsafe", "-t unsafe"),
    ):
        if wrong:
            raise UsageError(f"{what} and --in-place exclude each other")
    if any(disk.file is None for disk in source.machine.disks):
        raise PlanError(
            f"{source.file.name}: a disk is no file of its own, and cannot be converted in place",
            hint="convert without --in-place",
        )


def _images(source: Source, target: Target) -> list[Image]:
    """Returns the image of each disk. Raises `PlanError` if one has no file in the target's directory."""
    found = []
    for number, image in enumerate(source.images()):
        if image is None:
            raise PlanError(f"disks[{number}]: is a physical disk, and cannot be converted in place")
        there = os.path.dirname(os.path.realpath(image.file.path))
        if not _is_directory(target.directory, there):
            raise PlanError(
                f"{image.file.path}: is in another directory than {target.format.name} keeps its disks in, "
                f"{target.directory}",
                hint="move the machine's files there first, or convert without --in-place",
            )
        found.append(image)
    return found


def _is_directory(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except FileNotFoundError:
        return False


def _refuse_collisions(small: Plan, disks: Sequence[NewDisk], target: Target) -> None:
    """Raises `PlanError` if a new file has the name of another one, or exists. The disks' plans refuse theirs."""
    taken: set[str] = set()
    for file in (*(file for disk in disks for file in disk.plan.files), *small.files):
        path = os.path.join(target.directory, file.name)
        if file.name in taken or (file in small.files and os.path.lexists(path)):
            raise PlanError(f"{path}: already exists", hint="choose another name for the target")
        taken.add(file.name)


def _disk_request(number: int, image: Image, request: MachineRequest, target: Target) -> Request:
    wanted = disk_format(target, request, installed())
    return Request(
        image.file.path,
        os.path.join(target.directory, target.disk_name(number, suffix_of(wanted))),
        source_format=image.format_name,
        target_format=wanted.name,
        options=request.disk_options,
        allow_external=request.allow_external,
        in_place=True,
        keep_undo=True,
        facts={"adapter_type": adapter(target.adapted.machine, number, wanted)},
    )
