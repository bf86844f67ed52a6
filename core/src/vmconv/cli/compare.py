"""`vmconv compare`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import pair
from vmconv.cli.pairs import DIFFERENT, EXIT_STATUS, configure
from vmconv.cli.verbs import Verb


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import as_plain, print_json, size_text
    from vmconv.inspect.comparison import compare_images
    from vmconv.inspect.images import both

    with both(pair(options)) as (left, right):
        found = compare_images(left, right, strict=options.strict)
    if options.output == "json":
        print_json(as_plain(found), indent=4)
    elif not options.quiet:
        # The wording of qemu-img compare.
        if found.sizes[0] != found.sizes[1]:
            print(f"{'Image' if options.strict else 'Warning: Image'} size mismatch!")
        if found.identical:
            print("Images are identical.")
        elif not (options.strict and found.sizes[0] != found.sizes[1]):
            print(f"Content mismatch at offset {found.first_difference}!")
        if found.proved or found.read:
            print(f"{size_text(found.proved)} proved equal by metadata, {size_text(found.read)} read.")
    return 0 if found else DIFFERENT


def _configure(parser: argparse.ArgumentParser) -> None:
    configure(parser)
    parser.add_argument("-s", "--strict", action="store_true", help="treat images of different size as different")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing; the exit status is the answer")


VERB = Verb(
    "Compares what a guest sees of two disks, of any formats. Ranges that share storage are equal without\n"
    "being read; only the rest is read.",
    _configure,
    _run,
    EXIT_STATUS.format(same="identical", different="different"),
)
