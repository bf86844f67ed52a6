"""Datastores that are containers of objects: found by URL, owned by a note in the store, and listed.

The plugin of the URL's scheme makes the requests. An object is a disk by itself: what names other objects is refused,
because a guest may have written the name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any

from vmconv.plugin import AccessError, UsageError, VmconvError, parse_url, printable
from vmconv_fleet.catalogue.images import facts_of, problem_of, short
from vmconv_fleet.catalogue.places import disk_id
from vmconv_fleet.catalogue.sharing import Note, is_about, parsed
from vmconv_fleet.replication.clock import wall_ms

if TYPE_CHECKING:
    from vmconv.plugin import ObjectContainer, Registry, StoredObject
    from vmconv_fleet.catalogue.ownership import Ownership

MAX_OBJECTS = 100_000
MAX_IMAGES = 10_000
MAX_DEPTH = 8
MAX_REQUESTS = 20_000
"""Requests of a scan, but for those of the last image."""

_MAX_VERSION = 255
_LISTED = 1000
"""Objects after which a scan says that it goes on."""

Body = dict[str, Any]
Record = tuple[str, str, Body]


def container_at(path: str) -> ObjectContainer:
    """Returns the container of a datastore. Raises `UsageError` if no plugin for its scheme is installed."""
    from vmconv.plugin import installed

    url = parse_url(path)
    return installed().scheme(url.scheme).container(url)


class ContainerNote(Note):
    """The note of a container."""

    def __init__(self, container: ObjectContainer) -> None:
        self._container = container
        self.place = {"network": True, "container": container.identity}

    def read(self) -> bytes | None:
        """Raises `AccessError` for a note about another container.

        It is a copy, or the store has two addresses: then two nodes would own it.
        """
        data = self._container.note()
        found = parsed(data or b"")
        if found and not is_about(found, self.place):
            about = printable(str(found.place.get("container")))[:300]
            raise AccessError(
                f"{self._container.shown}: is {self.place['container']} here, and the note with its owner is about "
                f"{about}: name the same address of the store on all nodes, or delete the note if it was copied"
            )
        return data

    def write(self, data: bytes, *, replace: bool) -> None:
        self._container.write_note(data, replace=replace)


def refuse_unless_owned(container: ObjectContainer, nodes: Sequence[str]) -> None:
    """Raises `AccessError` if a container belongs to none of the nodes."""
    found = parsed(ContainerNote(container).read() or b"")
    if found and found.owner not in nodes:
        raise AccessError(f"{container.shown}: this storage belongs to node {found.owner}", hint="ask that node")


class ContainerScan:
    """Lists containers.

    `known` are the disks of the last scan by datastore and name: unchanged ones that could be read are not read again.
    `reading` limits the time of reading one object, given the datastore and the object's name. `alive` is called now
    and then while a datastore is listed, given its name.
    """

    def __init__(
        self,
        registry: Registry,
        ownership: Ownership,
        known: Mapping[str, Mapping[str, Body]],
        reading: Callable[[str, str], AbstractContextManager[None]],
        alive: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._ownership = ownership
        self._known = known
        self._reading = reading
        self._alive = alive

    def records(self, datastore: str, path: str) -> Iterator[Record]:
        """Yields the records of a datastore, its own last; without a size if the container cannot be listed."""
        own: Body = {"path": path, "filesystem": path.partition(":")[0], "scanned_ms": wall_ms()}
        try:
            self._alive(datastore)
            container = container_at(path)
            own |= self._ownership.of_container(datastore, ContainerNote(container))
            if own.get("owner", self._ownership.node) == self._ownership.node:
                own |= yield from self._contents(datastore, container)
        except VmconvError as exc:
            own["problem"] = short(str(exc))
        except Exception as exc:
            own["problem"] = short(f"cannot be listed: {type(exc).__name__}: {exc}")
        else:
            # Of a store nobody knows how much fits in.
            own |= {"size": 0, "free": 0, "backends": {own["filesystem"]: {"usable": True, "unit": 1}}}
        yield "datastore", datastore, own

    def _contents(self, datastore: str, container: ObjectContainer) -> Generator[Record, None, Body]:
        remarks: list[str] = []
        found = list(islice(self._disks(datastore, container, remarks), MAX_IMAGES + 1))
        if len(found) > MAX_IMAGES:
            remarks.append(f"more than {MAX_IMAGES} images: the rest is not listed")
        disks = found[:MAX_IMAGES]
        last = container.requests + MAX_REQUESTS
        # What could not be read before is tried once the others are read, so that it delays none of them.
        for one in sorted(disks, key=lambda one: "problem" in self._known_of(datastore, one)):
            yield "disk", disk_id(datastore, one.name), self._disk(datastore, container, one, last)
        return {"disks": len(disks)} | ({"problem": problem_of(remarks)} if remarks else {})

    def _disks(self, datastore: str, container: ObjectContainer, remarks: list[str]) -> Iterator[StoredObject]:
        """Yields the objects that may be images, as files of the same names would be."""
        objects = container.objects()
        for number, one in enumerate(islice(objects, MAX_OBJECTS)):
            if number % _LISTED == 0:
                self._alive(datastore)
            *directories, own = one.name.split("/")
            if self._registry.format_by_suffix(own, "disk") is None or len(directories) > MAX_DEPTH:
                continue
            if any(part.startswith(".") and part not in (".", "..") for part in (*directories, own)):
                continue
            try:
                container.url(one.name)
            except UsageError as exc:
                remarks.append(str(exc))
                continue
            yield one
        if any(True for _ in objects):
            remarks.append(f"more than {MAX_OBJECTS} objects: the rest is ignored")

    def _known_of(self, datastore: str, one: StoredObject) -> Body:
        """Returns the record of an object that has not changed; empty if it has, or is new."""
        known = self._known.get(datastore, {}).get(one.name, {})
        same = (known.get("version"), known.get("actual_size")) == (one.version, one.size)
        return known if same else {}

    def _disk(self, datastore: str, container: ObjectContainer, one: StoredObject, last: int) -> Body:
        """Returns the record of a disk, which is read unless the store has got the request `last`."""
        listed: Body = {
            "datastore": datastore,
            "name": one.name,
            "actual_size": one.size,
            "changed_ms": max(0, int(one.changed * 1000)),
        }
        known = self._known_of(datastore, one)
        if known and "problem" not in known:
            return known | listed
        if container.requests >= last:
            if known:
                return known | listed
            said = f"not read yet: a scan makes {MAX_REQUESTS} requests, and the next one continues"
            return listed | {"problem": said}
        try:
            with self._reading(datastore, one.name):
                return listed | self._image(container.url(one.name), one.version)
        except VmconvError as exc:
            problem = str(exc)
        except (Exception, RecursionError) as exc:
            problem = f"cannot be read: {type(exc).__name__}: {exc}"
        return listed | {"problem": short(problem), "version": one.version[:_MAX_VERSION]}

    def _image(self, url: str, version: str) -> Body:
        from vmconv.plugin import Opener, RemoteFile

        with Opener(self._registry, force_share=True, remote=True) as opener:
            image = opener.image(url)
            named = [one.name for one in image.dependencies]
            if other := next(filter(None, [image.parent_reference, *named]), None):
                raise AccessError(f"{image.file.name}: names {other!r}, and a disk in a container is one object")
            body = facts_of(image, image.warnings)
            # The listing of a store may be older, or newer, than what it serves: that is read again.
            if isinstance(image.file, RemoteFile) and image.file.remote.version == version:
                body["version"] = version
            return body
