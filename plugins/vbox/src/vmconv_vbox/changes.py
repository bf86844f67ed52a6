"""Collects what becomes of the settings of a machine."""

from __future__ import annotations

from typing import Any, TypeVar

from vmconv.plugin import Substitution

T = TypeVar("T")


class Changes:
    """The substitutions found so far."""

    def __init__(self) -> None:
        self.found: list[Substitution] = []

    def add(self, path: str, before: Any, after: Any, reason: str) -> None:
        self.found.append(Substitution(path, _words(before), _words(after), reason))

    def value(self, path: str, before: Any, after: T, reason: str) -> T:
        """Returns the new value. It needs its reason only if the source states another one."""
        if before is not None and before != after:
            self.add(path, before, after, reason)
        return after


def _words(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
