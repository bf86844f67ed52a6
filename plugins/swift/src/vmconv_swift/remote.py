"""An object of the store as a source: plain, or a large object with the objects that hold its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

from vmconv.plugin import AccessError, HttpObject, Place, ReadError, Remote, VmconvError, in_order, parse_url
from vmconv_swift.client import asked, client_for
from vmconv_swift.manifest import Leaf, Window, windows_of
from vmconv_swift.names import object_of
from vmconv_swift.zeros import is_zeros

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Future

    from vmconv.plugin import Url
    from vmconv_swift.client import Client
    from vmconv_swift.names import ObjectName

MOST_PROBLEMS = 20
"""Problems that are listed."""
_HEAD = 256 << 10
"""Bytes that each reader asks for first."""


_coming: dict[Url, Future[SwiftObject]] = {}
"""Objects that are being opened."""


@contextmanager
def opened_ahead(url: Url) -> Iterator[None]:
    """Begins to open the object at a URL that is opened during the block, and to read what its reader asks for."""

    def ask() -> SwiftObject:
        made = _opened(url)
        try:
            head = bytearray(min(_HEAD, made.size))
            made.read_into(0, memoryview(head))
            made.head = bytes(head)
            # The object keeps them.
            _ = made.windows
        except BaseException:
            made.close()
            raise
        return made

    _coming[url] = asked(ask)
    try:
        yield
    finally:
        unused = _coming.pop(url, None)
        if unused:
            unused.add_done_callback(_close)


def _close(unused: Future[SwiftObject]) -> None:
    if not unused.exception():
        unused.result().close()


def opened(url: Url) -> SwiftObject:
    """Returns the object at a URL."""
    coming = _coming.pop(url, None)
    return coming.result() if coming else _opened(url)


def _opened(url: Url) -> SwiftObject:
    where = object_of(url)
    return SwiftObject(client_for(url), where)


class SwiftObject(Remote):
    """An object by ranges, of the version with the ETag that it had when it was opened."""

    def __init__(self, client: Client, where: ObjectName) -> None:
        self.client, self.where = client, where
        self.shown = client.shown(where)
        found = client.head(where)
        if found is None:
            raise AccessError(f"{self.shown}: there is no such object")
        if not found.size:
            raise AccessError(f"{self.shown}: is empty")
        self.found = found
        self.etag, self.size, self.large = found.etag, found.size, found.large
        self.version = found.etag
        cloud = client.cloud

        def sign(_: Place, headers: Mapping[str, str]) -> Mapping[str, str]:
            return {**headers, "X-Auth-Token": cloud.token()}

        named = parse_url(f"swift://{cloud.name}{where.quoted}")
        place = Place.of(parse_url(cloud.endpoint + where.quoted))
        self._http = HttpObject(
            named, place=place, sign=sign, renew=cloud.renew, context=cloud.context(), seen=found.headers
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.client.count()
        try:
            self._http.read_into(offset, buffer)
        except (AccessError, ReadError) as exc:
            raise self._explained(exc, offset, len(buffer)) from exc

    def _explained(self, exc: VmconvError, offset: int, length: int) -> VmconvError:
        """Returns the error of a read, with the object that is missing or has changed, if that is why."""
        if not self.large:
            return exc
        try:
            at, leaves = 0, []
            for window in self.windows:
                if window.leaf and at < offset + length and offset < at + window.length:
                    leaves.append(window.leaf)
                at += window.length
            problem = next(problems_of(self.client, leaves), None)
        except VmconvError:
            # The error of the read says more than that of looking for its reason.
            return exc
        return ReadError(f"{self.shown}: cannot be read at {offset:#x}: {problem}") if problem else exc

    @cached_property
    def windows(self) -> list[Window]:
        """The objects that hold the bytes, in order."""
        if self.found.headers.get("X-Object-Manifest"):
            # Its bytes are those of all objects of a prefix, and Swift reads no ranges of it below a manifest.
            return [Window(None, 0, self.size)]
        if not self.large:
            return [Window(Leaf(self.where, self.etag, self.size), 0, self.size)]
        return windows_of(self.client, self.where, self.etag, self.size)

    def data_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = 0
        for window in self.windows:
            low, high = max(start, at), min(end, at + window.length)
            at += window.length
            if low >= high or (window.leaf and is_zeros(window.leaf.etag, window.leaf.size)):
                continue
            if found and found[-1][1] == low:
                low = found.pop()[0]
            found.append((low, high))
        return found

    def problems(self) -> list[str] | None:
        if not self.large:
            return None
        found = []
        for problem in problems_of(self.client, (window.leaf for window in self.windows if window.leaf)):
            found.append(problem)
            if len(found) == MOST_PROBLEMS:
                break
        return found

    def close(self) -> None:
        self._http.close()


def problems_of(client: Client, leaves: Iterable[Leaf]) -> Iterator[str]:
    """Yields what is wrong with the objects that hold bytes of a large object; reads none of them."""
    yield from filter(None, in_order(partial(_problem, client), dict.fromkeys(leaves)))


def _problem(client: Client, leaf: Leaf) -> str | None:
    found = client.head(leaf.where)
    if found is None:
        return f"its segment {leaf.where.path} is missing"
    if found.size != leaf.size:
        return f"its segment {leaf.where.path} has changed: it has {found.size} bytes, it had {leaf.size}"
    if found.etag != leaf.etag:
        return f"its segment {leaf.where.path} has changed: its ETag is {found.etag}, it was {leaf.etag}"
    return None
