"""Verifying is algebra: the result read back (guest -> output file), composed with the layout (output file -> source
file), must be the source's own table (guest -> source file). No payload is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmconv.comparison import first_difference
from vmconv.errors import AccessError, VerifyError, VmconvError
from vmconv.extents import Extents
from vmconv.formats import Format
from vmconv.image import Image
from vmconv.layout import OutFile
from vmconv.opener import Opener
from vmconv.sources import File

if TYPE_CHECKING:
    from vmconv.registry import Registry


class _Results(Opener):
    """Gives the files of a result, which still have temporary names, to the reader that asks for their final ones."""

    def __init__(self, registry: Registry, files: dict[str, File]) -> None:
        super().__init__(registry)
        self._results = files

    def related(self, origin: File, reference: str, role: str) -> File:
        file = self._results.get(os.path.basename(reference))
        if file is None:
            raise AccessError(f"{origin.name}: {role} {reference!r} is not a file of the result")
        return file


def verify(
    target: Format,
    outs: Sequence[OutFile],
    files: Sequence[File],
    image: Image,
    registry: Registry,
    below: Extents | None,
) -> None:
    """Raises `VerifyError` unless the finished `files`, laid out as `outs`, are the disk of `image` for a guest.

    `below` is the table under the result when it keeps a parent. The last file is the one the user named.
    """
    names = {out.name: file for out, file in zip(outs, files, strict=True) if out.name}
    try:
        result = target.read(files[-1], _Results(registry, names))
        table = result.guest
    except VmconvError as exc:
        raise VerifyError(f"the result cannot be read back: {exc}") from exc
    for out, file in zip(outs, files, strict=True):
        table = table.through(file, out.table)
    if below is not None:
        table = table.over(below)
    table = table.without_holes()
    if table.size < image.size:
        raise VerifyError(f"the result has {table.size} bytes for the guest, the source {image.size}")
    wanted = image.flat.window(0, table.size).without_holes()
    # What the filesystem reports otherwise than it was written (a block of zeros as a hole) is settled by reading it.
    where = None if table == wanted else first_difference(table, wanted)
    if where is not None:
        raise VerifyError(
            f"the result differs from the source at guest address {where:#x}",
            hint="this is a defect of vmconv or of the storage, please report it; nothing was created",
        )
