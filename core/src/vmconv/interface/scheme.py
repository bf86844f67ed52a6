"""The interface of sources that are not local files: what is read from a URL that the user named.

A scheme opens a URL and returns a `Remote`: an object of known size that is read by ranges. `vmconv.io.remote` makes a
file of it that every format reads, with a cache for metadata. Images never name a URL: only the user does.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from vmconv.errors import UsageError

if TYPE_CHECKING:
    from vmconv.interface.container import ObjectContainer

MAX_URL = 8192
"""Characters of a URL."""
_MAX_LABEL = 63
"""Characters between two dots of a host's name (RFC 1035, section 2.3.4)."""

_BEGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# RFC 3986, section 3. The password and the query may hold secrets.
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?:(?P<user>[^:/?#@\[\]]*)(?::(?P<password>[^/?#@\[\]]*))?@)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:/?#@\[\]]*)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?"
    r"(?:\?(?P<query>[^#]*))?"
)


STANDARD_INPUT = "-"
"""The name of a source, or of a file with a passphrase, that is a pipe, or whatever the shell has opened."""


def is_url(text: str) -> bool:
    """Returns whether a source that the user named is a URL; a file of such a name is `./NAME`."""
    return _BEGIN.match(text) is not None


def without_secrets(text: str) -> str:
    """Returns a source's name for messages and results: of a URL without password and query."""
    if not is_url(text):
        return text
    found = _URL.fullmatch(text)
    return _address(found).shown if found else f"{text.partition('://')[0]}://..."


class Url(NamedTuple):
    """The parts of a URL, percent-encoded as given; `port` is None and others are empty where the URL has none."""

    scheme: str
    user: str
    password: str
    host: str
    port: int | None
    path: str
    query: str

    @property
    def shown(self) -> str:
        """The URL without password and query, which may be secrets."""
        user = f"{self.user}@" if self.user else ""
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{user}{self.host}{port}{self.path}{'?...' if self.query else ''}"

    @property
    def bare_host(self) -> str:
        """The host; an IPv6 address without its brackets."""
        return self.host.removeprefix("[").removesuffix("]")

    @property
    def name(self) -> str:
        """The last part of the decoded path, or the host: what a file there would be called."""
        found = self.decoded_path.rstrip("/").rpartition("/")[2]
        # Those are no names of files.
        return found if found not in ("", ".", "..") and "\0" not in found else self.host or "disk"

    @property
    def decoded_path(self) -> str:
        from urllib.parse import unquote

        return unquote(self.path, errors="surrogateescape")

    def beside(self, name: str) -> Url:
        """Returns the URL of another name in the same directory, without a query."""
        from urllib.parse import quote

        directory = self.path.rpartition("/")[0]
        return self._replace(path=f"{directory}/{quote(name, errors='surrogateescape')}", query="")


def parse_url(text: str) -> Url:
    """Returns the parts of a URL. Raises `UsageError` if it is no URL, or too long."""
    found = _URL.fullmatch(text) if len(text) <= MAX_URL and text.isprintable() and " " not in text else None
    if found is None:
        hint = "special characters are percent-encoded: # is %23, a space %20, @ in a user or password %40"
        raise UsageError(f"{without_secrets(text)}: is not a URL of at most {MAX_URL} characters", hint=hint)
    url = _address(found)
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise UsageError(f"{url.shown}: port {url.port} is not in 1..65535")
    if not _is_host(url.host):
        raise UsageError(f"{url.shown}: {url.host!r} is not the name of a host")
    return url


def _is_host(host: str) -> bool:
    """Returns whether Python can look a name up; it raises no `OSError` for others. No host is one, too."""
    try:
        ascii_host = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return False
    return not host or all(0 < len(label) <= _MAX_LABEL for label in ascii_host.removesuffix(".").split("."))


def _address(found: re.Match[str]) -> Url:
    part = {name: value or "" for name, value in found.groupdict().items()}
    port = int(part["port"]) if part["port"] else None
    return Url(part["scheme"].lower(), part["user"], part["password"], part["host"], port, part["path"], part["query"])


class Remote(ABC):
    """An object at a URL: `size` bytes that are read by ranges. Thread-safe.

    All bytes are of one version: a read raises `AccessError` if the object has changed since it was opened, as far as
    the server tells. `version` is what the server says of that version, such as an ETag; empty if it says nothing.
    `head` are bytes from its start that opening has read already.
    """

    size: int
    head: bytes = b""
    version: str = ""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer from `offset` on; the range is inside the object.

        Raises `ReadError` if the server fails, after a bounded number of retries.
        """

    def data_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Returns the `(start, end)` ranges of a range that may have data, in order; all others read as zero."""
        return [(start, end)] if start < end else []

    def problems(self) -> list[str] | None:
        """Returns what is wrong with the object where it lies, such as parts that are missing; reads no content.

        None if there is nothing to look at.
        """
        return None

    def close(self) -> None:
        """Closes all connections."""
        return


class Scheme(ABC):
    """A way to read from URLs that begin with `name`, lower case."""

    name: str
    title: str

    @abstractmethod
    def open(self, url: Url) -> Remote:
        """Returns the object at a URL.

        Raises `UsageError` for a URL without a meaning, `AccessError` if the server refuses, `ReadError` if it cannot
        be reached or fails.
        """

    def container(self, url: Url) -> ObjectContainer:
        """Returns the container of objects at a URL, for schemes of object stores. Raises errors as `open` does."""
        raise UsageError(f"{url.shown}: {self.name}:// has no containers of objects to convert in")
