"""The request of a conversion, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from vmconv.errors import UsageError
from vmconv.inplace.settling import settle
from vmconv.interface.arguments import Cache, FilePath, FilePaths, Mode, WriterOptions, ZeroCopy
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.model.plan import CopyReason, Totals


class Request(NamedTuple):
    """What to convert and how; the fields are named as the command line's options.

    `source_format` and `target_format` override the suffixes of the names. `source_backing_format` is the format of
    the source's backing files if the image above does not state it. `chain` makes one image per layer, beside the
    target. `backing_file` keeps the chain from this layer downwards as the target's backing file; the path is stored
    as given, with `backing_format`.

    `zero_copy="require"` refuses to copy any payload. `cache="unsafe"` does not sync the target, like `qemu-img
    convert`. `mode` is the permission bits of new files. Without it a new file is readable only to users with access to
    all source files, and a file replaced by `force` keeps its owner, mode and attributes.

    `in_place` turns the source's own file into the target. `keep_undo` writes an undo file. `any_owner` allows changes
    of files whose owner differs from the source's.

    `from_snapshot` reads the source as it was in a snapshot of its filesystem, see `located`.

    `facts` replace what the source states of the disk, where a machine's configuration states it instead.

    `descriptor` is an open descriptor that gets the image as a stream; then `target` is only its name in messages.
    """

    source: FilePath
    target: FilePath
    source_format: str | None = None
    target_format: str | None = None
    options: WriterOptions = MappingProxyType({})
    snapshot: str | None = None
    chain: bool = False
    backing_file: FilePath | None = None
    backing_format: str | None = None
    backend: str = "auto"
    zero_copy: ZeroCopy = "auto"
    cache: Cache = "writeback"
    force: bool = False
    in_place: bool = False
    keep_undo: bool = False
    any_owner: bool = False
    force_share: bool = False
    allow_external: FilePaths = ()
    source_backing_format: str | None = None
    mode: Mode | None = None
    from_snapshot: str | None = None
    facts: Mapping[str, str | None] = MappingProxyType({})
    descriptor: int | None = None

    def located(self) -> Request:
        """Returns the request with the path of the source in the snapshot that it is read from."""
        if self.from_snapshot is None:
            return self
        if self.in_place:
            raise UsageError("--in-place: a snapshot is never changed", hint="omit --from-snapshot or --in-place")
        from vmconv.io.snapshots import in_snapshot

        return self._replace(source=in_snapshot(self.source, self.from_snapshot).path, from_snapshot=None)

    def opener(self, registry: Registry) -> Opener:
        """Returns the opener of the source."""
        return Opener(
            registry,
            allow_external=self.allow_external,
            force_share=self.force_share,
            backing_format=self.source_backing_format,
            settle=settle,
        )


class Result(NamedTuple):
    """The outcome: bytes by kind, the reason for each copied byte, losses, and seconds.

    `layers` are the files of new images below the target, the base last.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    backend: str
    totals: Totals
    copies: tuple[CopyReason, ...]
    losses: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    layers: tuple[str, ...] = ()
