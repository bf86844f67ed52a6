"""A layer of a disk that is written to while it is in use, as by a guest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator


class WritableLayer(ABC):
    """The disk that a layer and those below it show, with its writes going to the layer alone; thread-safe.

    What was written before `flush` returned is in the file whatever happens later, in a structure that is right or has
    clusters too many. What was not flushed may be lost in whole or in part. Raises `OSError` if storage fails; after a
    flush that failed, everything but reads and `close` fails.
    """

    size: int

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with the disk's bytes from `offset` on."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk."""

    @abstractmethod
    def zero(self, offset: int, length: int, *, exact: bool = True) -> None:
        """Makes a range read as zero, and frees its blocks. Without `exact` parts of blocks may stay as they are."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when all earlier writes are durable."""

    @abstractmethod
    def spans(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yields `(length, is data)` of contiguous spans of a range; what is not data reads as zero."""

    @abstractmethod
    def close(self) -> None:
        """Flushes and closes the file."""
