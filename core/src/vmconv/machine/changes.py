"""Collects the changes that a platform needs to a machine, with their reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from vmconv.interface.machines import Substitution

if TYPE_CHECKING:
    from pydantic import BaseModel

_Value = TypeVar("_Value")
_Part = TypeVar("_Part", bound="BaseModel")

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

    def update(self, part: _Part, prefix: str, reason: str, **values: Any) -> _Part:
        """Returns a part of the machine with other values; `prefix` is its path with the dot at its end."""
        for field, value in values.items():
            self.set(f"{prefix}{field}", getattr(part, field), value, reason)
        return part.model_copy(update=values)


def _words(value: Any) -> str:
    """Returns a value on one line; empty for none."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(_words, value))
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())[:_SHOWN]
