"""`compare`, `map`, `measure` and `check` as qemu-img's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vmconv.cli.qemu_img.arguments import QEMU_NAMES, SECTOR, Given, plain_file, size_of
from vmconv.cli.qemu_img.handing import NAME, NotAnsweredError, find
from vmconv.cli.qemu_img.images import ANYWHERE, COMPLETE, format_of

if TYPE_CHECKING:
    from vmconv.interface.arguments import Reading

_NEWLINE = "\n"
_DIFFERENT = 1
_CHECK_CORRUPT, _CHECK_LEAKS, _CHECK_UNSUPPORTED = 2, 3, 63
_UNCHECKED = ("raw", "vhd")


def _reading(asked: Given) -> Reading:
    from vmconv.interface.arguments import Reading, checked

    path = asked.one_file()
    reading: Reading = checked(
        Reading,
        path=path,
        format_name=format_of(path, asked.format("-f")),
        allow_external=ANYWHERE,
        force_share=asked.has("-U"),
    )
    return reading


def compare(asked: Given) -> int:
    """Compares two disks, without reading what they share."""
    from vmconv.api import compare as compared

    if len(asked.names) != 2:
        raise NotAnsweredError(f"{len(asked.names)} names")
    if asked.has("-s"):
        raise NotAnsweredError("-s compares what is allocated, too")
    asked.cache("-T", "writeback")
    left, right = (plain_file(name) for name in asked.names)
    found = compared(
        left,
        right,
        left_format=format_of(left, asked.format("-f")),
        right_format=format_of(right, asked.format("-F")),
        allow_external=ANYWHERE,
        force_share=asked.has("-U"),
    )
    first = found.first_difference
    texts = []
    if found.sizes[0] != found.sizes[1] and (first is None or first >= min(found.sizes)):
        texts.append("Warning: Image size mismatch!")
    # QEMU compares sectors.
    texts.append("Images are identical." if first is None else f"Content mismatch at offset {first - first % SECTOR}!")
    if not asked.has("-q"):
        shown = asked.has("-p")
        print(f"{COMPLETE if shown else ''}{_NEWLINE.join(texts)}{_NEWLINE if shown else ''}")
    return 0 if found.identical else _DIFFERENT


def map_disk(asked: Given) -> int:
    """Prints where each range of a disk lies."""
    from vmconv.cli.qemu_img.description import shown_names
    from vmconv.cli.qemu_img.rows import as_json, as_table
    from vmconv.inspect.images import opened
    from vmconv.inspect.mapping import map_rows

    json = asked.is_json()
    start, length = asked.last("-s"), asked.last("-l")
    with opened(_reading(asked)) as (image, _):
        # QEMU does not tell where the blocks of a VHDX are.
        if find() is not None and any(layer.format_name == "vhdx" for layer in image.chain()):
            raise NotAnsweredError("a VHDX")
        rows = list(map_rows(image, size_of(start or "0"), None if length is None else size_of(length)))
        if not rows:
            raise NotAnsweredError("no part of the disk")
        # QEMU prints the names of lower layers as they are stored.
        shown = {
            layer.file.path: name
            for layer, name in zip(image.chain(), shown_names(image, asked.names[0]), strict=False)
        }
        rows = [row._replace(file=shown.get(row.file or "", row.file)) for row in rows]
    print("\n".join(as_json(rows) if json else as_table(rows)))
    return 0


def measure(asked: Given) -> int:
    """Prints how large an image will be that vmconv makes."""
    from vmconv.api import measure as measured
    from vmconv.cli.output import print_json

    size = asked.last("--size")
    if len(asked.names) != (size is None):
        raise NotAnsweredError(f"{len(asked.names)} names")
    json = asked.is_json()
    source = asked.one_file() if size is None else None
    found = measured(
        asked.format("-O") or "raw",
        source,
        size=None if size is None else size_of(size),
        options=asked.writer_options(),
        source_format=None if source is None else format_of(source, asked.format("-f")),
        snapshot=asked.last("-l"),
        force_share=asked.has("-U"),
        allow_external=ANYWHERE,
    )
    if json:
        print_json(found.as_json(), indent=4)
        return 0
    print(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
    return 0


def check(asked: Given) -> int:
    """Checks an image; without QEMU's count of fragments."""
    from vmconv.cli.output import print_json
    from vmconv.inspect.checking import check_image
    from vmconv.inspect.images import opened

    json = asked.is_json()
    with opened(_reading(asked)) as (image, opener):
        report = None if image.format_name in _UNCHECKED else check_image(image, opener)
    if report is None:
        if not asked.has("-q"):
            print(f"{NAME}: This image format does not support checks", file=sys.stderr)
        return _CHECK_UNSUPPORTED
    if json:
        found: dict[str, Any] = {"image-end-offset": report.image_end, "total-clusters": report.total_clusters}
        found |= {"allocated-clusters": report.allocated_clusters} if report.allocated_clusters else {}
        found |= {"check-errors": len(report.errors)}
        found |= {"corruptions": report.corruption_count} if report.corruption_count else {}
        found |= {"leaks": report.leak_count} if report.leak_count else {}
        print_json({**found, "filename": asked.names[0], "format": QEMU_NAMES[image.format_name]}, indent=4)
    elif not asked.has("-q"):
        from vmconv.cli.check import print_report

        print_report(report)
    if report.errors:
        return 1
    if report.corruption_count:
        return _CHECK_CORRUPT
    return _CHECK_LEAKS if report.leak_count else 0
