"""The fields of objects while they are read: what nobody has read is what the machine has no place for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from vmconv.machine import quoted, refused

if TYPE_CHECKING:
    from vmconv.plugin import File


class Settings:
    """Returns fields of a file's objects, and remembers which."""

    def __init__(self, file: File) -> None:
        self.file = file
        self._read: set[tuple[int, str]] = set()

    def get(self, values: Any, path: str, kind: type | tuple[type, ...]) -> Any:
        """Returns the value at a path, None without it; raises `ImageError` for a value of another type."""
        for name in path.split("."):
            if not isinstance(values, dict):
                raise refused(self.file, path, f"{quoted(values)} is not an object")
            self._read.add((id(values), name))
            values = values.get(name)
            if values is None:
                return None
        return self._checked(values, path, kind)

    def entry(self, values: dict[str, Any], name: str, kind: type) -> Any:
        """Returns the value of a name that may have dots, None without it."""
        self._read.add((id(values), name))
        return None if values.get(name) is None else self._checked(values[name], name, kind)

    def _checked(self, value: Any, path: str, kind: type | tuple[type, ...]) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, str))):
            raise refused(self.file, path, f"{quoted(value)} has the wrong type")
        return value

    def list(self, values: Any, path: str) -> list[dict[str, Any]]:
        """Returns the objects of a list, none without it."""
        found = self.get(values, path, list) or []
        for each in found:
            if not isinstance(each, dict):
                raise refused(self.file, path, f"{quoted(each)} is not an object")
        return list(found)

    def unread(self, value: Any, path: str, besides: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Yields the paths below `value` that nobody has read, with their values, but those in `besides`.

        An object in a list of which nothing was read is one of them.
        """
        if isinstance(value, dict):
            for name, each in value.items():
                where = f"{path}.{name}" if path else str(name)
                if where in besides or each is None:
                    continue
                if (id(value), name) in self._read:
                    yield from self.unread(each, where, besides)
                else:
                    yield where, each
        elif isinstance(value, list):
            for at, each in enumerate(value):
                if isinstance(each, dict) and not any((id(each), name) in self._read for name in each):
                    yield f"{path}[{at}]", each
                else:
                    yield from self.unread(each, f"{path}[{at}]", besides)
