"""A container for a fleet: its objects, and the note with its owner in vmconv's own container."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from vmconv.plugin import AccessError, ObjectContainer, StoredObject, UsageError, parse_url
from vmconv_swift.backend import SwiftBackend, Target
from vmconv_swift.client import client_for
from vmconv_swift.names import OWN_SUFFIX, ObjectName, container_of, object_of, own_container
from vmconv_swift.records import NOTES, make_own, refuse_stranger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmconv.plugin import Url
    from vmconv_swift.client import Client

_MAX_NOTE = 64 << 10
_PORTS = {"http": 80, "https": 443}


class SwiftContainer(ObjectContainer):
    """A container of a cloud's account: known by the address of the account, whatever a machine calls the cloud."""

    def __init__(self, client: Client, name: str) -> None:
        if name.endswith(OWN_SUFFIX):
            raise UsageError(f"swift://{client.cloud.name}/{name}: a container of this name is vmconv's own")
        self.client, self.name = client, name
        self.shown = f"swift://{client.cloud.name}/{name}"
        self.identity = _identity(client.cloud.endpoint, name)
        self._note = ObjectName(own_container(name), f"{NOTES}owner")

    @classmethod
    def at(cls, url: Url) -> Self:
        return cls(client_for(url), container_of(url))

    @property
    def requests(self) -> int:
        return self.client.requests

    def objects(self) -> Iterator[StoredObject]:
        for entry in self.client.listing(self.name):
            yield StoredObject(entry.name, entry.size, entry.etag, entry.modified)

    def url(self, name: str) -> str:
        return self._target(name).url.shown

    def _target(self, name: str) -> Target:
        if not name.isprintable():
            raise UsageError(f"{self.shown}: {name[:80]!r} is not printable text")
        where = ObjectName(self.name, name)
        url = parse_url(f"swift://{self.client.cloud.name}{where.quoted}")
        return Target(object_of(url), url)

    def version(self, name: str) -> str | None:
        found = self.client.head(self._target(name).where)
        return found.etag if found else None

    def note(self) -> bytes | None:
        if self.client.container(self.name) is None:
            raise AccessError(f"{self.shown}: there is no such container")
        if not refuse_stranger(self.client, self._note.container):
            return None
        return self.client.read_if_there(self._note, _MAX_NOTE)

    def write_note(self, data: bytes, *, replace: bool) -> None:
        if not refuse_stranger(self.client, self._note.container):
            make_own(self.client, self.name)
        if replace:
            self.client.put(self._note, data)
        else:
            self.client.put_new(self._note, data)

    def backend(self, name: str, ready: Callable[[str], None]) -> SwiftBackend:
        return SwiftBackend(self.client, [self._target(name)], ready=ready)


def _identity(endpoint: str, name: str) -> str:
    """Returns the address of a container, with or without TLS."""
    url = parse_url(endpoint)
    port = "" if url.port in (None, _PORTS[url.scheme]) else f":{url.port}"
    return f"{url.host.lower()}{port}{url.path}/{name}"
