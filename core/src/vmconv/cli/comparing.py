"""`vmconv compare` and `vmconv prove`: two images of one disk."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmconv.cli.command import Command
from vmconv.cli.options import access, add_access, add_format, add_output

if TYPE_CHECKING:
    from vmconv.image import Image
    from vmconv.proof import Proof, ProofRow

_DIFFERENT, _CANNOT_OPEN = 1, 2


@contextmanager
def _images(options: argparse.Namespace) -> Iterator[tuple[Image, Image]]:
    from vmconv.opener import Opener
    from vmconv.registry import installed

    # An own opener for each: what one image may refer to is not what the other may.
    with (
        Opener(installed(), **access(options)) as left,
        Opener(installed(), **access(options), format_option="-F") as right,
    ):
        yield left.image(options.left, options.format_f), right.image(options.right, options.format_F)


def _run_compare(options: argparse.Namespace) -> int:
    from vmconv.cli.output import as_plain, print_json, size_text
    from vmconv.comparison import compare_images

    with _images(options) as (left, right):
        found = compare_images(left, right, strict=options.strict)
    if options.output == "json":
        print_json(as_plain(found), indent=4)
    elif not options.quiet:
        if found.sizes[0] != found.sizes[1]:
            print(f"{'Image' if options.strict else 'Warning: Image'} size mismatch!")
        if found.identical:
            print("Images are identical.")
        elif not (options.strict and found.sizes[0] != found.sizes[1]):
            print(f"Content mismatch at offset {found.first_difference}!")
        if found.proved or found.read:
            print(f"{size_text(found.proved)} proved equal by metadata, {size_text(found.read)} read.")
    return 0 if found else _DIFFERENT


def _run_prove(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json, print_table, size_text
    from vmconv.proof import prove_images

    with _images(options) as (left, right):
        proof = prove_images(left, right)
        if options.output == "json":
            counts = {"shared": proof.shared, "apart": proof.apart, "unknown": proof.unknown}
            print_json({"proved": bool(proof), **counts, "ranges": [_plain(row) for row in proof.rows()]}, indent=4)
            return 0 if proof else _DIFFERENT
        table = [["GUEST", "LENGTH", f"IN {left.file.name}", f"IN {right.file.name}", ""]]
        hidden = 0
        for row in proof.rows():
            if len(table) > max(0, options.rows):
                hidden += 1
                continue
            places = [_place(row.left, row.has_left), _place(row.right, row.has_right)]
            table.append([f"{row.start:#x}", f"{row.length:#x}", *places, _WORDS[row.same]])
    print_table(table)
    if hidden:
        print(f"... and {hidden} more ranges, --rows shows them")
    unknown = f", {size_text(proof.unknown)} unknown: the filesystem does not tell" if proof.unknown else ""
    shared, apart = size_text(proof.shared), size_text(proof.apart)
    print(f"{_verdict(proof)}: {shared} at the same physical addresses, {apart} not{unknown}")
    return 0 if proof else _DIFFERENT


_WORDS = {True: "same", False: "NOT SHARED", None: "unknown"}


def _verdict(proof: Proof) -> str:
    if proof.apart:
        return "not all payload is shared"
    if proof.unknown:
        return "not known whether all payload is shared"
    return "all payload is shared" if proof.shared else "there is no payload"


def _plain(row: ProofRow) -> dict[str, Any]:
    left, right = row.left_place, row.right_place
    return {
        "start": row.start,
        "length": row.length,
        "left": row.left,
        "right": row.right,
        "has_left": row.has_left,
        "has_right": row.has_right,
        "same": row.same,
        "encoded": bool((left and left.encoded) or (right and right.encoded)),
    }


def _place(address: int | None, has_payload: bool) -> str:
    if not has_payload:
        return "-"
    return "unknown" if address is None else f"{address:#x}"


def _configure_two(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", metavar="FILE1", help="first image")
    parser.add_argument("right", metavar="FILE2", help="second image")
    add_format(parser, "-f", "FILE1")
    add_format(parser, "-F", "FILE2")
    add_output(parser)
    add_access(parser)
    # Different is not an error: the codes of errors begin after it, as qemu-img has them.
    parser.set_defaults(error_code=_CANNOT_OPEN)


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    _configure_two(parser)
    parser.add_argument("-s", "--strict", action="store_true", help="images of different size are different")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing, the exit status says it")


def _configure_prove(parser: argparse.ArgumentParser) -> None:
    _configure_two(parser)
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="ranges to show (default: 20; json: all)")


_EXIT_STATUS = """exit status (as qemu-img compare):
  0  {same}
  1  {different}
  2  an image could not be opened or read"""

COMMANDS = (
    Command(
        "compare",
        "compare what a guest sees of two disks",
        "Compares what a guest sees of two disks, whatever their formats. Ranges that share storage are equal without\n"
        "being read; only the rest is read.",
        _configure_compare,
        _run_compare,
        _EXIT_STATUS.format(same="identical", different="different"),
    ),
    Command(
        "prove",
        "prove by physical addresses that two images share their payload",
        "Shows the physical addresses of the payload of two images, from the filesystem's own map (FIEMAP), and\n"
        "whether they are the same. Reads no payload.",
        _configure_prove,
        _run_prove,
        _EXIT_STATUS.format(
            same="all payload is shared", different="some payload is not shared, or cannot be shown to be"
        ),
    ),
)
