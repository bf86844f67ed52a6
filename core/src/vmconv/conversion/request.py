"""The request of a conversion, and its result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from vmconv.errors import UsageError
from vmconv.inplace.settling import refuse_interrupted, settle
from vmconv.interface.arguments import Cache, FilePath, FilePaths, Mode, WriterOptions, ZeroCopy
from vmconv.interface.backend import ObjectBackend
from vmconv.interface.scheme import STANDARD_INPUT, is_url, without_secrets
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.model.options import parse_options
from vmconv.model.plan import CopyReason, Totals

if TYPE_CHECKING:
    from vmconv.interface.format import Format
    from vmconv.model.sources import Encryptor


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

    `decompress` decodes a compressed source into a file without a name in the target's directory, of at most
    `decompress_limit` bytes, see `vmconv.io.decompressing`.

    `facts` replace what the source states of the disk, where a machine's configuration states it instead.

    `confined` reads and makes no file outside of `allow_external`, whatever other users rename meanwhile; the target's
    directory has to lie there, too. An interrupted conversion in place is refused instead of recovered.

    `blank` makes an empty disk of this size, bytes, instead of reading `source`, which is not used. It may be on top of
    `backing_file`, which is any image then, of `backing_format`; 0 is the size of that.

    `compress` compresses all payload, as `Format.compressing` says for the target's format.

    `sparse` reads all payload, and leaves out runs of zeros of at least this many bytes.

    `more_sources` are further disks, all in `source_format` if it is given: the target's disk is `source`, then these.

    `bitmaps` carries over the persistent bitmaps of the image itself, not of its backing files. `skip_broken_bitmaps`
    leaves out those that may lack writes.

    `size` is the size of the target's disk in bytes, if it is not the source's; what is beyond the source is zero.

    `no_create` writes into the existing block device `target`, whose content is lost. With `target_is_zero`
    it is read, and only what is not zero is zeroed.

    `offset` and `length` take bytes `[offset, offset + length)` of the source as the disk, by default up to its end.

    `secrets` are files with passphrases of encrypted images; each is tried for each image.

    `target_secret` is a file with the passphrase of the target, which is encrypted with it.

    `spared` are device and inode of files that other conversions of the same run read, so that no target replaces them.

    `parents` are files that are the parents of layers whose parent is not where they say, from the top down.

    `rate` limits copying and writing, in bytes per second.

    `no_create` replaces the content of the existing `target`: of a block device, or of an image, whose format, options
    and size stay. With `target_is_zero` a device is read, and only what is not zero is zeroed.

    `descriptor` is an open descriptor that gets the image as a stream; then `target` is only its name in messages.

    `storage` makes the target where there are no local files, see `ObjectBackend`; then `target` is its name there.
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
    decompress: bool = False
    decompress_limit: int | None = None
    facts: Mapping[str, str | None] = MappingProxyType({})
    descriptor: int | None = None
    confined: bool = False
    blank: int | None = None
    size: int | None = None
    rate: int | None = None
    no_create: bool = False
    target_is_zero: bool = False
    offset: int = 0
    length: int | None = None
    compress: bool = False
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    more_sources: FilePaths = ()
    sparse: int | None = None
    secrets: FilePaths = ()
    target_secret: FilePath | None = None
    parents: FilePaths = ()
    spared: frozenset[tuple[int, int]] = frozenset()
    storage: ObjectBackend | None = None

    @property
    def is_local(self) -> bool:
        """True if the target is a file or a device."""
        return self.descriptor is None and self.storage is None

    def located(self) -> Request:
        """Returns the request with the path of the source in the snapshot that it is read from.

        Raises `UsageError` for options that exclude each other.
        """
        self.refuse_contradictions()
        if self.from_snapshot is None:
            return self
        from vmconv.io.snapshots import in_snapshot

        return self._replace(source=in_snapshot(self.source, self.from_snapshot).path, from_snapshot=None)

    def refuse_contradictions(self) -> None:
        """Raises `UsageError` for a source that is not the file that would be changed in place, or read."""
        if self.in_place and self.from_snapshot is not None:
            raise UsageError("--in-place: a snapshot is never changed", hint="omit --from-snapshot or --in-place")
        if is_url(self.source):
            self._refuse_at_url()
        if self.in_place and self.decompress:
            raise UsageError("--in-place: a compressed file cannot become an image", hint="omit --in-place")
        if self.confined and (self.in_place or self.decompress or self.descriptor is not None):
            raise UsageError("a confined conversion makes a new file of an image that is not compressed")
        if self.target_is_zero and not self.no_create:
            raise UsageError("--target-is-zero is for -n", hint="a new file is zero where nothing is written")
        self._refuse_part()
        if self.more_sources:
            self._refuse_with_several()
        if self.sparse is not None:
            self._refuse_sparse(self.sparse)
        if self.bitmaps and (self.chain or self.snapshot is not None or self.is_part):
            raise UsageError("--bitmaps: only for the present state of one whole image, no --chain, --snapshot or part")
        self._refuse_encrypted()
        if self.skip_broken_bitmaps and not self.bitmaps:
            raise UsageError("--skip-broken-bitmaps is for --bitmaps")
        self._refuse_limit()

    def _refuse_limit(self) -> None:
        if self.decompress_limit is not None and not self.decompress:
            raise UsageError("--decompress-limit is for --decompress")
        if self.decompress_limit is not None and self.decompress_limit < 0:
            raise UsageError(f"--decompress-limit: {self.decompress_limit} is negative")

    def _refuse_at_url(self) -> None:
        for given, name in ((self.in_place, "--in-place"), (self.from_snapshot is not None, "--from-snapshot")):
            if given:
                raise UsageError(f"{name} is for a local file, and {without_secrets(self.source)} is a URL")

    @property
    def is_part(self) -> bool:
        """True if the target is a part of the source's disk."""
        return self.offset != 0 or self.length is not None

    @property
    def can_leave_payload(self) -> bool:
        """True if the same could be asked for in place, or by reference: of a whole disk, into a file, as it is."""
        changes = self.blank is not None or self.compress or self.decompress or self.target_secret or self.sparse
        chooses = self.is_part or self.more_sources or self.snapshot is not None or self.from_snapshot is not None
        elsewhere = self.in_place or self.no_create or not self.is_local or is_url(self.source)
        return not (changes or chooses or elsewhere or self.source == STANDARD_INPUT)

    def _refuse_part(self) -> None:
        """Raises `UsageError` for a part of the disk where the target holds all of it."""
        if self.offset < 0 or (self.length is not None and self.length <= 0):
            raise UsageError(f"no part of a disk has {self.length} bytes from {self.offset} on")
        if self.is_part:
            for given, name in (
                (self.in_place, "--in-place"),
                (self.chain, "--chain"),
                (self.backing_file is not None, "-B"),
            ):
                if given:
                    raise UsageError(
                        f"{name}: the target would be a part of the disk", hint="omit --offset and --length"
                    )

    def _refuse_encrypted(self) -> None:
        """Raises `UsageError` where a target to encrypt is no new file that holds all payload."""
        if self.target_secret is None:
            return
        for given, name in (
            (self.in_place, "--in-place"),
            (self.chain, "--chain"),
            (self.backing_file is not None, "-B"),
            (self.no_create, "-n"),
            (self.compress, "-c"),
            (not self.is_local, "a stream or an object"),
        ):
            if given:
                raise UsageError(f"--target-secret: encrypts the whole disk into a new file, and {name} does not")

    def _refuse_sparse(self, least: int) -> None:
        if least < 1:
            raise UsageError(
                f"-S {least}: a run of zeros has at least 1 byte",
                hint="-o preallocation=full writes zeros where there is no payload",
            )
        for given, name in (
            (self.in_place, "--in-place"),
            (self.chain, "--chain"),
            (self.backing_file is not None, "-B"),
            (self.blank is not None, "a new disk"),
        ):
            if given:
                raise UsageError(f"-S: zeros are left out of a whole disk in a new file, and {name} makes another")

    def _refuse_with_several(self) -> None:
        for given, name in (
            (self.in_place, "--in-place"),
            (self.chain, "--chain"),
            (self.backing_file is not None, "-B"),
            (self.snapshot is not None, "--snapshot"),
            (self.from_snapshot is not None, "--from-snapshot"),
            (self.bitmaps, "--bitmaps"),
            (self.blank is not None, "a new disk"),
        ):
            if given:
                raise UsageError(f"{name}: is for one source, and {len(self.more_sources) + 1} are given")

    def opener(self, registry: Registry) -> Opener:
        """Returns the opener of the source. Raises `UsageError` for options that exclude each other."""
        from vmconv.io.spooling import PipeSpool

        self.refuse_contradictions()
        decompress = None
        if self.decompress:
            from vmconv.io.decompressing import LIMIT, Spool

            decompress = Spool(
                self._spool_directory(), LIMIT if self.decompress_limit is None else self.decompress_limit
            )
        return Opener(
            registry,
            allow_external=self.allow_external,
            force_share=self.force_share,
            backing_format=self.source_backing_format,
            settle=refuse_interrupted if self.confined else settle,
            decompress=decompress,
            confined=self.confined,
            secrets=self.secrets,
            parents=self.parents,
            remote=True,
            spool=None if self.in_place else PipeSpool(self._spool_directory()),
        )

    def _spool_directory(self) -> str:
        if self.is_local:
            return os.path.dirname(os.path.realpath(self.target))
        from tempfile import gettempdir

        return gettempdir()


def options_of(request: Request, wanted: Format, registry: Registry) -> Any:
    """Returns the options of the target's writer. Raises `UsageError` if it cannot do what is asked."""
    if not request.compress:
        return parse_options(wanted.options(), request.options, wanted.name)
    if not wanted.compressing:
        can = ", ".join(sorted(name for name, one in registry.formats.items() if one.compressing))
        raise UsageError(f"-c: {wanted.name} has no compression", hint=f"formats that have: {can or 'none installed'}")
    for name, value in wanted.compressing.items():
        given = request.options.get(name, value)
        mine, theirs = (parse_options(wanted.options(), {name: each}, wanted.name) for each in (value, given))
        if getattr(mine, name) != getattr(theirs, name):
            raise UsageError(f"-c is -o {name}={value} for {wanted.name}, and {name}={given!s} contradicts it")
    return parse_options(wanted.options(), {**request.options, **wanted.compressing}, wanted.name)


def encryptor_of(request: Request, wanted: Format, registry: Registry) -> Encryptor | None:
    """Returns the encryption of the target; None if none is asked for. Raises `UsageError` if its writer has none."""
    if request.target_secret is None:
        return None
    if wanted.encrypts_with is None:
        can = ", ".join(sorted(name for name, one in registry.formats.items() if one.encrypts_with))
        raise UsageError(
            f"--target-secret: vmconv does not encrypt {wanted.name}",
            hint=f"formats that it encrypts: {can or 'none installed'}",
        )
    from vmconv.io.secrets import new_passphrase

    return registry.format(wanted.encrypts_with).encryptor(new_passphrase(request.target_secret))


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
