"""`vmconv undo`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_output, add_trust, as_named
from vmconv.cli.output import print_json, say
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="what a change with --keep-undo has made, such as a conversion in place"
    )
    add_trust(parser, "an undo file")
    add_output(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.inplace.undo import undo

    try:
        path = undo(options.file, trust=options.trust)
    except KeyboardInterrupt as exc:
        results = getattr(exc, "results", ())
        if not results:
            vars(exc)["left"] = "nothing was changed"
            raise
        # The signal arrived after the commit.
        path = results[0]
    named = as_named(options.file, path)
    if options.output == "json":
        print_json({"event": "result", "path": named, "state": "before"})
    else:
        say(f"{named}: is as it was before the change")
    return 0


VERB = Verb(
    "Restores the old container byte for byte, if it was changed with --keep-undo and the new one was not\n"
    "written to since. Leaves payload in place.",
    _configure,
    _run,
    """exit status:
  0  the disk is restored
  1  it cannot be undone; the message says why, and nothing was changed
  2  the request makes no sense""",
)
