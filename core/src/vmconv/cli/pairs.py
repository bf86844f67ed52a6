"""What `compare` and `prove` have in common: two images of one disk."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_access, add_format, add_output, add_parent, add_secret

DIFFERENT, CANNOT_OPEN = 1, 2

EXIT_STATUS = """exit status (as qemu-img compare):
  0  {same}
  1  {different}
  2  an image could not be opened or read"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", metavar="FILE1", help="first image")
    parser.add_argument("right", metavar="FILE2", help="second image")
    add_format(parser, "-f", "FILE1")
    add_format(parser, "-F", "FILE2")
    add_output(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)
    # As in qemu-img compare, 1 means different, so errors are 2.
    parser.set_defaults(error_code=CANNOT_OPEN)
