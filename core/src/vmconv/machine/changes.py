"""Collects the changes that a platform needs to a machine, with their reasons."""

from __future__ import annotations

from typing import Any, TypeVar

from vmconv.interface.machines import Substitution

_Value = TypeVar("_Value")

_SHOWN = 200
"""Characters of a value in a substitution."""


class Changes:
    """The substitutions of one adaptation, in `found`."""

    def __init__(self) -> None:
        self.found: list[Substitution] = []

    def add(self, path: str, before: Any, after: Any, reason: str) -> None:
        """Adds a substitution."""
        self.found.append(Substitution(path, _words(before), _words(after), reason))

    def set(self, path: str, before: Any, after: _Value, reason: str) -> _Value:
        """Returns the new value of a field; adds a substitution if the source states another one."""
        if before not in (None, (), after) or (before is False and after is None):
            self.add(path, before, after, reason)
        return after


def _words(value: Any) -> str:
    """Returns a value on one line; empty for none."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(_words, value))
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())[:_SHOWN]
