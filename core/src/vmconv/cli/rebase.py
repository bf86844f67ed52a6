"""`vmconv rebase`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmconv.cli.options import add_allow_external, add_format, add_keep_undo, add_output, add_parent, add_report
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.syncing.rebase import RebaseResult


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
    parser.add_argument(
        "-F", dest="backing_format", metavar="FMT", help="format of BASE (default without -u: by suffix and content)"
    )
    add_format(parser)
    add_keep_undo(parser, "FILE", when="with -u: ")
    add_report(parser)
    add_output(parser)
    add_allow_external(parser)
    add_parent(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import rebase
    from vmconv.cli.edited import print_result, report
    from vmconv.cli.report import report_of
    from vmconv.syncing.rebase import RebaseResult

    result = rebase(
        options.file,
        options.backing_file,
        backing_format=options.backing_format,
        unsafe=options.unsafe,
        source_format=options.format_f,
        keep_undo=options.keep_undo,
        allow_external=options.allow_external,
        parents=options.parents,
        announce=report_of(options).announce,
    )
    if isinstance(result, RebaseResult):
        print_result(result, options, _in_words(result))
    else:
        report(result, options)
    return 0


def _in_words(result: RebaseResult) -> str:
    from vmconv.cli.output import size_text

    totals = result.totals
    return (
        f"{result.path}: {size_text(result.own)} of the old parent kept, shared {size_text(totals.shared)}, "
        f"copied {size_text(totals.copied)}, written {size_text(totals.written)} in {result.seconds:.3f} s"
    )


VERB = Verb(
    "Gives a layer another parent. The guest's disk stays as it is: where the layer has a hole and the parents\n"
    "differ, the old content becomes the layer's own. With -u, only the name in its metadata changes, as after\n"
    "moving the parent.",
    _configure,
    _run,
    """exit status:
  0  changed
  1  the image or the storage does not allow it; nothing was changed
  2  the request makes no sense: an unknown format, or no format of BASE

examples:
  vmconv rebase -b new-base.qcow2 layer.qcow2
  vmconv rebase -u -b ../bases/base.qcow2 -F qcow2 layer.qcow2
  vmconv rebase -u -b "" layer.qcow2""",
)
