"""The difference between two bodies, field by field, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vmconv_fleet.catalogue.secrets import SECRET
from vmconv_fleet.words import time_text

MAX_LISTED = 200
MAX_TEXT = 300


class Difference(NamedTuple):
    """One field before and after; None: the field is missing."""

    field: str
    before: str | None
    after: str | None


def differences(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Difference]:
    """Returns the fields that differ, in order; names of nested fields are joined by dots."""
    old, new = dict(_flat(before or {})), dict(_flat(after or {}))
    found = [
        Difference(field, old.get(field), new.get(field))
        for field in dict.fromkeys([*old, *new])
        if old.get(field) != new.get(field)
    ]
    return found[:MAX_LISTED]


def _flat(body: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in body.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if name in SECRET:
                text = "(not shown)"
            elif name.endswith("_ms") and isinstance(value, int):
                text = time_text(value)
            yield f"{above}{name}", text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
