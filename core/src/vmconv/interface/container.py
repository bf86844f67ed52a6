"""The interface of containers of objects: what a fleet lists, owns and converts in an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmconv.interface.backend import ObjectBackend


class StoredObject(NamedTuple):
    """An object as a listing shows it: `size` in bytes, `changed` in seconds since 1970.

    `version` is another one for other content: that of the `Remote` that reads the object.
    """

    name: str
    size: int
    version: str
    changed: float


class ObjectContainer(ABC):
    """A container of an object store, with a note of vmconv's own beside it. Made by `Scheme.container`.

    `shown` is its URL for messages. `identity` is equal on all machines that see this container, whatever they call its
    store, and has no secrets. `requests` is about the number of requests to the store so far.
    """

    shown: str
    identity: str

    @property
    @abstractmethod
    def requests(self) -> int: ...

    @abstractmethod
    def objects(self) -> Iterator[StoredObject]:
        """Yields the objects, a page at a time; the store is trusted with neither their number nor their names."""

    @abstractmethod
    def url(self, name: str) -> str:
        """Returns the URL of an object. Raises `UsageError` for a name that cannot be in a URL."""

    @abstractmethod
    def version(self, name: str) -> str | None:
        """Returns the version of an object; None if there is none."""

    @abstractmethod
    def note(self) -> bytes | None:
        """Returns the note; None if there is none. Raises `AccessError` for one that is too long."""

    @abstractmethod
    def write_note(self, data: bytes, *, replace: bool) -> None:
        """Writes the note. Without `replace`, a note that is there stays."""

    @abstractmethod
    def backend(self, name: str, ready: Callable[[str], None]) -> ObjectBackend:
        """Returns a backend that makes the object `name`, and replaces none.

        `ready` is called with the version of the new object right before it appears.
        """
