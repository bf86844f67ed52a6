"""`vmconv resize`."""

from __future__ import annotations

import argparse
import re

from vmconv.cli.options import (
    add_allow_external,
    add_any_owner,
    add_backing_format,
    add_format,
    add_keep_undo,
    add_output,
    add_report,
)
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    # Otherwise -5G would be an unknown option.
    parser._negative_number_matcher = re.compile(r"-\d")
    parser.add_argument("file", metavar="FILE", help="image to resize")
    parser.add_argument(
        "size",
        metavar="[+|-]SIZE",
        type=_size,
        help="new size of the disk, such as 20G; with a sign, by how much it grows or shrinks",
    )
    add_format(parser)
    parser.add_argument(
        "--shrink", action="store_true", help="allow a smaller disk: what lies behind its new end is lost"
    )
    parser.add_argument(
        "--preallocation",
        choices=("off", "falloc", "full"),
        default="off",
        help="of a raw disk that grows: falloc allocates the new space, full writes zeros there, too (default: off)",
    )
    add_keep_undo(parser, "FILE")
    add_any_owner(parser)
    add_report(parser)
    add_output(parser)
    add_allow_external(parser)
    add_backing_format(parser)


def _size(text: str) -> tuple[int, bool]:
    """Returns bytes, and whether they are relative to the present size. Raises argparse's error for another value."""
    from vmconv.cli.options import read_size

    sign = text[:1] if text[:1] in "+-" else ""
    size = read_size(text.removeprefix(sign))
    return (-size if sign == "-" else size), bool(sign)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import resize
    from vmconv.cli.output import as_plain, print_json
    from vmconv.cli.report import report_of

    size, relative = options.size
    report = report_of(options)
    result = resize(
        options.file,
        size,
        relative=relative,
        source_format=options.format_f,
        shrink=options.shrink,
        preallocation=options.preallocation,
        keep_undo=options.keep_undo,
        any_owner=options.any_owner,
        allow_external=options.allow_external,
        source_backing_format=options.source_backing_format,
        announce=report.announce,
    )
    if options.output == "json":
        facts = {name: value for name, value in as_plain(result).items() if not name.startswith(("source", "target"))}
        print_json({"event": "result", "path": result.target, "format_name": result.target_format, **facts})
    else:
        report.results(result)
    return 0


VERB = Verb(
    "Gives a disk another size. Payload stays where it lies, in every format; only metadata is written. The image\n"
    "keeps its options and ids. Partitions and filesystems inside are not changed.",
    _configure,
    _run,
    """exit status:
  0  resized
  1  the image or the storage does not allow it; nothing was changed
  2  the request makes no sense: an unknown format or size

examples:
  vmconv resize disk.qcow2 20G
  vmconv resize disk.vhdx +5G
  vmconv resize --shrink disk.raw 10G""",
)
