"""The choice of the backend of a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.errors import PlanError
from vmconv.interface.backend import Proposal, Survey

if TYPE_CHECKING:
    from vmconv.io.registry import Registry
    from vmconv.model.sources import File


def choose_backend(registry: Registry, name: str, directory: str, files: Sequence[File]) -> Proposal:
    """Returns the first backend that shares something, else the copying one with the reasons for copying."""
    if name != "auto":
        backend = registry.backend(name)
        capabilities = backend.capabilities(directory)
        if not capabilities.usable:
            raise PlanError(f"backend {name} cannot be used in {directory}: {capabilities.reason}")
        return Proposal(backend, backend.survey(directory, files))
    sharing = [backend for backend in registry.backends.values() if backend.automatic and backend.name != "copy"]
    if not files:
        # Nothing is shared, as for an empty disk, and whichever backend writes it the layout is that of the first.
        usable = (backend for backend in sharing if backend.capabilities(directory).usable)
        writer = next(usable, registry.backend("copy"))
        return Proposal(writer, (sharing or [writer])[0].survey(directory, files))
    refusals: dict[int, str] = {}
    for backend in sharing:
        survey = backend.survey(directory, files)
        if len(survey.refusals) < len(files):
            return Proposal(backend, survey)
        # The first backend's reason counts.
        refusals = {**survey.refusals, **refusals}
    return Proposal(registry.backend("copy"), Survey(1, refusals))
