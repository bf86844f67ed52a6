"""The conversion of a whole machine by a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vmconv.plugin import PlanError
from vmconv_fleet.jobs.conversion import Conversion, listed

if TYPE_CHECKING:
    from vmconv.api import MachinePlan, MachineResult


class MachineConversion(Conversion):
    """Converts one machine into a new directory."""

    def _target(self, source: str) -> str:
        stem = os.path.splitext(os.path.basename(source))[0]
        directory, name = self._place(stem, f".{self._task.format}", self._task.format)
        path = os.path.join(directory, name)
        if os.path.islink(path) or _has_files(path):
            # A link is not followed. A killed worker leaves directories, and unnamed files that the conversion removes.
            raise PlanError(f"{name}: already exists", hint="name another target")
        return f"{path}/"

    def _arguments(self) -> dict[str, Any]:
        task = self._task
        return {
            "target_format": task.format,
            "options": task.options,
            "disk_format": task.disk_format,
            "disk_options": task.disk_options,
            "strict": task.strict,
            "keep": task.keep,
            "uuid": task.uuid,
            "new_identity": task.new_identity,
            "zero_copy": task.zero_copy,
            "allow_external": self._roots,
            "confined": True,
        }

    def _plan(self, source: str, target: str) -> None:
        from vmconv.api import machine_plan, refuse_copies

        plan = machine_plan(source, target, **self._arguments())
        self._report(plan, target)
        refuse_copies(target, self._task.zero_copy, plan)

    def _convert(self, source: str, target: str) -> MachineResult:
        from vmconv.api import machine_convert

        def announce(plan: MachinePlan) -> None:
            self._report(plan, target)
            self._go.wait()

        return machine_convert(
            source, target, announce=announce, created=self._created, progress=self._progress, **self._arguments()
        )

    def _report(self, plan: MachinePlan, target: str) -> None:
        self._refuse_elsewhere(plan, plan.files)
        above = os.path.dirname(os.path.dirname(target))
        self._emit_plan(
            plan,
            os.path.relpath(os.path.join(plan.directory, plan.files[-1]), above),
            backend=plan.backend,
            losses=listed(list(_losses(plan))),
            changes=listed([f"{one.path} {one.before} -> {one.after}: {one.reason}" for one in plan.substitutions]),
        )

    def _outcome(self, source: str, result: MachineResult) -> dict[str, Any]:
        return {"warnings": listed([*result.plan.warnings, *result.plan.notes])}


def _losses(plan: MachinePlan) -> Iterator[str]:
    for loss in plan.losses:
        yield f"{loss.path} {loss.value}: {loss.reason}"
    for disk in plan.disks:
        yield from disk.losses


_UNNAMED = ".vmconv-"
"""The beginning of names of files that a conversion has not named yet, and of the journal that names them."""


def _has_files(path: str) -> bool:
    """Returns whether a path is a file, or a directory with a file in or below it that has its name."""
    if not os.path.isdir(path):
        return os.path.lexists(path)
    return any(not name.startswith(_UNNAMED) for _, _, files in os.walk(path) for name in files)
