"""`vmconv commit`."""

from __future__ import annotations

import argparse
import os

from vmconv.cli.options import add_allow_external, add_backing_format, add_format, add_output, add_report
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="TOP", help="layer whose content goes into its base")
    parser.add_argument(
        "-b",
        dest="base",
        metavar="BASE",
        help="layer below TOP that gets the content of all above it (default: TOP's parent). With a deeper one TOP\n"
        "stays as it is, and layers between no longer read their own disk",
    )
    parser.add_argument("-d", dest="keep_top", action="store_true", help="leave TOP as it is, instead of emptying it")
    parser.add_argument(
        "--force", action="store_true", help="also if other layers are on BASE, which then read another disk"
    )
    parser.add_argument("-r", dest="rate", metavar="RATE", help="accepted for scripts of qemu-img, without effect")
    add_format(parser, whose="TOP")
    add_report(parser)
    add_output(parser)
    add_allow_external(parser)
    add_backing_format(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import commit
    from vmconv.cli.edited import print_result
    from vmconv.cli.output import size_text
    from vmconv.cli.report import report_of

    report = report_of(options)
    result = commit(
        options.file,
        base=options.base,
        keep_top=options.keep_top,
        source_format=options.format_f,
        force=options.force,
        allow_external=options.allow_external,
        source_backing_format=options.source_backing_format,
        announce=report.announce,
    )
    totals = result.totals
    print_result(
        result,
        options,
        f"{os.path.basename(result.base)}: shared {size_text(totals.shared)}, copied {size_text(totals.copied)}, "
        f"written {size_text(totals.written)} in {result.seconds:.3f} s"
        f"{f'; {result.path} is empty' if result.emptied else ''}",
    )
    return 0


VERB = Verb(
    "Brings the content of a layer into its base, which grows if it is smaller, and empties the layer. Blocks are\n"
    "shared where storage can. The base is complete and verified before it counts.",
    _configure,
    _run,
    """exit status:
  0  committed
  1  the images or the storage do not allow it; nothing was changed
  2  the request makes no sense

examples:
  vmconv commit top.qcow2
  vmconv commit -b base.qcow2 top.qcow2""",
)
