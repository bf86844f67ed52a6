"""Fields of records that are replicated, because owners need them, and shown to nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SECRET = frozenset({"hash"})
"""Names of fields, at any depth of a body: a token's hash is in its record, the request for it, and its transaction."""


def shown(value: Any) -> Any:
    """Returns a body, or a part of it, without its secret fields."""
    if isinstance(value, Mapping):
        return {name: shown(part) for name, part in value.items() if name not in SECRET}
    if isinstance(value, list | tuple):
        return [shown(part) for part in value]
    return value
