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
    refusals: dict[int, str] = {}
    for backend in registry.backends.values():
        if backend.automatic and backend.name != "copy":
            survey = backend.survey(directory, files)
            if len(survey.refusals) < len(files):
                return Proposal(backend, survey)
            if not files:
                # Nothing is shared, as for an empty disk. The layout is the same, whichever backend writes it.
                shares = backend.capabilities(directory).usable
                return Proposal(backend if shares else registry.backend("copy"), survey)
            # The first backend's reason counts.
            refusals = {**survey.refusals, **refusals}
    return Proposal(registry.backend("copy"), Survey(1, refusals))
