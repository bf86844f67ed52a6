"""Static large objects: their manifests, resolved to the objects that hold bytes, and made.

A manifest lists ranges of objects, which may be large objects themselves. Swift checks ETag and size of objects when it
reads them, but not those of manifests inside manifests. So what refers to payload names the objects that hold it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import md5
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.plugin import MAX_SIZE, BackendError, ImageError, ReadError
from vmconv_swift.names import ObjectName

if TYPE_CHECKING:
    from vmconv_swift.client import Client

MAX_DEPTH = 10
"""Manifests inside each other; Swift reads no more."""
MAX_LEAVES = 1_000_000
"""Ranges of one large object."""
MAX_MANIFESTS = 20_000
"""Manifests that are read for one large object."""
MAX_MANIFEST = 64 << 20
"""Bytes of a manifest. Swift's default limit is 8 MiB, and what it stores has more words than what it gets."""

_RANGE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")
_MD5 = re.compile(r"[0-9a-f]{32}")


class Leaf(NamedTuple):
    """An object that holds bytes of a large object."""

    where: ObjectName
    etag: str
    size: int


class Window(NamedTuple):
    """`length` bytes of a large object: from `offset` of a leaf on, or in the manifest itself (None)."""

    leaf: Leaf | None
    offset: int
    length: int


class Segment(NamedTuple):
    """A row of a manifest: `[offset, offset + length)` of an object of `size` bytes, or of what the row has inline."""

    where: ObjectName | None
    etag: str
    size: int
    offset: int
    length: int
    large: bool = False

    @property
    def whole(self) -> bool:
        return self.length == self.size


# -- reading


def windows_of(client: Client, where: ObjectName, etag: str, size: int) -> list[Window]:
    """Returns the windows of the large object with this ETag and size, in order.

    Raises `ImageError` if its manifests contradict each other, or are more than the limits.
    """
    reading = _Reading(client)
    segments = reading.manifest(where)
    if (found := etag_of(segments)) != etag:
        raise ReadError(f"{client.shown(where)}: changed while it was being read: ETag was {etag}, is {found}")
    return list(reading.windows(where, segments, 0, size, 1))


class _Reading:
    """The manifests of one large object, each read once."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._read: dict[ObjectName, list[Segment]] = {}
        self._count = 0

    def manifest(self, where: ObjectName) -> list[Segment]:
        if where not in self._read:
            if len(self._read) >= MAX_MANIFESTS:
                raise ImageError(f"{self.client.shown(where)}: is one of more than {MAX_MANIFESTS} manifests")
            body = self.client.read(where, MAX_MANIFEST, "?multipart-manifest=get")
            self._read[where] = parsed(body, self.client.shown(where))
        return self._read[where]

    def windows(
        self, where: ObjectName, segments: Sequence[Segment], offset: int, length: int, depth: int
    ) -> Iterator[Window]:
        """Yields the windows of a range of a large object, which its segments have to hold as a whole."""
        total = sum(segment.length for segment in segments)
        if offset + length > total:
            said = f"{self.client.shown(where)}: its segments have {total} bytes, {offset + length} are stated"
            raise ImageError(said)
        at = 0
        for segment in segments:
            begin, end = max(offset, at), min(offset + length, at + segment.length)
            if begin < end:
                yield from self._part(segment, segment.offset + begin - at, end - begin, depth)
            at += segment.length

    def _part(self, segment: Segment, offset: int, length: int, depth: int) -> Iterator[Window]:
        if segment.where is None or not segment.large:
            self._count += 1
            if self._count > MAX_LEAVES:
                raise ImageError(f"a large object has more than {MAX_LEAVES} ranges")
            leaf = Leaf(segment.where, segment.etag, segment.size) if segment.where else None
            yield Window(leaf, offset, length)
            return
        if depth >= MAX_DEPTH:
            raise ImageError(f"{self.client.shown(segment.where)}: is inside of {MAX_DEPTH} manifests")
        inner = self.manifest(segment.where)
        if sum(each.length for each in inner) != segment.size or etag_of(inner) != segment.etag:
            raise ImageError(f"{self.client.shown(segment.where)}: is not the manifest that was referred to")
        yield from self.windows(segment.where, inner, offset, length, depth + 1)


def parsed(body: bytes, said: str) -> list[Segment]:
    """Returns the segments of a manifest as the store has it. Raises `ImageError` if it cannot be understood."""
    try:
        rows = json.loads(body)
        if not isinstance(rows, list):
            raise TypeError("no list")
        segments = [_segment(row) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ImageError(f"{said}: its manifest cannot be understood: {str(exc)[:100]}") from exc
    if sum(segment.length for segment in segments) > MAX_SIZE:
        raise ImageError(f"{said}: its segments have more than {MAX_SIZE} bytes")
    return segments


def _segment(row: Any) -> Segment:
    if "data" in row:
        from base64 import b64decode

        data = b64decode(row["data"], validate=True)
        return Segment(None, md5(data, usedforsecurity=False).hexdigest(), len(data), 0, len(data))
    name, size, etag = row["name"], row["bytes"], row["hash"]
    if not (isinstance(name, str) and type(size) is int and 0 <= size <= MAX_SIZE and _MD5.fullmatch(etag)):
        raise ValueError(f"{str(name)[:60]!r}: bytes {str(size)[:30]}, hash {str(etag)[:40]}")
    container, _, rest = name.removeprefix("/").partition("/")
    if not container or not rest:
        raise ValueError(f"{name[:60]!r} is no object")
    offset, length = 0, size
    if row.get("range"):
        found = _RANGE.fullmatch(row["range"])
        if not found or not int(found[1]) <= int(found[2]) < size:
            raise ValueError(f"range {str(row['range'])[:60]!r} of {size} bytes")
        offset, length = int(found[1]), int(found[2]) - int(found[1]) + 1
    return Segment(ObjectName(container, rest), etag, size, offset, length, bool(row.get("sub_slo")))


# -- making


def etag_of(segments: Iterable[Segment]) -> str:
    """Returns the ETag of a large object: the MD5 of its segments' ETags and ranges, as Swift forms it."""
    digest = md5(usedforsecurity=False)
    for segment in segments:
        last = segment.offset + segment.length - 1
        digest.update((segment.etag if segment.whole else f"{segment.etag}:{segment.offset}-{last};").encode())
    return digest.hexdigest()


def body_of(segments: Iterable[Segment]) -> bytes:
    """Returns the manifest to send."""
    rows = []
    for segment in segments:
        if segment.where is None:
            raise BackendError("a segment without an object cannot be sent")
        row: dict[str, Any] = {"path": segment.where.path, "etag": segment.etag, "size_bytes": segment.size}
        if not segment.whole:
            row["range"] = f"{segment.offset}-{segment.offset + segment.length - 1}"
        rows.append(row)
    return json.dumps(rows, separators=(",", ":")).encode()
