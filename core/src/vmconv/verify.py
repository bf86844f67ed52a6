"""Verifying is algebra: the result read back (guest -> output file), composed with the layout (output file -> source
file), must be the source's own table (guest -> source file). No payload is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vmconv.comparison import first_difference
from vmconv.errors import AccessError, VerifyError, VmconvError
from vmconv.extents import Extents, on_storage
from vmconv.formats import Format
from vmconv.image import Image
from vmconv.opener import Opener
from vmconv.sources import File

if TYPE_CHECKING:
    from vmconv.containers import Container
    from vmconv.layout import Reference
    from vmconv.registry import Registry


class Results(Opener):
    """Gives files of a result, which may still have temporary names, to the reader that asks for their final ones.

    Under the names of its references it finds the source's own files.
    """

    def __init__(self, registry: Registry, references: Iterable[Reference] = ()) -> None:
        super().__init__(registry)
        self._results: dict[str, tuple[File, Format]] = {}
        self._sources = {reference.name: reference.file for reference in references}

    def add(self, name: str, file: File, reader: Format) -> None:
        self._results[name] = file, reader

    def related(self, origin: File, reference: str, role: str, *, moved: bool = False) -> File:
        return self._sources.get(reference) or self._find(origin, reference, role)[0]

    def parent(self, origin: File, reference: str, format_name: str | None, *, moved: bool = False) -> Image:
        file, reader = self._find(origin, reference, "backing file")
        return reader.read(file, self)

    def search(self, origin: File, suffix: str) -> Iterator[tuple[str, File]]:
        yield from ((name, file) for name, (file, _) in self._results.items() if file is not origin)

    def _find(self, origin: File, reference: str, role: str) -> tuple[File, Format]:
        found = self._results.get(os.path.basename(reference))
        if found is None:
            # As if it had been looked for: some readers look for several names.
            cause = FileNotFoundError(reference)
            raise AccessError(f"{origin.name}: {role} {reference!r} is not a file of the result") from cause
        return found


def verify(containers: Sequence[Container], files: Iterable[File], registry: Registry) -> None:
    """Raises `VerifyError` unless the finished `files` are the disks of these containers, on top of their parents.

    The files are those of all containers, in their order; the last of each is the image itself.
    """
    results = Results(registry, (reference for container in containers for reference in container.layout.references))
    finished = iter(files)
    images: dict[str, File] = {}
    for container in containers:
        own = [next(finished) for _ in container.layout.files]
        for out, file in zip(container.layout.files, own, strict=True):
            results.add(out.name or container.name, file, container.format)
        images[container.name] = own[-1]
        _verify_one(container, own, results, images)


def _verify_one(container: Container, files: Sequence[File], results: Results, images: dict[str, File]) -> None:
    try:
        result = container.format.read(files[-1], results)
        table = result.guest
        below = images.get(container.backing.reference) if container.backing else None
        if below and (result.parent is None or result.parent.file is not below):
            raise VerifyError(f"{container.name}: its parent is not {below.name}")
        _check_reference(container, result)
    except VmconvError as exc:
        raise VerifyError(f"the result cannot be read back: {exc}") from exc
    for out, file in zip(container.layout.files, files, strict=True):
        table = table.through(file, out.table)
    for reference in container.layout.references:
        table = table.through(reference.file, on_storage(reference.file))
    _same_disk(container, table)


def _check_reference(container: Container, result: Image) -> None:
    """Raises `VerifyError` when the result has a parent and refers to others files than that as its own."""
    named = {reference.name: reference.file for reference in container.layout.references}
    below = container.disk.parent
    if (
        named
        and result.parent_reference is not None
        and (below is None or named.get(result.parent_reference) is not below.file)
    ):
        raise VerifyError(f"{container.name}: its parent is {result.parent_reference}, the source was meant")


def _same_disk(container: Container, table: Extents) -> None:
    disk, below = container.disk, container.below
    table = (table if below is None else table.over(below)).without_holes()
    if table.size < disk.size:
        raise VerifyError(f"{container.name}: the result has {table.size} bytes for the guest, the source {disk.size}")
    wanted = disk.flat.window(0, table.size).without_holes()
    # What the filesystem reports otherwise than it was written (a block of zeros as a hole) is settled by reading it.
    where = None if table == wanted else first_difference(table, wanted)
    if where is not None:
        raise VerifyError(
            f"{container.name}: the result differs from the source at guest address {where:#x}",
            hint="this is a defect of vmconv or of the storage, please report it; nothing was created",
        )
