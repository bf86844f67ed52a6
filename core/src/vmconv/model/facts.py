"""What an image states of its disk besides the bytes: the record that readers give and writers read.

`vmconv.model.disk` is its schema, which validates it for `info`. This module imports nothing that takes time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from uuid import UUID


MINOR = frozenset({"creator", "adapter_type"})
"""Facts that no guest depends on once its disk is in another format."""


class MinorLoss(str):
    """A loss of no consequence: commands print it only if they are asked for details."""

    __slots__ = ()


class Geometry(NamedTuple):
    """Cylinders, heads and sectors per track that the guest's firmware is told."""

    cylinders: int
    heads: int
    sectors: int

    def __str__(self) -> str:
        return f"cylinders {self.cylinders}, heads {self.heads}, sectors {self.sectors}"


class DiskFacts(NamedTuple):
    """Facts of a disk that have a meaning in several formats; None means that the image does not say.

    Sizes are bytes. Size and parent of the disk are those of its `Image`.
    """

    logical_sector_size: int | None = None
    physical_sector_size: int | None = None
    identity: UUID | None = None
    geometry: Geometry | None = None
    adapter_type: str | None = None
    creator: str | None = None

    def stated(self) -> Iterator[tuple[str, object]]:
        """Yields names and values of the facts that the image states."""
        return ((name, value) for name, value in zip(self._fields, self, strict=True) if value is not None)
