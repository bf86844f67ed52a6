"""The evidence for what changed since the last sync: its record, layers, another disk, or a bitmap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmconv.errors import AccessError, PlanError
from vmconv.syncing import changes as changing
from vmconv.syncing import record as records

if TYPE_CHECKING:
    from vmconv.conversion.request import Request
    from vmconv.io.registry import Registry
    from vmconv.model.extents import Column
    from vmconv.model.image import Image
    from vmconv.syncing.changes import Changes
    from vmconv.syncing.old import Old
    from vmconv.syncing.request import SyncRequest

UNCHANGED = "the record of the last sync: the source is unchanged"


class Evidence:
    """What is known of a source and its target without reading payload.

    `record` is that of the last sync, if the target is as it was then. `state` and `identity` are the source's digests.
    """

    def __init__(self, request: SyncRequest, asked: Request, image: Image, old: Old, registry: Registry) -> None:
        self.request = request
        self.asked = asked
        self.image = image
        self.old = old
        self.registry = registry
        self.record = records.last(old.image.file, old.files, request)
        # The target may have changed since, although its size and mtime are those of then.
        self.touched = self.record is not None and not self.record.fits(file.descriptor for file in old.files)
        self.state = records.state_of_source(image, request.snapshot)
        self.identity = records.identity_of_source(image, request.snapshot)
        # Also if nothing has changed: a bitmap that cannot be used is no evidence for the next sync either.
        self.written = None if request.bitmap is None else self._written(request.bitmap)

    @property
    def is_recorded(self) -> bool:
        """True if the record of the last sync is that of this one, too."""
        known = self.record and (self.record.source, self.record.identity) == (self.state, self.identity)
        return bool(known) and not self.touched

    @property
    def is_same_disk(self) -> bool:
        """True if the target was last synced with this file, whatever was written to it since."""
        return self.record is not None and self.record.identity == self.identity

    def learned(self) -> Changes | None:
        """Returns the changes since the last sync without reading payload; None if nothing tells them."""
        record = self.record
        if self.request.compare or self.touched:
            return None
        if record and self.state == record.source:
            return changing.nothing(UNCHANGED)
        if self.request.since is not None:
            return self._since(self.request.since)
        if self.request.bitmap is not None and self.written is not None:
            return self._marked(self.request.bitmap, self.written)
        layers = list(self.image.chain())
        for number, layer in enumerate(layers[1:] if record else (), 1):
            if record and records.state_of_source(layer, None) == record.source:
                above = ", ".join(one.file.name for one in layers[:number])
                return changing.by_layers(self.image, layer, f"layers made since the last sync: {above}")
        return None

    def _since(self, path: str) -> Changes:
        """Returns the ranges with other physical blocks than the disk of the last sync."""
        if self.record is None:
            raise PlanError(
                f"{self.request.target}: {self._unrecorded()}, so {path} is no evidence",
                hint="omit --since: vmconv reads both disks once, and later syncs have a record",
            )
        with self.asked.opener(self.registry) as opener:
            base = opener.image(path, self.request.source_format)
            if records.state_of_source(base, None) != self.record.source:
                raise AccessError(
                    f"{path}: is not the disk that {self.request.target} was last synced with, or was modified since",
                    hint="omit --since: vmconv reads both disks if nothing else tells what changed",
                )
            found = changing.by_address(
                self.image.flat, base.flat, f"physical addresses: {path} has the disk of the last sync"
            )
            if any(file.changed() for file in opener.files):
                raise AccessError(f"{path}: changed while it was being compared")
        return found

    def _written(self, bitmap: str) -> tuple[Column, Column]:
        return self.registry.format(self.image.format_name).dirty_ranges(self.image, bitmap)

    def _marked(self, bitmap: str, written: tuple[Column, Column]) -> Changes:
        """Returns the ranges that a bitmap of the source has as written since the last sync."""
        hint = "omit --bitmap: vmconv reads both disks if nothing else tells what changed"
        if self.record is None:
            raise PlanError(f"{self.request.target}: {self._unrecorded()}, so no bitmap counts from it", hint=hint)
        name = self.image.file.name
        if self.identity != self.record.identity:
            raise AccessError(
                f"{name}: is not the file that {self.request.target} was last synced with, or has other layers below",
                hint=hint,
            )
        evidence = f"bitmap {bitmap!r} of {name}, believed to have all writes since the last sync"
        return changing.by_bitmap(self.image.flat, self.old.image.flat, written, evidence)

    def _unrecorded(self) -> str:
        has_one = records.read(self.old.image.file)
        return "was modified since its last sync" if has_one else "has no record of a sync"

    @property
    def reason(self) -> str:
        """Why both disks are read."""
        if self.request.compare:
            return "both disks were read"
        told = "the target's ctime is not that of its last sync" if self.touched else "nothing told what changed"
        return f"both disks were read: {told}"
