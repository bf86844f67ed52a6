"""`vmconv create`."""

from __future__ import annotations

import argparse
import sys

from vmconv.cli.options import add_access, add_format, add_options, add_output, read_mode, read_size
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="FILE", help="image to make; appears complete or not at all")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", type=read_size, help="size of the disk, such as 10G (default: that of -b)"
    )
    add_format(parser, "-f", "FILE", default="by its suffix")
    add_options(parser, "the format")
    parser.add_argument(
        "-b",
        dest="backing_file",
        metavar="BASE",
        help="image that the new one is an empty layer on; stored as given, relative to FILE's directory",
    )
    parser.add_argument(
        "-F", dest="backing_format", metavar="FMT", help="format of BASE (default: by its suffix and content)"
    )
    parser.add_argument("--mode", type=read_mode, metavar="OCTAL", help="permission bits of new files, such as 0640")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_output(parser)
    add_access(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import create
    from vmconv.cli.output import as_plain, print_json, say, size_text

    result = create(
        options.target,
        options.size,
        target_format=options.format_f,
        options=options.options,
        backing_file=options.backing_file,
        backing_format=options.backing_format,
        mode=options.mode,
        force=options.force,
        force_share=options.force_share,
        allow_external=options.allow_external,
        source_backing_format=options.source_backing_format,
    )
    if options.output == "json":
        made = {name: value for name, value in as_plain(result).items() if not name.startswith("source")}
        print_json({"event": "result", **made})
        return 0
    for warning in result.warnings:
        say(f"warning: {warning}", to=sys.stderr)
    if not options.quiet:
        written = size_text(result.totals.written)
        say(f"{result.target}: {result.target_format}, written {written} in {result.seconds:.3f} s")
    return 0


VERB = Verb(
    "Makes an image of an empty disk, alone or as a layer on another image. It is read back before it appears\n"
    "under its name.",
    _configure,
    _run,
    """exit status:
  0  made
  1  the storage does not allow it; nothing was created
  2  the request makes no sense: an unknown format, option or size
  4  FILE exists; nothing was touched

examples:
  vmconv create disk.qcow2 10G
  vmconv create -o subformat=fixed disk.vhd 127M
  vmconv create -b base.qcow2 overlay.qcow2""",
)
