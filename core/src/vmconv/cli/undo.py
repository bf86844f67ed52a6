"""`vmconv undo`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_trust, as_named
from vmconv.interface.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the target of a conversion with --in-place --keep-undo")
    add_trust(parser, "an undo file")


def _run(options: argparse.Namespace) -> int:
    from vmconv.inplace.undo import undo

    try:
        path = undo(options.file, trust=options.trust)
    except KeyboardInterrupt as exc:
        results = getattr(exc, "results", ())
        if not results:
            vars(exc)["left"] = "nothing was changed"
            raise
        # The signal came when everything was done.
        path = results[0]
    print(f"{as_named(options.file, path)}: is as it was before the conversion")
    return 0


COMMAND = Command(
    "undo",
    "turn a disk back into what it was converted from in place",
    "Brings the old container back, byte for byte, when it was converted with --keep-undo and nobody has\n"
    "written to the new one since. Payload is not touched.",
    _configure,
    _run,
    """exit status:
  0  the disk is what it was
  1  it cannot be undone; the message says why, and nothing was changed
  2  the request makes no sense""",
)
