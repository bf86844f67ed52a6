"""`vmconv rebase`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_allow_external, add_format, add_keep_undo, add_output
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="layer to change")
    parser.add_argument(
        "-u",
        dest="unsafe",
        action="store_true",
        help="change only the stored name and format; BASE is not opened, and must have the content of the old parent",
    )
    parser.add_argument(
        "-b",
        dest="backing_file",
        metavar="BASE",
        required=True,
        help='new parent; stored as given, relative to FILE\'s directory; "" for none',
    )
    parser.add_argument("-F", dest="backing_format", metavar="FMT", help="format of BASE")
    add_format(parser)
    add_keep_undo(parser, "FILE")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_output(parser)
    add_allow_external(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import rebase
    from vmconv.cli.edited import report

    result = rebase(
        options.file,
        options.backing_file,
        backing_format=options.backing_format,
        unsafe=options.unsafe,
        source_format=options.format_f,
        keep_undo=options.keep_undo,
        allow_external=options.allow_external,
    )
    report(result, options)
    return 0


VERB = Verb(
    "Gives a layer another parent. With -u, only the name in its metadata changes, all of it or nothing, as after\n"
    "moving the parent.",
    _configure,
    _run,
    """exit status:
  0  changed
  1  the image or the storage does not allow it; nothing was changed
  2  the request makes no sense: an unknown format, or no format of BASE

examples:
  vmconv rebase -u -b ../bases/base.qcow2 -F qcow2 layer.qcow2
  vmconv rebase -u -b "" layer.qcow2""",
)
