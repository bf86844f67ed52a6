"""Which publication refers to which objects of vmconv's own container, and what none refers to.

Swift counts no references. So each publication has a record, written before anything that it makes, and again before
its object appears. A record counts while it is young, or while its object exists with the stated ETag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.plugin import AccessError, BackendError, ImageError, in_order
from vmconv_swift.names import ObjectName, own_container

if TYPE_CHECKING:
    from vmconv_swift.client import Client

GRACE = 24 * 3600
"""Seconds for which nothing is removed that is new, so that publications under way keep what they have made."""
MARK = "X-Container-Meta-Vmconv"
"""The property of a container that vmconv has made."""
PREFIX = "records/"
NOTES = "notes/"
"""The beginning of names of objects that no publication makes, and that stay."""
_MADE = re.compile(r"(payload|metadata|encoded|manifests)/[0-9a-f]{64}|zeros/[0-9]{1,9}|candidates/[0-9a-f-]{1,80}")
"""Names that publications give to what they make, besides records. Nothing else is removed."""
_MAX_RECORD = 256 << 20
_VERSION = 1


class Record(NamedTuple):
    """A publication: the object `target` with its ETag (None while it is being made), and the names of what it uses."""

    target: str
    etag: str | None
    uses: tuple[str, ...]

    def body(self) -> bytes:
        return json.dumps({"vmconv": _VERSION, **self._asdict()}, separators=(",", ":")).encode()


def is_payload(name: str) -> bool:
    """Returns whether an object of this name stays as it is while a record names it."""
    return bool(_MADE.fullmatch(name)) and not name.startswith("candidates/")


def record_name(own: str, target: ObjectName, publication: str) -> ObjectName:
    """Returns the name of the record of a publication."""
    return ObjectName(own, f"{_of_target(target)}{publication}")


def _of_target(target: ObjectName) -> str:
    return f"{PREFIX}{sha256(target.path.encode()).hexdigest()[:32]}/"


def refuse_stranger(client: Client, own: str) -> bool:
    """Returns whether vmconv's container exists. Raises `AccessError` if something else has made it."""
    headers = client.container(own)
    if headers is None:
        return False
    if headers.get(MARK) != str(_VERSION):
        raise AccessError(
            f"swift://{client.cloud.name}/{own}: exists, and vmconv has not made it",
            hint="nothing in it is used or removed; publish into another container",
        )
    return True


def make_own(client: Client, container: str) -> None:
    """Makes vmconv's container for one of the user's."""
    own, headers = own_container(container), client.container(container)
    # Who may read an object has to be allowed to read its segments.
    readers = headers.get("X-Container-Read") if headers else None
    client.make_container(own, {MARK: str(_VERSION)} | ({"X-Container-Read": readers} if readers else {}))
    if not refuse_stranger(client, own):
        raise BackendError(f"swift://{client.cloud.name}/{own}: was made, and is not there")


def _read(client: Client, own: str, name: str) -> Record:
    where = ObjectName(own, name)
    body = client.read(where, _MAX_RECORD, newest=True)
    try:
        values: Any = json.loads(body)
        version, target, etag, uses = (values[key] for key in ("vmconv", "target", "etag", "uses"))
        known = isinstance(target, str) and isinstance(uses, list) and all(isinstance(each, str) for each in uses)
        if version != _VERSION or not known or not isinstance(etag, str | None):
            raise ValueError(f"version {str(version)[:20]}")
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        # What a record that cannot be read refers to is unknown, so nothing may be removed.
        raise ImageError(f"{client.shown(where)}: is not a record of a publication: {str(exc)[:100]}") from exc
    return Record(target, etag, tuple(uses))


def records_of(client: Client, target: ObjectName) -> list[tuple[ObjectName, Record]]:
    """Returns the records of the object that is published as `target`."""
    own = own_container(target.container)
    names = [entry.name for entry in client.listing(own, _of_target(target))]
    return [(ObjectName(own, name), _read(client, own, name)) for name in names]


class Unused(NamedTuple):
    """An object that no publication uses."""

    where: ObjectName
    size: int


def unused(client: Client, container: str, grace: float) -> Iterator[Unused]:
    """Yields the objects of vmconv's own container that no publication of `container` uses, oldest records last.

    Younger ones than `grace` seconds are left out. Objects that only an unused record names come before the record, so
    that an interrupted removal loses no knowledge.
    """
    own = own_container(container)
    # Listed before the records are read: an object that a later record names is missing here, or is touched.
    entries = [entry for entry in client.listing(own) if _MADE.fullmatch(entry.name)]
    before = client.now() - grace
    used: set[str] = set()
    dead: list[Unused] = []
    names = client.listing(own, PREFIX)
    for name, size, record, counts in in_order(lambda entry: _looked_at(client, own, entry, before), names):
        if counts:
            used.update(record.uses)
        else:
            dead.append(Unused(ObjectName(own, name), size))
    for entry in entries:
        if entry.name not in used and entry.modified < before:
            yield Unused(ObjectName(own, entry.name), entry.size)
    yield from dead


def _looked_at(client: Client, own: str, entry: Any, before: float) -> tuple[str, int, Record, bool]:
    record = _read(client, own, entry.name)
    counts = entry.modified >= before
    if not counts and record.etag is not None:
        container, _, name = record.target.removeprefix("/").partition("/")
        target = ObjectName(container, name)
        found = client.head(target, newest=True)
        # While devices are away or data moves, the store may not find an object that it has.
        counts = (found is not None and found.etag == record.etag) or _is_listed(client, target, record.etag)
    return entry.name, entry.size, record, counts


def _is_listed(client: Client, where: ObjectName, etag: str) -> bool:
    """Returns whether the container's listing has an object with this ETag."""
    if client.container(where.container) is None:
        return False
    # A name sorts before all others that begin with it.
    first = next(client.listing(where.container, where.name), None)
    return first is not None and (first.name, first.etag) == (where.name, etag)


def remove(client: Client, one: Unused, grace: float) -> bool:
    """Removes an unused object unless somebody has touched it meanwhile; returns whether it did."""
    found = client.head(one.where, newest=True)
    if found is None or found.modified >= found.now - grace:
        return False
    return client.delete(one.where)
