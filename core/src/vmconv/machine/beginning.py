"""The members of a compressed package before it is decoded: only blocks in its beginning can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmconv.errors import ImageError
from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import Decoded

if TYPE_CHECKING:
    from vmconv.model.sources import File

_BLOCK = 4096
_ZERO = bytes(_BLOCK)


class Beginning:
    """Blocks of members in the first `limit` bytes of a compressed package, decoded when they are first needed.

    `fill` is called once. It calls `cover` and `put` for what it finds, and stops after `limit` bytes of the package.
    """

    limit = 64 << 20
    """The variables of the firmware, and the beginnings of disks, are mostly in that many bytes."""

    def __init__(self, file: File, compression: str, fill: Callable[[Beginning], None]) -> None:
        self._file = file
        self._compression = compression
        self._fill: Callable[[Beginning], None] | None = fill
        self._blocks: dict[tuple[str, int], bytes] = {}
        self._covered: dict[str, list[tuple[int, int]]] = {}

    def table(self, name: str, size: int) -> Extents:
        """Returns the table of a member of `size` bytes. What of it is zero is not known, so all counts as payload."""
        source = Decoded(
            f"{self._file.name}: {name}",
            self._file,
            unit=_BLOCK,
            count=-(-size // _BLOCK),
            reason=f"the archive is compressed ({self._compression})",
            decode=lambda first, count: self._found(name, first, count),
        )
        return Extents.of([(0, Kind.DATA, source, 0)] if size else [], size)

    def cover(self, name: str, start: int, length: int) -> None:
        """States that a range of a member is known: zeros, or what `put` was given. Begins at a multiple of 4096."""
        runs = self._covered.setdefault(name, [])
        begin = runs.pop()[0] if runs and runs[-1][1] == start else start
        runs.append((begin, -(-(start + length) // _BLOCK) * _BLOCK))

    def put(self, name: str, start: int, data: bytes) -> None:
        """Keeps the blocks of a member from `start` on, a multiple of 4096."""
        for at in range(0, len(data), _BLOCK):
            block = data[at : at + _BLOCK].ljust(_BLOCK, b"\0")
            if block != _ZERO:
                self._blocks[name, (start + at) // _BLOCK] = block

    def _found(self, name: str, first: int, count: int) -> list[bytes]:
        """Returns blocks of a member; raises `ImageError` for one that is not in the beginning."""
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
            for runs in self._covered.values():
                runs.sort()
        self._refuse_unknown(name, first * _BLOCK, (first + count) * _BLOCK)
        return [self._blocks.get((name, number), _ZERO) for number in range(first, first + count)]

    def _refuse_unknown(self, name: str, start: int, end: int) -> None:
        for begin, behind in self._covered.get(name, ()):
            if begin <= start < behind:
                start = behind
        if start < end:
            raise ImageError(
                f"{self._file.name}: {name} at {start:#x}: is not in the first {self.limit >> 20} MiB of the archive, "
                "which is compressed",
                hint="decompress the archive first, or convert the machine",
            )
