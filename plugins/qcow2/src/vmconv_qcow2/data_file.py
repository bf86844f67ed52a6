"""Chooses a file of the source as data file: it must be the disk, byte for byte, and nothing else."""

from __future__ import annotations

from vmconv.plugin import Extents, File, Image, Kind, PlanError, distinct, on_storage

_HINT = "convert to raw first, or use subformat=reference"


def disk_itself(image: Image) -> File:
    """Returns the file that is the disk and nothing else. Raises `PlanError` if there is none.

    Clusters of a data file lie at guest addresses (QEMU, docs/interop/qcow2.txt, incompatible feature bit 2). Bytes
    behind the disk in its last cluster would be overwritten.
    """
    table = image.flat
    used = distinct(table.source[table.kind == Kind.DATA].astype("int64")).tolist()
    files = [table.sources[index] for index in used] or [image.file]
    file = files[0]
    if len(files) > 1 or not isinstance(file, File):
        names = ", ".join(source.name for source in files)
        raise PlanError(
            f"{image.file.name}: payload lies in {names}, and a data file must hold all of it unencoded", hint=_HINT
        )
    same = Extents.whole(file).window(0, table.size).without_holes()
    if same.through(file, on_storage(file)) != table:
        raise PlanError(f"{file.name}: is not the disk from its first byte on, as a data file must be", hint=_HINT)
    if file.size > image.size:
        raise PlanError(f"{file.name}: {file.size - image.size} bytes lie behind the disk", hint=_HINT)
    return file
