"""What a reader returns: one image, its table of the guest's address space, and what is known of the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vmconv.errors import PluginError, printable
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.model.disk import Disk
    from vmconv.model.extents import Extents
    from vmconv.model.references import Dependency


class Image:
    """One layer of a disk: `size` bytes for the guest, held in `file`, on top of `parent` when there is one.

    What costs time is done when it is asked for: `load_guest` reads the allocation tables, `load_parent` opens the
    next layer, `load_places` is for formats that set space aside, see `places`. `metadata` are the fields of `Disk`
    that the image states, besides size and parent: as values that `Disk` accepts (a geometry is a dictionary of its
    fields), because readers do not import pydantic. `losses` say in words what the image holds that no conversion
    carries over; `warnings` what its user should know about its health. `details` are the format's own facts, for
    people and for `info`. `shows_holes` says of a file whether maps show its holes as zeros, as `qemu-img map` does for
    payload that lies in a file just as the guest sees it; without it, where so much of the file is holes that payload
    must be too. `dependencies` are other files that this layer is made of, where the image says what they
    have to be.
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
        metadata: Mapping[str, Any] | None = None,
        losses: tuple[str, ...] = (),
        warnings: tuple[str, ...] = (),
        details: Callable[[], Mapping[str, Any]] = dict,
        dependencies: tuple[Dependency, ...] = (),
        shows_holes: Callable[[File], bool] | None = None,
    ) -> None:
        self.format_name = format_name
        self.file = file
        self.size = size
        self.metadata = dict(metadata or {})
        self.losses = losses
        self.warnings = warnings
        self.dependencies = dependencies
        self.shows_holes = shows_holes
        self.parent_reference = parent_reference
        self.parent_format = parent_format
        self._load_guest = load_guest
        self._load_places = load_places
        self._load_parent = load_parent
        self._details = details

    @cached_property
    def guest(self) -> Extents:
        """The table of this layer alone: a HOLE is where it says nothing. Exactly `size` bytes."""
        table = self._load_guest()
        size = getattr(table, "size", None)
        if size != self.size:
            raise PluginError(
                f"its reader returns a table of {size} bytes for a disk of {self.size}", format_name=self.format_name
            )
        return table

    @cached_property
    def places(self) -> Extents:
        """The table of this layer for maps: windows onto `Reserved` are where space is set aside and not used."""
        return self._load_places() if self._load_places else self.guest

    @cached_property
    def parent(self) -> Image | None:
        """The next layer, opened under the rules of the `Opener` that this image was read with."""
        return self._load_parent() if self._load_parent else None

    @cached_property
    def flat(self) -> Extents:
        """The disk as the guest sees it: all layers in one table, without a HOLE.

        What lies in a hole of its file on storage is ZERO: there is nothing there that could be shared or copied.
        """
        table = self.guest
        for layer in self.chain():
            if layer is not self:
                table = table.over(layer.guest)
        return _through_storage(table.without_holes())

    def payload_files(self) -> list[File]:
        """Returns the files that payload of any layer lies in."""
        found = {id(source): source for layer in self.chain() for source in layer.guest.sources}
        return [source for source in found.values() if isinstance(source, File)]

    def onto(self, base: Image, parent: Image | None = None) -> Image:
        """Returns this disk, down to the layer `base` of its chain, as one layer on top of `parent` (None: of `base`).

        As in `flat`, what lies in a hole of its file is ZERO. On top of itself, it says nothing.
        """

        def load_guest() -> Extents:
            if base is self:
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
            metadata=self.metadata,
            details=lambda: self.details,
        )

    @cached_property
    def disk(self) -> Disk:
        """The neutral description of the disk, validated."""
        from vmconv.model.disk import MAX_REFERENCE, Disk, Parent

        parent = None
        if self.parent_reference is not None:
            # A file name need not be text, the schema's strings are.
            # With escapes it may be longer than any name.
            reference, kind = printable(self.parent_reference)[:MAX_REFERENCE], self.parent_format
            parent = Parent(reference=reference, format=None if kind is None else printable(kind))
        return Disk(size=self.size, parent=parent, **self.metadata)

    @property
    def details(self) -> Mapping[str, Any]:
        return self._details()

    def chain(self) -> Iterator[Image]:
        """Yields this image and every layer below it, opening them one by one."""
        layer: Image | None = self
        while layer is not None:
            yield layer
            layer = layer.parent


def _through_storage(table: Extents) -> Extents:
    """Returns the table with ZERO where a window lies in a hole of its file."""
    from vmconv.model.extents import on_storage

    for source in table.sources:
        if isinstance(source, File):
            table = table.through(source, on_storage(source))
    return table
