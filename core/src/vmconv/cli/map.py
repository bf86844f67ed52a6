"""`vmconv map`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import add_access, add_format, add_output, add_parent, add_secret, columns, read_size, reading
from vmconv.cli.picture import add_picture, draw_image, print_bars
from vmconv.cli.verbs import Verb
from vmconv.errors import UsageError

if TYPE_CHECKING:
    from vmconv.model.image import Image


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_table
    from vmconv.inspect.images import opened
    from vmconv.inspect.mapping import map_rows

    with opened(reading(options)) as (image, _):
        if options.picture or options.bar:
            return _draw(options, image)
        rows = map_rows(image, options.start_offset, options.max_length)
        if options.output == "json":
            _print_map(rows)
            return 0
        table = [["Offset", "Length", "Mapped to", "File"]]
        for row in rows:
            if row.data and not row.zero:
                place = "-" if row.offset is None else f"{row.offset:#x}"
                table.append([f"{row.start:#x}", f"{row.length:#x}", place, row.file or "-"])
        print_table(table)
    return 0


def _draw(options: argparse.Namespace, image: Image) -> int:
    if options.start_offset or options.max_length is not None or options.output == "json":
        raise UsageError("a picture shows the whole disk", hint="omit --start-offset, --max-length and --output json")
    if options.picture:
        draw_image(options.picture, image)
    if options.bar:
        print_bars(image, max(20, columns() - 4))
    return 0


def _print_map(rows: Any) -> None:
    """Prints the rows in the layout of qemu-img, so that outputs can be compared line by line."""
    import json

    before = "["
    for row in rows:
        print(before, end="")
        before = ",\n"
        print(json.dumps(row.as_json()).replace("{", "{ ", 1)[:-1] + "}", end="")
    print("]" if before != "[" else "[]")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="image to map")
    add_format(parser)
    parser.add_argument(
        "--start-offset", type=read_size, default=0, metavar="N", help="begin at this byte of the disk (default: 0)"
    )
    parser.add_argument(
        "--max-length", type=read_size, metavar="N", help="map this number of bytes (default: up to the disk's end)"
    )
    add_picture(parser, "the disk and its files")
    parser.add_argument("--bar", action="store_true", help="draw the disk and its files in the terminal")
    add_output(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)


VERB = Verb(
    "Shows, for each range of the guest's address space, what it is and where it lies in which file.\n"
    "--output json prints what qemu-img map --output=json prints.",
    _configure,
    _run,
)
