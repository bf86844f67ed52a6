"""`vmconv bitmap`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_allow_external, add_format, add_keep_undo, add_output, read_size
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    for verb, text in (
        ("add", "add the bitmap, enabled and without bits"),
        ("remove", "remove it"),
        ("clear", "clear all its bits"),
        ("enable", "let it note the writes of the next guests"),
        ("disable", "let it note none"),
    ):
        parser.add_argument(f"--{verb}", dest="changes", action="append_const", const=verb, help=text)
    parser.add_argument(
        "--merge",
        dest="changes",
        action="append",
        type=lambda source: f"merge:{source}",
        metavar="SOURCE",
        help="set the bits that the bitmap SOURCE has, of the same image or of that of -b",
    )
    parser.add_argument(
        "-b", dest="merge_from", metavar="SOURCEFILE", help="with --merge: image of SOURCE, only read (default: FILE)"
    )
    add_format(parser, "-F", "SOURCEFILE")
    parser.add_argument(
        "-g", dest="granularity", type=read_size, default=0, metavar="SIZE", help="with --add: bytes for each bit"
    )
    parser.add_argument("file", metavar="FILE", help="image with bitmaps")
    parser.add_argument("name", metavar="BITMAP", help="name of the bitmap")
    add_format(parser)
    add_keep_undo(parser, "FILE")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_output(parser)
    add_allow_external(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import bitmap
    from vmconv.cli.edited import report

    result = bitmap(
        options.file,
        options.name,
        options.changes or (),
        granularity=options.granularity,
        source_format=options.format_f,
        keep_undo=options.keep_undo,
        allow_external=options.allow_external,
        merge_from=options.merge_from,
        merge_format=options.format_F,
    )
    report(result, options)
    return 0


VERB = Verb(
    "Changes a persistent bitmap of a qcow2 image. Several changes are made in their order, all or none. vmconv info\n"
    "lists the bitmaps.",
    _configure,
    _run,
    """exit status:
  0  changed
  1  the image or the storage does not allow it; nothing was changed
  2  the request makes no sense: an unknown bitmap or change

examples:
  vmconv bitmap --add disk.qcow2 since-monday
  vmconv bitmap --merge since-monday disk.qcow2 since-sunday
  vmconv bitmap --merge since-monday -b top.qcow2 -F qcow2 disk.qcow2 since-sunday""",
)
