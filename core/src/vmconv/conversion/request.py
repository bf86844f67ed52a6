"""What is asked of a conversion, and what is returned of it."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from vmconv.inplace.settling import settle
from vmconv.interface.arguments import Cache, FilePath, FilePaths, Mode, WriterOptions, ZeroCopy
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.model.plan import CopyReason, Totals


class Request(NamedTuple):
    """What to convert and how; the names are those of the command line's options.

    `source_format` and `target_format` override what the file names speak of. `source_backing_format` is the format of
    the source's backing files where the image above them does not state it. `chain` makes an image of each layer of
    the source, beside the target. `backing_file` keeps the chain as it is from a layer on: it is the layer that what is
    made will have as its parent, as it is to be written into the target, with `backing_format`.
    `zero_copy="require"` refuses to copy a single byte of payload. `cache="unsafe"` does not wait until the target is
    on storage, as `qemu-img convert` does not. `mode` has the permission bits of what is made; without it nobody may
    open a new file who may not open each file of the source, and one that `force` replaces keeps its owner, mode and
    attributes. `in_place` turns the source's own file into the target; `keep_undo` keeps what it takes to turn it back;
    `any_owner` lets it change files that are not the source's owner's.
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

    def opener(self, registry: Registry) -> Opener:
        """Returns what the source is opened with."""
        return Opener(
            registry,
            allow_external=self.allow_external,
            force_share=self.force_share,
            backing_format=self.source_backing_format,
            settle=settle,
        )


class Result(NamedTuple):
    """What was done: bytes by kind, the reason for each copied byte, what was lost, and the seconds it took.

    `layers` are the files of the images below the target that were made with it, the base last.
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
