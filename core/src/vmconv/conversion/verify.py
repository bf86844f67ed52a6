"""Verification is algebra: the result read back (guest -> output file), composed with the layout (output file -> source
file), must equal the source's table (guest -> source file). It reads no payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vmconv.conversion.encrypted import as_decrypted
from vmconv.conversion.results import Results
from vmconv.errors import UsageError, VerifyError, VmconvError
from vmconv.inspect.comparison import first_difference
from vmconv.io.known import qemu_name
from vmconv.model.extents import Extents, Kind, on_storage
from vmconv.model.image import Image
from vmconv.model.planned import PlannedFile
from vmconv.model.sources import Decoded, File

if TYPE_CHECKING:
    from vmconv.conversion.containers import Container
    from vmconv.conversion.readback import Sides
    from vmconv.conversion.request import Request
    from vmconv.interface.arguments import Verify
    from vmconv.io.registry import Registry
    from vmconv.model.bitmaps import DirtyBitmap
    from vmconv.model.plan import Progress


def verify(
    containers: Sequence[Container],
    files: Iterable[File],
    registry: Registry,
    mode: Verify = "metadata",
    progress: Progress | None = None,
) -> None:
    """Raises `VerifyError` unless the finished `files` hold the disks of these containers, on top of their parents.

    `files` are in the order of the containers; the last of each container is the image itself. Every mode begins with
    the metadata. For each image, `progress` gets the payload bytes read so far, of both sides, and their total.
    """
    made = list(_checked(containers, files, registry))
    if mode == "qemu":
        from vmconv.conversion.qemu import compare

        compare(made)
    elif mode != "metadata":
        from vmconv.conversion import readback

        check = readback.check_bytes if mode == "bytes" else readback.check_sample
        for one in made:
            check(one.sides, progress)


def verify_mode(verify: bool | Verify) -> Verify | None:
    """Returns the mode of verification, None for no verification."""
    return ("metadata" if verify else None) if isinstance(verify, bool) else verify


def refuse_impossible(
    mode: Verify | None, containers: Sequence[Container], registry: Registry, request: Request
) -> None:
    """Raises `UsageError` if the planned containers of a request cannot be verified in this mode."""
    if mode in ("sample", "bytes", "qemu") and request.in_place:
        raise UsageError(
            f"--verify={mode} and --in-place exclude each other: the source no longer exists",
            hint="kept payload stays in place; with --keep-undo, compare a copy of the source afterwards",
        )
    if mode != "qemu":
        return
    if request.descriptor is not None:
        raise UsageError("--verify=qemu: QEMU cannot read a stream", hint="use --verify=bytes")
    from vmconv.conversion.qemu import refuse_impossible as refuse
    from vmconv.model.planned import PlannedFile

    # No file exists yet, so the images are read from their plans.
    planned = [
        PlannedFile(out.name or container.name, out.table) for container in containers for out in container.layout.files
    ]
    refuse(list(read_back(containers, planned, registry)), registry)


class Made(NamedTuple):
    """A container that was read back; `below` is its parent if the same conversion made it."""

    container: Container
    files: tuple[File, ...]
    image: Image
    sides: Sides
    below: Made | None


def planned_image(containers: Sequence[Container], registry: Registry) -> Image:
    """Returns the last of planned images as its reader will see it: its format may round the size."""
    planned = [PlannedFile(out.name or made.name, out.table) for made in containers for out in made.layout.files]
    *_, top = read_back(containers, planned, registry)
    return top.image


def read_back(containers: Sequence[Container], files: Iterable[File], registry: Registry) -> Iterator[Made]:
    """Yields each container as its format's reader sees it. Raises `VerifyError` if it is unreadable."""
    from vmconv.conversion.readback import Sides

    # One opener for all containers, so that a child finds its parent among the results.
    passphrases = tuple(container.encryptor.passphrase for container in containers if container.encryptor)
    references = (reference for container in containers for reference in container.layout.references)
    results = Results(registry, references, passphrases)
    finished = iter(files)
    made: dict[str, Made] = {}
    layouts: dict[int, Extents] = {}
    for container in containers:
        own = tuple(next(finished) for _ in container.layout.files)
        for out, file in zip(container.layout.files, own, strict=True):
            results.add(out.name or container.name, file, container.format)
            layouts[id(file)] = out.table
        below = made.get(container.backing.reference) if container.backing else None
        image = _image(container, own[-1], results, below)
        lower = below.sides.found if below else _kept_tables(container)
        wanted = [layer.guest for layer in container.source.chain()]
        sides = Sides(container.name, wanted, [image.guest, *lower], layouts)
        made[container.name] = Made(container, own, image, sides, below)
        yield made[container.name]


def _image(container: Container, file: File, results: Results, below: Made | None) -> Image:
    try:
        result = container.format.read(file, results)
        result.guest  # noqa: B018 reads the tables
        if below and (result.parent is None or result.parent.file is not below.files[-1]):
            raise VerifyError(f"{container.name}: its parent is not {below.container.name}")
        _check_parent(container, result)
        _check_reference(container, result)
    except VmconvError as exc:
        raise VerifyError(f"the result cannot be read back: {exc}") from exc
    return result


def _kept_tables(container: Container) -> list[Extents]:
    """Returns the tables of the source's layers below the container."""
    parent = container.disk.parent if container.backing else None
    return [layer.guest for layer in parent.chain()] if parent else []


def _checked(containers: Sequence[Container], files: Iterable[File], registry: Registry) -> Iterator[Made]:
    """Yields the containers. Raises `VerifyError` if a container's metadata is wrong."""
    from vmconv.conversion.readback import check_places

    for one in read_back(containers, files, registry):
        # Before the files are composed: windows onto encoded payload name the result's own file.
        _check_encrypted(one)
        table = as_decrypted(_as_encoded(one), one.sides.layouts)
        for out, file in zip(one.container.layout.files, one.files, strict=True):
            table = table.through(file, out.table)
        for reference in one.container.layout.references:
            table = table.through(reference.file, on_storage(reference.file))
        _check_table(one.container, table)
        _check_bitmaps(one)
        check_places(one.sides)
        yield one


def _as_encoded(one: Made) -> Extents:
    """Returns the table of a result; payload that is encoded as planned is the source's."""
    table = one.image.guest
    if not any(isinstance(source, Decoded) and source.encoding for source in table.sources):
        return table
    from vmconv.conversion.encoded import as_encoded

    disk = one.container.disk
    wanted = disk.flat if one.container.below is None else disk.guest
    return as_encoded(table, one.sides.layouts, wanted.window(0, table.size, Kind.ZERO))


def _check_encrypted(one: Made) -> None:
    """Raises `VerifyError` if a result that should be encrypted has payload that is not, or by another key."""
    encryptor, table = one.container.encryptor, one.image.guest
    if encryptor is None:
        return
    used = np.unique(table.source[table.kind == Kind.DATA]).tolist()
    sources = [table.sources[index] for index in used]
    if not one.image.details.get("encrypted") or any(
        not isinstance(source, Decoded) or source.cipher != encryptor.cipher for source in sources
    ):
        raise VerifyError(f"{one.container.name}: the result is not encrypted as it was planned")


def _check_bitmaps(one: Made) -> None:
    """Raises `VerifyError` unless a result has the bitmaps that it carries over."""
    wanted = one.container.disk.bitmaps
    if not wanted:
        return
    found = one.container.format.with_bitmaps(one.image, skip_broken=False).bitmaps
    mine, theirs = ([_stated(bitmap, one.image.size) for bitmap in bitmaps] for bitmaps in (wanted, found))
    for ours, read in zip_longest(mine, theirs):
        if ours != read:
            raise VerifyError(f"{one.container.name}: bitmap {(ours or read)[0]!r} is not that of the source")


def _stated(bitmap: DirtyBitmap, size: int) -> tuple[str, int, bool, bytes, bytes]:
    first, end = bitmap.bits(size)
    return bitmap.name, bitmap.granularity, bitmap.enabled, first.tobytes(), end.tobytes()


def _check_parent(container: Container, result: Image) -> None:
    """Raises `VerifyError` if the result states another parent than planned.

    `Results` returns the right file whatever the result states, so the statement needs its own check.
    """
    backing = container.backing
    if backing is None:
        if result.parent_reference is not None:
            raise VerifyError(f"{container.name}: states the parent {result.parent_reference!r}, and has none")
        return
    stated, meant = result.parent_format, qemu_name(backing.format)
    if stated is not None and qemu_name(stated) != meant:
        raise VerifyError(f"{container.name}: states the format {stated!r} of its parent, which is {meant!r}")


def _check_reference(container: Container, result: Image) -> None:
    """Raises `VerifyError` if the parent that the result names is not the source as planned."""
    named = {reference.name: reference.file for reference in container.layout.references}
    below = container.disk.parent
    if (
        named
        and result.parent_reference is not None
        and (below is None or named.get(result.parent_reference) is not below.file)
    ):
        raise VerifyError(f"{container.name}: its parent is {result.parent_reference}, the source was meant")


def _check_holes(container: Container, table: Extents) -> None:
    """Raises `VerifyError` unless memory has RAM at the same addresses in the result and in the source."""
    if container.source.kind != "memory" or not container.format.keeps_holes:
        return
    mine, theirs = (_holes(each) for each in (container.source.guest, table))
    if mine != theirs:
        raise VerifyError(f"{container.name}: the result has RAM at other addresses than the source")


def _holes(table: Extents) -> Extents:
    """Returns the table with ZERO for all RAM."""
    return Extents(table.size, table.columns._replace(kind=np.minimum(table.kind, np.uint8(Kind.ZERO))), table.sources)


def _check_table(container: Container, table: Extents) -> None:
    _check_holes(container, table)
    disk, below = container.disk, container.below
    table = (table if below is None else table.over(below)).without_holes()
    if table.size < disk.size:
        raise VerifyError(f"{container.name}: the result has {table.size} bytes for the guest, the source {disk.size}")
    wanted = disk.flat.window(0, table.size).without_holes()
    # A filesystem may report a written block of zeros as a hole. Reading settles such differences.
    where = None if table == wanted else first_difference(table, wanted)
    if where is not None:
        raise VerifyError(
            f"{container.name}: the result differs from the source at guest address {where:#x}",
            hint="this is a defect of vmconv or of the storage, please report it; nothing was created",
        )
