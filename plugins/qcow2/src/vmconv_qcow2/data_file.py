"""Which file of the source can be the data file of an image: one that is the disk, byte for byte, and no more."""

from __future__ import annotations

from vmconv.plugin import Extents, File, Image, Kind, PlanError, distinct, on_storage

_HINT = "convert to raw first, or use subformat=reference"


def disk_itself(image: Image) -> File:
    """Returns the file that is the disk and nothing else; raises `PlanError` when none is.

    Clusters of a data file lie at the guest's own addresses (QEMU, docs/interop/qcow2.txt, incompatible feature bit 2),
    and what lies behind the disk in its last cluster would be overwritten.
    """
    table = image.flat
    used = distinct(table.source[table.kind == Kind.DATA].astype("int64")).tolist()
    files = [table.sources[index] for index in used] or [image.file]
    file = files[0]
    if len(files) > 1 or not isinstance(file, File):
        names = ", ".join(source.name for source in files)
        raise PlanError(f"{image.file.name}: payload lies in {names}, a data file has all of it as it is", hint=_HINT)
    same = Extents.whole(file).window(0, table.size).without_holes()
    if same.through(file, on_storage(file)) != table:
        raise PlanError(f"{file.name}: is not the disk from its first byte on, as a data file has to be", hint=_HINT)
    if file.size > image.size:
        raise PlanError(f"{file.name}: {file.size - image.size} bytes lie behind the disk", hint=_HINT)
    return file
