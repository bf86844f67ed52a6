"""The request of a sync, its plan and its result."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from vmconv.conversion.request import Request
from vmconv.errors import AccessError
from vmconv.interface.arguments import Cache, FilePath, FilePaths, WriterOptions, ZeroCopy
from vmconv.interface.scheme import STANDARD_INPUT, is_url, without_secrets
from vmconv.model.plan import CopyReason, Plan, Totals

NEW = "the target is new"
"""The evidence of a first sync."""


class SyncRequest(NamedTuple):
    """What to bring up to date; the fields are named as the command line's options.

    `target_format` and `options` are those of a new target; an existing one has its own, and others are refused.

    `since` is the disk that the target was last synced with, unchanged. `bitmap` names a bitmap in the source that has
    all writes since then. `compare` reads both disks to find what
    changed, whatever the record of the last sync says. `shrink` allows a smaller disk. `record` writes a record of this
    sync into the target's attributes. `force` allows a target that was modified, that has nothing in common with the
    source, or that loses snapshots and the like. `parents` are for layers of the source whose parent is not where they
    say; None for a command that takes none.
    """

    source: FilePath
    target: FilePath
    source_format: str | None = None
    target_format: str | None = None
    options: WriterOptions = MappingProxyType({})
    snapshot: str | None = None
    since: FilePath | None = None
    bitmap: str | None = None
    compare: bool = False
    shrink: bool = False
    record: bool = True
    force: bool = False
    zero_copy: ZeroCopy = "auto"
    cache: Cache = "writeback"
    force_share: bool = False
    allow_external: FilePaths = ()
    source_backing_format: str | None = None
    parents: FilePaths | None = ()

    def conversion(self, target_format: str | None, *, force: bool) -> Request:
        """Returns the request of a conversion from the same source to the same target."""
        if is_url(self.source) or self.source == STANDARD_INPUT:
            source = "standard input" if self.source == STANDARD_INPUT else without_secrets(self.source)
            raise AccessError(f"{source}: a sync reads local files only")
        return Request(
            self.source,
            self.target,
            self.source_format,
            target_format,
            self.options,
            self.snapshot,
            zero_copy=self.zero_copy,
            cache=self.cache,
            force=force,
            force_share=self.force_share,
            allow_external=self.allow_external,
            source_backing_format=self.source_backing_format,
            parents=self.parents or (),
        )


class SyncPlan(NamedTuple):
    """What a sync does: `changed` bytes of the disk in `ranges` ranges are not known to be equal, on this `evidence`.

    `compared` bytes of payload were read to find them. `plan` is None if the target is up to date.
    """

    evidence: str
    changed: int
    ranges: int
    compared: int
    plan: Plan | None


class SyncResult(NamedTuple):
    """The outcome: what changed, on what evidence, and the bytes of the target by kind, as for a conversion.

    `backend` is "none" if the target was up to date, and nothing was written.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    backend: str
    evidence: str
    changed: int
    ranges: int
    compared: int
    totals: Totals
    copies: tuple[CopyReason, ...]
    losses: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
