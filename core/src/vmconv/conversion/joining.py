"""Several sources as one disk: each behind the one before it, as in qemu-img."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vmconv.errors import UsageError
from vmconv.inspect import checking
from vmconv.model.extents import MAX_SIZE, Columns, Extents, Kind, merge_sources
from vmconv.model.facts import DiskFacts
from vmconv.model.image import Image

if TYPE_CHECKING:
    from vmconv.conversion.request import Request
    from vmconv.io.opener import Opener

_SECTOR = 512
_SECTOR_SIZES = ("logical_sector_size", "physical_sector_size")


def joined(request: Request, opener: Opener) -> Image:
    """Returns all sources of a request as one disk, each in whole sectors. Raises `UsageError` if they cannot be."""
    images = [opener.image(path, request.source_format) for path in (request.source, *request.more_sources)]
    _refuse(images)
    size = sum(_whole(image.size) for image in images)
    if size > MAX_SIZE:
        raise UsageError(f"{len(images)} sources are {size} bytes, {MAX_SIZE} at most")
    first = images[0]
    made = Image(
        first.format_name,
        first.file,
        size,
        lambda: _behind_each_other([image.flat.window(0, _whole(image.size), Kind.ZERO) for image in images]),
        facts=_common([image.facts for image in images]),
        losses=tuple(f"{image.file.name}: {loss}" for image in images for loss in image.losses),
    )
    warnings = [text for image in images for text in (*image.warnings, *checking.warnings(image, opener))]
    made.warnings = tuple(dict.fromkeys(warnings))
    return made


def _refuse(images: Sequence[Image]) -> None:
    for image in images:
        if image.kind != "disk":
            raise UsageError(f"{image.file.name}: is a memory image, and only disks are joined")


def _whole(size: int) -> int:
    return -(-size // _SECTOR) * _SECTOR


def _common(facts: Sequence[DiskFacts]) -> DiskFacts:
    """Returns the sector sizes that all disks state alike; all else belongs to a disk that ends earlier."""
    same = [name for name in _SECTOR_SIZES if len({getattr(each, name) for each in facts}) == 1]
    stated: dict[str, Any] = {name: getattr(facts[0], name) for name in same}
    return DiskFacts(**stated)


def _behind_each_other(tables: Sequence[Extents]) -> Extents:
    sources, tables = merge_sources(*tables)
    starts = np.cumsum([0, *(table.size for table in tables)])
    columns = [
        table.columns._replace(start=table.start + start) for table, start in zip(tables, starts[:-1], strict=True)
    ]
    return Extents(int(starts[-1]), Columns.join(columns), sources)
