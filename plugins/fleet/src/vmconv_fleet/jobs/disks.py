"""The conversion of a disk by a worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmconv.plugin import PlanError
from vmconv_fleet.jobs import strips
from vmconv_fleet.jobs.conversion import Conversion, listed

if TYPE_CHECKING:
    from vmconv.api import Plan, Result
    from vmconv_fleet.jobs.task import Task


def parts_of_target(task: Task) -> tuple[str, str, str]:
    """Returns stem and suffix of the name that a target has by default, and its format."""
    from vmconv.api import new_name
    from vmconv.plugin import installed

    registry = installed()
    one = registry.format(task.format)
    own = task.name.rpartition("/")[2]
    stem = registry.stem(own)
    return stem, new_name(own, one, registry).removeprefix(stem), one.name


class DiskConversion(Conversion):
    """Converts one disk into a file."""

    def _target(self, source: str) -> str:
        directory, name = self._place(*parts_of_target(self._task))
        path = os.path.join(directory, name)
        if os.path.lexists(path):
            # A link is not followed: it could lead anywhere.
            raise PlanError(f"{name}: already exists", hint="name another target")
        return path

    def _arguments(self) -> dict[str, Any]:
        # The conversion opens and makes files in the datastores only, and looks where it is once it has opened them.
        return {
            "target_format": self._task.format,
            "options": self._task.options,
            "zero_copy": self._task.zero_copy,
            "allow_external": self._roots,
            "confined": True,
        }

    def _plan(self, source: str, target: str) -> None:
        from vmconv.api import Request, prepared, refuse_copies

        with prepared(Request(source, target, **self._arguments())) as ready:
            self._report(ready.plan, source=strips.of_disk(ready.image))
            refuse_copies(target, self._task.zero_copy, ready.plan)

    def _convert(self, source: str, target: str) -> Result:
        from vmconv.api import convert

        self._before = _stamp(source)
        return convert(
            source,
            target,
            announce=self._announce,
            created=self._created,
            progress=self._progress,
            **self._arguments(),
        )

    def _announce(self, plan: Plan) -> None:
        self._report(plan)
        self._go.wait()

    def _report(self, plan: Plan, **more: Any) -> None:
        self._refuse_elsewhere(plan, [file.name for file in plan.files])
        more |= {"losses": listed(plan.losses), "strips": strips.of_plan(plan)}
        self._emit_plan(plan, self._names[-1], backend=plan.way, **more)

    def _outcome(self, source: str, result: Result) -> dict[str, Any]:
        kept = self._remove(source, result) if self._task.removable else None
        return {"warnings": listed(result.warnings), "source_kept": kept}

    def _remove(self, source: str, result: Result) -> str | None:
        """Removes the source of a finished conversion; returns the reason if it has to stay."""
        from vmconv.plugin import Opener, installed

        if result.totals.referenced:
            return "the target refers to it"
        with Opener(installed(), allow_external=self._roots, confined=True) as opener:
            image = opener.image(source, result.source_format)
            if any(one is not image.file for one in image.guest.sources) or image.dependencies:
                return "it consists of several files"
            if image.file.changed() or _stamp(source) != self._before:
                return "it has changed"
            os.unlink(source)
        return None


def _stamp(name: str) -> tuple[int, ...]:
    """Returns what tells a file from another one of the name, and from a later state of it."""
    status = os.stat(name, follow_symlinks=False)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
