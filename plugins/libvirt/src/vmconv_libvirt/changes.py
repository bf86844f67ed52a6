"""Collects the changes to a machine, with their reasons."""

from __future__ import annotations

from typing import Any, TypeVar

from vmconv.plugin import Substitution

T = TypeVar("T")


class Changes:
    """The substitutions of one adaptation."""

    def __init__(self) -> None:
        self.found: list[Substitution] = []

    def set(self, path: str, before: Any, after: T, reason: str) -> T:
        """Returns the new value of a field; a field that the source states and that changes gets its reason."""
        if before not in (None, (), after) or (before is False and after is None):
            self.found.append(Substitution(path, _words(before), _words(after), reason))
        return after


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(_words(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())[:200]
