"""`vmconv prove`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vmconv.cli.options import pair
from vmconv.cli.pairs import DIFFERENT, EXIT_STATUS, configure
from vmconv.cli.verbs import Verb

if TYPE_CHECKING:
    from vmconv.inspect.proof import Proof, ProofRow


def _run(options: argparse.Namespace) -> int:
    from vmconv.cli.output import print_json, print_table, size_text
    from vmconv.inspect.images import both
    from vmconv.inspect.proof import prove_images

    with both(pair(options)) as (left, right):
        proof = prove_images(left, right)
        if options.output == "json":
            counts = {"shared": proof.shared, "apart": proof.apart, "unknown": proof.unknown}
            print_json({"proved": bool(proof), **counts, "ranges": [_plain(row) for row in proof.rows()]}, indent=4)
            return 0 if proof else DIFFERENT
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
        from vmconv.errors import counted

        print(f"... and {counted(hidden, 'more range')}, shown by --rows")
    unknown = f", {size_text(proof.unknown)} unknown: the filesystem does not report it" if proof.unknown else ""
    shared, apart = size_text(proof.shared), size_text(proof.apart)
    print(f"{_verdict(proof)}: {shared} at the same physical addresses, {apart} not{unknown}")
    return 0 if proof else DIFFERENT


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


def _configure(parser: argparse.ArgumentParser) -> None:
    configure(parser)
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="ranges to show (default: 20; json: all)")


VERB = Verb(
    "Shows the physical addresses of the payload of two images, from the filesystem's own map (FIEMAP), and\n"
    "whether they are the same. Reads no payload.",
    _configure,
    _run,
    EXIT_STATUS.format(same="all payload is shared", different="some payload is not shared, or cannot be shown to be"),
)
