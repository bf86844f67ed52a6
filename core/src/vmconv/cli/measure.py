"""`vmconv measure`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_access, add_format, add_options, add_output, add_parent, add_secret, read_size
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="image of the disk")
    parser.add_argument("--size", type=read_size, metavar="SIZE", help="size of an empty disk, instead of FILE")
    parser.add_argument(
        "-O", dest="target_format", metavar="FMT", default="raw", help="format to measure (default: raw)"
    )
    add_options(parser, "the format")
    add_format(parser)
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="measure this internal snapshot (id or name)")
    add_output(parser)
    add_access(parser)
    add_secret(parser)
    add_parent(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.api import measure
    from vmconv.cli.output import print_json

    found = measure(
        options.target_format,
        options.file,
        size=options.size,
        options=options.options,
        source_format=options.format_f,
        snapshot=options.snapshot,
        force_share=options.force_share,
        allow_external=options.allow_external,
        source_backing_format=options.source_backing_format,
        secrets=options.secrets,
        parents=options.parents,
    )
    if options.output == "json":
        print_json(found.as_json())
        return 0
    print(f"required size: {found.required}")
    print(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
    return 0


VERB = Verb(
    "Tells how many bytes an image of a disk will have, all its files and holes included: as the disk is now, and\n"
    "with all of it allocated. It is the layout of the writer that convert uses. Nothing is made.",
    _configure,
    _run,
    """exit status:
  0  measured
  1  the format cannot hold the disk, or its size depends on the content
  2  the request makes no sense: an unknown format, option or size

examples:
  vmconv measure -O qcow2 disk.vmdk
  vmconv measure -O vhdx -o block_size=1M --size 100G
  vmconv measure -O qcow2 --output json disk.raw""",
)
