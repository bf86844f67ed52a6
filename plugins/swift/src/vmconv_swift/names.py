"""Names in the store: of objects that users name, and of vmconv's own container."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmconv.plugin import UsageError

if TYPE_CHECKING:
    from vmconv.plugin import Url

OWN_SUFFIX = "_vmconv"
"""What vmconv's own container is called after the container that it belongs to."""
MAX_NAME = 1024
"""Bytes of an object's name, by Swift's default."""
_MAX_CONTAINER = 256


class ObjectName(NamedTuple):
    """An object of one account."""

    container: str
    name: str

    @property
    def path(self) -> str:
        """The name as manifests have it."""
        return f"/{self.container}/{self.name}"

    @property
    def quoted(self) -> str:
        """The path of a request, below that of the account."""
        from urllib.parse import quote

        return quote(self.path)


def own_container(container: str) -> str:
    return container + OWN_SUFFIX


def container_of(url: Url) -> str:
    """Returns the container that a URL without an object names."""
    container, _, name = _path(url).partition("/")
    if not container or name:
        raise UsageError(f"{url.shown}: is not swift://CLOUD/CONTAINER")
    return container


def object_of(url: Url) -> ObjectName:
    """Returns the object that a URL names."""
    container, _, name = _path(url).partition("/")
    if not container or not name or name.endswith("/"):
        raise UsageError(f"{url.shown}: is not swift://CLOUD/CONTAINER/OBJECT")
    # A client between here and the store may resolve such parts of a path.
    if {".", ".."} & set(name.split("/")) or container in (".", ".."):
        raise UsageError(f"{url.shown}: has a part . or .. in its path")
    if len(name.encode()) > MAX_NAME:
        raise UsageError(f"{url.shown}: the name has {len(name.encode())} bytes, at most {MAX_NAME} are possible")
    return ObjectName(container, name)


def _path(url: Url) -> str:
    if not url.host or url.user or url.password or url.port is not None or url.query:
        raise UsageError(
            f"{url.shown}: is not swift://CLOUD/CONTAINER/OBJECT",
            hint="CLOUD is a name in clouds.yaml, or - for the variables OS_*",
        )
    path = url.decoded_path.removeprefix("/")
    if not path.isprintable():
        raise UsageError(f"{url.shown}: its path is not printable text")
    if len(path.partition("/")[0].encode()) > _MAX_CONTAINER:
        raise UsageError(f"{url.shown}: a container's name has at most {_MAX_CONTAINER} bytes")
    return path
