"""A sync from start to end: what changed, the plan of a new image, and its exchange with the old one.

The new image is made beside the old one and replaces it in one rename, as `convert --force` does. It shares all blocks
with the source where storage allows it. Else it shares what did not change with the old image, and only the rest is
copied from the source.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from vmconv.backends.targets import refuse_directory, refuse_kept_names
from vmconv.conversion import pipeline
from vmconv.conversion.containers import Container
from vmconv.conversion.execute import carry_out
from vmconv.conversion.refusals import refuse_copies, refuse_other_kind, refuse_too_large
from vmconv.conversion.verify import refuse_impossible, verify_mode
from vmconv.conversion.verify import verify as verify_result
from vmconv.errors import AccessError, BackendError, PlanError, UsageError, warn
from vmconv.inplace.settling import settle
from vmconv.inspect import checking
from vmconv.io import attributes
from vmconv.io.registry import installed
from vmconv.model import references
from vmconv.model.plan import Plan, Progress, Totals
from vmconv.model.sources import File, stamp_of
from vmconv.syncing import old as olds
from vmconv.syncing import record as records
from vmconv.syncing.planning import Planning, Ready
from vmconv.syncing.request import NEW, SyncPlan, SyncRequest, SyncResult

if TYPE_CHECKING:
    from vmconv.interface.arguments import Verify
    from vmconv.io.directory import Directory


@contextmanager
def prepared(request: SyncRequest, comparing: Progress | None = None) -> Iterator[Ready]:
    """Yields the planned sync: all is read and checked, nothing is changed."""
    _refuse_combinations(request)
    settle(request.target)
    with pipeline.places(request.conversion(None, force=True)) as [(directory, name)]:
        if directory.status(name) is None:
            with _never_replaced(directory, name), _new(request) as ready:
                yield ready
            return
        refuse_directory(directory)
        refuse_kept_names(directory)
        with ExitStack() as stack:
            registry = installed()
            asked = request.conversion(None, force=True)
            opener = stack.enter_context(asked.opener(registry))
            image = opener.image(request.source, request.source_format, snapshot=request.snapshot)
            opener.given.refuse_unused()
            if image.kind != "disk":
                raise UsageError(
                    f"{image.file.name}: is a memory image, and only disks are synced", hint="convert it again"
                )
            image.warnings += tuple(checking.warnings(image, opener))
            image.flat  # noqa: B018 opens all layers
            old = stack.enter_context(olds.opened(directory, name, request, opener.files, registry))
            refuse_other_kind(image.file.name, image.kind, old.format, registry)
            place = directory, name
            yield Planning(request, image, opener, old, place, comparing=comparing, stack=stack).ready()


def _refuse_combinations(request: SyncRequest) -> None:
    others = {"since": request.since, "compare": request.compare, "snapshot": request.snapshot}
    for name, value in others.items():
        if request.bitmap is not None and value:
            raise UsageError(f"--bitmap and --{name} exclude each other")


@contextmanager
def _never_replaced(directory: Directory, name: str) -> Iterator[None]:
    """Gives errors of files that exist another hint: `--force` would destroy what another process made meanwhile."""
    try:
        yield
    except (PlanError, BackendError) as exc:
        if not exc.hint or not exc.hint.startswith("--force"):
            raise
        if not directory.has(name):
            raise PlanError(f"{exc}, and is no part of a target", hint="move it away") from exc
        raise AccessError(
            f"{directory.join(name)}: was made by another process during this sync",
            hint="sync again, which brings it up to date",
        ) from exc


@contextmanager
def _new(request: SyncRequest) -> Iterator[Ready]:
    """Yields the first sync, the conversion to a new target."""
    if request.since is not None:
        raise UsageError(f"{request.target}: does not exist, so nothing changed since {request.since}")
    if request.bitmap is not None:
        raise UsageError(f"{request.target}: does not exist, so there was no sync that the bitmap counts from")
    asked = request.conversion(request.target_format, force=False)
    with pipeline.prepared(asked) as found:
        size = found.image.size
        plan = SyncPlan(NEW, size, min(size, 1), 0, found.plan)
        yield Ready(
            request,
            asked,
            found.image,
            plan,
            tuple(found.containers),
            found.backend,
            found.begin,
            tuple(found.opener.files),
            None,
            records.state_of_source(found.image, request.snapshot),
            records.identity_of_source(found.image, request.snapshot),
            None,
            None,
        )


def run(
    request: SyncRequest,
    *,
    verify: bool | Verify = True,
    announce: Callable[[SyncPlan], None] | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
    comparing: Progress | None = None,
) -> SyncResult:
    """Brings the target up to date; see `vmconv.api.sync`."""
    began = time.perf_counter()
    done: list[SyncResult] = []
    mode = verify_mode(verify)
    try:
        with prepared(request, comparing) as ready:
            if ready.plan.plan is not None:
                refuse_copies(request.target, request.zero_copy, ready.plan.plan)
                refuse_too_large(ready.plan.plan)
                _refuse_impossible(ready, mode)
            if announce:
                announce(ready.plan)

            def note() -> None:
                done.append(_result(ready, time.perf_counter() - began))

            if ready.plan.plan is None:
                _confirm(ready)
                note()
            else:
                replace(ready, ready.plan.plan, mode, progress, verifying, note)
    except BaseException as exc:
        if not isinstance(exc, Exception):
            vars(exc)["results"] = tuple(done)
        raise
    return done[0]


def _refuse_impossible(ready: Ready, mode: Verify | None) -> None:
    if mode == "qemu" and ready.place:
        raise UsageError(
            f"--verify=qemu: {ready.request.target} is changed itself, and has no name meanwhile",
            hint="use --verify=bytes",
        )
    refuse_impossible(mode, _against_source(ready), installed(), ready.conversion)


def plan(request: SyncRequest, comparing: Progress | None = None) -> SyncPlan:
    """Returns what `run` would do; changes nothing."""
    with prepared(request, comparing) as ready:
        if ready.plan.plan is not None:
            refuse_copies(request.target, request.zero_copy, ready.plan.plan)
        return ready.plan


def replace(
    ready: Ready,
    planned: Plan,
    mode: Verify | None,
    progress: Progress | None,
    verifying: Progress | None,
    done: Callable[[], None],
) -> None:
    """Makes the new target, and gives it the name of the old one."""
    registry = installed()
    recorded: _Recorded | None = None

    def check(files: list[File]) -> None:
        nonlocal recorded
        if mode:
            verify_result(ready.containers, files, registry, "metadata")
            if mode != "metadata":
                verify_result(_against_source(ready), files, registry, mode, verifying)
        recorded = _record(ready, files)
        if recorded:
            # The commit closes the files, and changes their ctime.
            recorded = recorded._replace(descriptors=[os.dup(each) for each in recorded.descriptors])
            for descriptor in recorded.descriptors:
                opened.callback(os.close, descriptor)

    def committed() -> None:
        if recorded:
            records.settle(*recorded)
        done()
        # Not before the commit: until then the file may still become what it was.
        if ready.place and not recorded:
            attributes.remove_record(ready.place.descriptor)

    assert ready.begin
    with ExitStack() as opened:
        carry_out(
            planned,
            ready.begin(),
            ready.files,
            ready.request.target,
            verify=check,
            progress=progress,
            created=None,
            done=committed,
        )


def _against_source(ready: Ready) -> list[Container]:
    """Returns the containers with the source as what they are compared with, not the table that was written."""
    return [made._replace(source=ready.image) for made in ready.containers]


class _Recorded(NamedTuple):
    """The files of a target, its own the last, and the record that was written into that."""

    descriptors: list[int]
    record: records.Record


def _record(ready: Ready, files: list[File]) -> _Recorded | None:
    """Writes the record of a target's files, its own the last.

    Writes nothing if the request asks for no record. Warns if the record cannot be written.
    """
    if not ready.request.record:
        return None
    # Else a write within the same tick of the clock would leave the source as recorded.
    references.settle(ready.files)
    place = ready.place if ready.plan.plan else None
    stamps, descriptors = [], []
    for file, planned in zip_longest(files, ready.plan.plan.files if ready.plan.plan else ()):
        if place and planned and planned.name == place.carrier.name:
            inode, *_ = records.stamp_of(place.descriptor)
            stamps.append((inode, planned.size, place.mtime))
            descriptors.append(place.descriptor)
        else:
            stamps.append(records.stamp_of(file.descriptor))
            descriptors.append(file.descriptor)
    found = [records.Record(records.state_of_target(stamps), ready.state, ready.identity)]
    if place and ready.record:
        # Until the commit the file may still become what it was.
        found.append(ready.record)
    # The record changes the ctime of the file, which guards it.
    if place and place.carrier.file.changed():
        raise AccessError(f"{place.carrier.file.name}: was written to by another process", hint="stop it and try again")
    why = records.write(descriptors[-1], *found)
    if place:
        place.carrier.file.stamp = stamp_of(os.fstat(place.descriptor))
    if why:
        warn(f"{ready.request.target}: no record of this sync can be kept: {why}")
        return None
    return _Recorded(descriptors, found[0])


def _confirm(ready: Ready) -> None:
    """Writes the record of a target that is up to date, or removes one that is not wanted or does not fit."""
    for file in ready.files:
        if file.changed():
            raise AccessError(f"{file.name}: changed while it was being compared", hint="try again")
    if ready.old and not (ready.is_recorded and ready.request.record):
        own = ready.old.image.file
        recorded = _record(ready, [*(file for file in ready.old.files if file is not own), own])
        if recorded:
            records.settle(*recorded)
        elif not (ready.record and ready.request.record):
            attributes.remove_record(own.descriptor)


def _result(ready: Ready, seconds: float) -> SyncResult:
    found, planned = ready.plan, ready.plan.plan
    if ready.containers:
        kind, warned = ready.containers[-1].format, [one.source for one in ready.containers]
    else:
        # The target stays as it is.
        assert ready.old
        kind, warned = ready.old.format, [ready.image, ready.old.image]
    return SyncResult(
        ready.request.source,
        ready.request.target,
        ready.image.format_name,
        kind.name,
        ready.backend.name if planned and ready.backend else "none",
        found.evidence,
        found.changed,
        found.ranges,
        found.compared,
        planned.totals if planned else Totals(0, 0, 0, 0),
        planned.copies if planned else (),
        planned.losses if planned else (),
        tuple(dict.fromkeys(text for one in warned for text in one.warnings)),
        seconds,
    )
