"""The conversion of an object by a worker: another object, which refers to the same payload."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vmconv_fleet.catalogue.containers import container_at, refuse_unless_owned
from vmconv_fleet.jobs import strips
from vmconv_fleet.jobs.conversion import Conversion, listed
from vmconv_fleet.jobs.disks import parts_of_target

if TYPE_CHECKING:
    from vmconv.api import Plan, Result
    from vmconv.plugin import ObjectBackend, ObjectTarget, Reading


class ObjectConversion(Conversion):
    """Makes an object beside another one in its container."""

    def _source(self) -> str:
        self._container = container_at(self._task.root)
        refuse_unless_owned(self._container, self._task.owners)
        return self._container.url(self._task.name)

    def _target(self, source: str) -> str:
        directory, slash, _ = self._task.name.rpartition("/")
        _, own = self._place(*parts_of_target(self._task))
        self._names, name = [own], f"{directory}{slash}{own}"
        self._storage = self._container.backend(name, partial(self._journal.write_object, self._task.root, name))
        return self._container.url(name)

    def _arguments(self, source: str, target: str) -> tuple[ObjectBackend, Reading, list[ObjectTarget]]:
        from vmconv.plugin import ObjectTarget, Reading

        return self._storage, Reading(source), [ObjectTarget(target, self._task.format, self._task.options)]

    def _plan(self, source: str, target: str) -> None:
        from vmconv.api import refuse_copies
        from vmconv.plugin import planned_objects

        with planned_objects(*self._arguments(source, target)) as ready:
            self._report(ready.plan, source=strips.of_disk(ready.image))
            refuse_copies(target, self._task.zero_copy, ready.plan)

    def _convert(self, source: str, target: str) -> Result:
        from vmconv.plugin import make_objects

        (result,) = make_objects(
            *self._arguments(source, target),
            zero_copy=self._task.zero_copy,
            announce=self._announce,
            progress=self._progress,
        )
        return result

    def _outcome(self, source: str, result: Result) -> dict[str, Any]:
        return {"warnings": listed(result.warnings)}

    def _report(self, plan: Plan, **more: Any) -> None:
        more |= {"losses": listed(plan.losses), "strips": strips.of_plan(plan)}
        self._emit_plan(plan, self._names[-1], backend=plan.way, **more)

    def _announce(self, plan: Plan) -> None:
        self._report(plan)
        self._go.wait()
