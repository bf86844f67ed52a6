"""Plans of machines as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmconv.machine.request import DiskPlan, MachinePlan


_LONGEST = 400


def plan_lines(plan: MachinePlan) -> Iterator[str]:
    """Yields what becomes of each disk and of each setting that changes, and the new files."""
    yield from (_disk(disk) for disk in plan.disks)
    for copy in plan.copies:
        yield f"copied because {copy.reason}: {_size(copy.bytes)}"
    if plan.digested:
        yield f"read for the digests of the manifest: {_size(plan.digested)}"
    yield from change_lines(plan)
    yield from (f"file {name}" for name in plan.files)
    yield from (f"note: {note}" for note in plan.notes)
    yield from (f"warning: {warning}" for warning in plan.warnings)


def change_lines(plan: MachinePlan) -> Iterator[str]:
    """Yields the settings that the new machine has with another value, or not at all."""
    from vmconv.errors import counted

    yield f"carried over: {counted(len(plan.carried), 'setting')}"
    for one in plan.substitutions:
        yield f"changed: {one.path} {one.before} -> {one.after}: {one.reason}"
    for loss in plan.losses:
        yield f"not carried over: {loss.path} {_short(loss.value)}: {loss.reason}"
    for disk in plan.disks:
        yield from (f"not carried over: {loss}" for loss in disk.losses)


def _short(text: str) -> str:
    """Returns a value without its end if it is longer than a few lines; JSON has all of it."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _disk(disk: DiskPlan) -> str:
    totals = disk.totals
    return (
        f"disk {disk.source} ({disk.source_format}) -> {disk.target} ({disk.target_format}): "
        f"shared {_size(totals.shared)}, copied {_size(totals.copied)}, written {_size(totals.written)}"
    )


def _size(size: int) -> str:
    from vmconv.cli.output import size_text

    return size_text(size)
