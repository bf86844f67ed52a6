"""The requests of a fan-out: one source, one target per format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from vmconv.conversion.containers import new_name
from vmconv.conversion.request import Request
from vmconv.errors import UsageError
from vmconv.io.registry import installed


def requests(
    common: Request, formats: Sequence[str], directory: str, options: Mapping[str, Mapping[str, Any]]
) -> list[Request]:
    """Returns one request per format: `common` with a target named after the source and the format's options."""
    registry = installed()
    wanted = [registry.writer(name) for name in formats]
    given = {registry.format(name).name: values for name, values in options.items()}
    if not wanted:
        raise UsageError("fan-out to no format")
    for name in given.keys() - {one.name for one in wanted}:
        raise UsageError(f"options for {name}, which is not made")
    own = os.path.basename(common.source.rstrip("/"))
    return [
        common._replace(
            target=os.path.normpath(os.path.join(directory, new_name(own, one, registry))),
            target_format=one.name,
            options=given.get(one.name, {}),
        )
        for one in wanted
    ]
