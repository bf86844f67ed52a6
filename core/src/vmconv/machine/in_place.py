"""The conversion of a machine in place: each disk's own file becomes the new disk, and all are undone if one fails.

The disks are converted one after the other, each with its undo file; then the small files are made. The source's
configuration stays as it is, for undoing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import open_directory
from vmconv.conversion import pipeline
from vmconv.conversion.execute import carry_out
from vmconv.conversion.planner import merge_plans
from vmconv.conversion.refusals import no_collisions, refuse_copies
from vmconv.conversion.request import Request
from vmconv.conversion.verify import verify_mode
from vmconv.errors import PlanError, UsageError
from vmconv.inplace.names import UNDO, beside
from vmconv.inplace.undo import undo
from vmconv.interface.backend import Access, Proposal, Survey
from vmconv.io.registry import installed
from vmconv.machine import losses
from vmconv.machine.firmware import variables
from vmconv.machine.layout import NewDisk, NewMachine, disk_format, named, plan_of_configs, suffix_of, with_files
from vmconv.machine.plans import machine_plan
from vmconv.machine.request import MachinePlan, MachineRequest, MachineResult
from vmconv.machine.source import Source, source_of
from vmconv.machine.target import Target, target_of
from vmconv.machine.verify import verify_configs

if TYPE_CHECKING:
    from vmconv.interface.arguments import Verify
    from vmconv.interface.backend import Created
    from vmconv.model.image import Image
    from vmconv.model.plan import Plan, Progress
    from vmconv.model.sources import File


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
    images = [source.image(disk) for disk in source.machine.disks]
    numbers = [number for number, image in enumerate(images) if image is not None]
    requests = tuple(_disk_request(number, images[number], request, target) for number in numbers)
    # Only this plan is made while the source is open: a conversion in place wants its file for itself.
    firmware = variables(source, target)
    mode = os.fstat(source.file.descriptor).st_mode & 0o666
    source.opener.close()
    with ExitStack() as stack:
        ready = [stack.enter_context(pipeline.prepared(each)) for each in requests]
        disks = tuple(NewDisk(number, one.containers[-1], one.plan) for number, one in zip(numbers, ready, strict=True))
        machine = with_files(target.adapted.machine, disks, firmware.store, target)
        configs = named(target.format.write(machine, target.options), firmware.store, target)
        small = plan_of_configs(configs, target, Proposal(installed().backend("copy"), Survey()))
        plans = [*(disk.plan for disk in disks), small]
        made = NewMachine(machine, disks, configs, None, merge_plans(plans))
        refuse_copies(request.target, request.zero_copy, made.plan)
        found = machine_plan(source, target, made, images, firmware)
    losses.refuse(found.losses, strict=request.strict, keep=request.keep)
    return Planned(requests, target, made, small, found, mode)


def run_in_place(
    request: MachineRequest,
    *,
    verify: bool | Verify,
    announce: Callable[[MachinePlan], None] | None,
    progress: Progress | None,
    created: Created | None,
) -> MachineResult:
    """Converts all disks in place and makes the configuration. If anything fails, the disks are turned back."""
    began = time.perf_counter()
    with source_of(request) as source:
        planned = planned_in_place(request, source, target_of(request, source.machine))
    if announce:
        announce(planned.plan)
    done: list[str] = []
    try:
        for each in planned.requests:
            pipeline.run(each, verify=verify, progress=progress)
            done.append(each.target)
        _make_configs(request, planned, verify_mode(verify), created)
    except BaseException:
        # The last disk first, as a stack.
        for target in reversed(done):
            undo(target)
        raise
    if not request.keep_undo:
        for target in done:
            os.unlink(os.path.join(os.path.dirname(target), beside(os.path.basename(target), UNDO)))
    path = os.path.normpath(os.path.join(planned.target.directory, planned.target.name))
    return MachineResult(request.source, path, planned.plan, time.perf_counter() - began)


def _refuse(request: MachineRequest, source: Source, target: Target) -> None:
    for wrong, what in (
        (source.format.is_package, "a package as the source"),
        (target.format.is_package, "a package as the target"),
        (request.force, "--force"),
        (request.force_share, "--force-share"),
        (request.mode is not None, "--mode"),
        (request.backend != "auto", f"--backend {request.backend}"),
        (request.cache == "unsafe", "-t unsafe"),
    ):
        if wrong:
            raise UsageError(f"{what} and --in-place exclude each other")
    files = [disk.file for disk in source.machine.disks]
    if None in files or len(set(files)) < len(files):
        raise PlanError(
            f"{source.file.name}: a disk is no file of its own, and cannot be converted in place",
            hint="convert without --in-place",
        )


def _disk_request(number: int, image: Image | None, request: MachineRequest, target: Target) -> Request:
    if image is None:
        raise PlanError("a physical disk cannot be converted in place")
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
    )


def _make_configs(request: MachineRequest, planned: Planned, mode: Verify | None, created: Created | None) -> None:
    target = planned.target
    with open_directory(target.directory) as directory, no_collisions(planned.small, directory, (), force=False):

        def check(files: Sequence[File]) -> None:
            if mode:
                verify_configs(planned.made, files, target, files[-1])

        carry_out(
            planned.small,
            installed().backend("copy").begin(directory, access=Access((), planned.mode)),
            (),
            request.target,
            verify=check,
            progress=None,
            created=created,
            done=lambda: None,
        )
