"""Parents that the user names, for layers whose parent is not where they say."""

from __future__ import annotations

from collections.abc import Iterable

from vmconv.errors import UsageError
from vmconv.model.sources import File


class GivenParents:
    """Files that the user names as parents, in the order of the layers from the top down.

    A layer keeps the parent that it got, however often it is read. `paths` is None for a caller that takes none, such
    as a command that keeps the stored name.
    """

    def __init__(self, paths: Iterable[str] | None = None) -> None:
        self.are_taken = paths is not None
        self._paths = tuple(dict.fromkeys(paths or ()))
        self._taken: dict[tuple[int, int], str] = {}

    def __bool__(self) -> bool:
        return bool(self._paths)

    def candidates(self, layer: File) -> list[str]:
        """Returns the paths that may be the parent of a layer: the one that it has, or those that are not taken."""
        if taken := self._taken.get(layer.stamp[:2]):
            return [taken]
        return [path for path in self._paths if path not in self._taken.values()]

    def take(self, layer: File, path: str) -> None:
        self._taken[layer.stamp[:2]] = path

    def refuse_unused(self) -> None:
        """Raises `UsageError` for a path that no layer needed."""
        for path in self._paths:
            if path not in self._taken.values():
                raise UsageError(
                    f"--parent {path}: no layer takes it as its parent: each has one where it says, or by its identity",
                    hint="vmconv rebase gives a layer another parent",
                )
