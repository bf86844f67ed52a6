"""The result of a reader: one image, its table of the guest's address space, and its properties."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.errors import PluginError, printable
from vmconv.model.facts import DiskFacts
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.interface.format import FormatKind
    from vmconv.model.bitmaps import DirtyBitmap
    from vmconv.model.disk import Disk
    from vmconv.model.extents import Extents
    from vmconv.model.references import Dependency


class RangesCrc(NamedTuple):
    """The CRC-32 that an image stores of ranges of its disk, `(start, length)` in bytes, in order; None for no CRC."""

    name: str
    crc: int | None
    ranges: Sequence[tuple[int, int]]


class Image:
    """One layer of a disk: `size` bytes for the guest, stored in `file`, on top of an optional parent.

    Of `kind` "memory" it is the memory of a machine: addresses are physical ones, `size` is the end of the RAM, and a
    HOLE is an address without RAM. `state` returns machine state beside the memory by name, such as "ELF notes", for
    writers that can store it.

    Expensive work is lazy: `load_guest` reads the allocation tables, `load_parent` opens the next layer, `load_places`
    is for formats that reserve space, see `places`. `facts` are what the image states of the disk, except size and
    parent. `losses` are phrases on content that no conversion carries over, `warnings` on the health of the image.
    `details` are format-specific facts for `info`. `dependencies` are other files of this layer with their expected
    properties. `shows_holes` tells whether maps show holes of a file as zeros, as `qemu-img map` does for payload that
    lies in a file as the guest sees it. Without it, they do for a file with so many holes that payload must have some.
    `bitmaps` are the persistent bitmaps that a writer carries over; none unless they are asked for.
    `digests` are hashes of the disk that the image stores, in hexadecimal, by their names in hashlib. `crcs` are of
    parts of it.
    """

    def __init__(
        self,
        format_name: str,
        file: File,
        size: int,
        load_guest: Callable[[], Extents],
        *,
        load_places: Callable[[], Extents] | None = None,
        load_parent: Callable[[], Image] | None = None,
        parent_reference: str | None = None,
        parent_format: str | None = None,
        facts: DiskFacts | None = None,
        losses: tuple[str, ...] = (),
        warnings: tuple[str, ...] = (),
        details: Callable[[], Mapping[str, Any]] = dict,
        dependencies: tuple[Dependency, ...] = (),
        shows_holes: Callable[[File], bool] | None = None,
        digests: Mapping[str, str] = MappingProxyType({}),
        crcs: tuple[RangesCrc, ...] = (),
        kind: FormatKind = "disk",
        state: Callable[[], Mapping[str, bytes]] = dict,
        bitmaps: tuple[DirtyBitmap, ...] = (),
    ) -> None:
        self.format_name = format_name
        self.bitmaps = bitmaps
        self.file = file
        self.size = size
        self.kind = kind
        self.facts = DiskFacts() if facts is None else facts
        self.losses = losses
        self.warnings = warnings
        self.dependencies = dependencies
        self.shows_holes = shows_holes
        self.digests = digests
        self.crcs = crcs
        self.parent_reference = parent_reference
        self.parent_format = parent_format
        self._load_guest = load_guest
        self._load_places = load_places
        self._load_parent = load_parent
        self._details = details
        self._state = state

    @cached_property
    def guest(self) -> Extents:
        """The table of this layer alone, `size` bytes; HOLE where it is not allocated."""
        table = self._load_guest()
        size = getattr(table, "size", None)
        if size != self.size:
            raise PluginError(
                f"its reader returns a table of {size} bytes for a disk of {self.size}", format_name=self.format_name
            )
        return table

    @cached_property
    def stored(self) -> Extents:
        """The table of this layer alone; payload in a hole of its file is ZERO, and each HOLE stays."""
        return _through_storage(self.guest)

    @cached_property
    def places(self) -> Extents:
        """The table of this layer for maps, with windows onto `Reserved` for space that is reserved and not used."""
        return self._load_places() if self._load_places else self.guest

    @cached_property
    def parent(self) -> Image | None:
        """The parent layer, opened by the `Opener` of this image."""
        return self._load_parent() if self._load_parent else None

    @cached_property
    def flat(self) -> Extents:
        """The disk as the guest sees it: all layers merged, without a HOLE.

        Payload in a hole of its file is ZERO: there are no blocks to share or copy.
        """
        table = self.guest
        for layer in self.chain():
            if layer is not self:
                table = table.over(layer.guest)
        return _through_storage(table.without_holes())

    def payload_files(self) -> list[File]:
        """Returns the files with payload of any layer."""
        found = {id(source): source for layer in self.chain() for source in layer.guest.sources}
        return [source for source in found.values() if isinstance(source, File)]

    def onto(self, base: Image, parent: Image | None = None) -> Image:
        """Returns the layers above `base` merged into one layer on top of `parent` (by default `base`).

        As in `flat`, payload in a hole of its file is ZERO. If `base` is this image, the layer is all HOLE.
        """

        def load_guest() -> Extents:
            if base is self:
                # An empty window past the end is filled with HOLE.
                return self.guest.window(self.size, self.size)
            table = self.guest
            for layer in self.chain():
                if layer is base:
                    break
                if layer is not self:
                    table = table.over(layer.guest)
            return _through_storage(table)

        return Image(
            self.format_name,
            self.file,
            self.size,
            load_guest,
            load_parent=lambda: parent or base,
            facts=self.facts,
            details=lambda: self.details,
            kind=self.kind,
            state=self._state,
            bitmaps=self.bitmaps,
        )

    def carrying(self, bitmaps: tuple[DirtyBitmap, ...], losses: tuple[str, ...]) -> Image:
        """Returns this layer with bitmaps to carry over, and with these losses."""
        other = self._changed(lambda table: table)
        other.bitmaps, other.losses = bitmaps, losses
        return other

    def holding(self, table: Extents) -> Image:
        """Returns the whole disk as one layer with this table: `flat`, with payload elsewhere."""
        other = self._changed(lambda _: table)
        other._load_parent = other.parent_reference = other.parent_format = other._load_places = None
        other.dependencies = ()
        other.__dict__.pop("parent", None)
        return other

    def stating(self, **facts: Any) -> Image:
        """Returns this layer with other facts."""
        if not facts:
            return self
        other = self._changed(lambda table: table)
        other.facts = self.facts._replace(**facts)
        return other

    def sized(self, size: int) -> Image:
        """Returns this layer cut off at `size` bytes, or longer: the rest is zero, whatever the layers below have."""
        from vmconv.model.extents import Kind

        # A parent may be longer than this layer. It is not opened to know that: in place, it must not be open.
        beyond = Kind.HOLE if self.parent_reference is None else Kind.ZERO
        other = self._changed(lambda table: table.window(0, size, beyond))
        other.size = size
        other._load_places = None
        return other

    def merged(self, change: Callable[[Extents], Extents]) -> Image:
        """Returns all layers as one without a parent; its table is that of the disk, changed when it is loaded."""
        other = self._changed(lambda _: change(self.flat))
        other._load_parent, other.parent_reference, other.parent_format = None, None, None
        other._load_places = None
        other.__dict__.pop("parent", None)
        return other

    def part(self, offset: int, length: int) -> Image:
        """Returns bytes `[offset, offset + length)` of the disk as a disk of its own, each layer cut to them.

        What an image states of a whole disk does not apply to a part of it.
        """
        other = self._changed(lambda table: table.window(offset, other.size))
        # A shorter layer hides what lies below its end, in a part, too.
        other.size = max(0, min(length, self.size - offset))
        other.facts, other.digests, other.crcs, other._load_places = DiskFacts(), MappingProxyType({}), (), None
        if self._load_parent:
            load = self._load_parent
            other._load_parent = lambda: (self.parent or load()).part(offset, length)
            other.__dict__.pop("parent", None)
        return other

    def _changed(self, change: Callable[[Extents], Extents]) -> Image:
        """Returns a copy of this layer whose table is changed when it is loaded."""
        other = copy(self)

        def load_guest() -> Extents:
            table = self.guest
            # Loading the table may add warnings to the image that its reader knows.
            other.warnings = tuple(dict.fromkeys((*other.warnings, *self.warnings)))
            return change(table)

        other._load_guest = load_guest
        # Loaded before, from what is changed.
        for name in ("disk", "guest", "stored", "places", "flat"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def disk(self) -> Disk:
        """The format-independent description of the disk, validated by pydantic."""
        from vmconv.model.disk import MAX_REFERENCE, Disk, Parent

        parent = None
        if self.parent_reference is not None:
            # File names may not be valid text, and escapes make them longer than the schema allows.
            reference, kind = printable(self.parent_reference)[:MAX_REFERENCE], self.parent_format
            parent = Parent(reference=reference, format=None if kind is None else printable(kind))
        return Disk.of(self.size, self.facts, parent)

    @cached_property
    def state(self) -> Mapping[str, bytes]:
        """Machine state beside the memory, by name."""
        return self._state()

    @property
    def details(self) -> Mapping[str, Any]:
        return self._details()

    def chain(self) -> Iterator[Image]:
        """Yields this image and each layer below it, opened lazily."""
        layer: Image | None = self
        while layer is not None:
            yield layer
            layer = layer.parent


def _through_storage(table: Extents) -> Extents:
    """Returns the table with ZERO for windows onto holes of their file."""
    from vmconv.model.extents import Kind, on_storage

    for source in table.sources:
        # In a file without holes each window stays as it is.
        if isinstance(source, File) and ((stored := on_storage(source)).kind != Kind.DATA).any():
            table = table.through(source, stored)
    return table
