"""`vmconv recover`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_trust, as_named
from vmconv.interface.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the source or the target of the conversion, or its journal")
    add_trust(parser, "a journal")


def _run(options: argparse.Namespace) -> int:
    from vmconv.inplace.recovery import recover
    from vmconv.system import signals

    what = {None: "nothing to recover", True: "the conversion is finished", False: "is as it was before the conversion"}
    # A signal would only make another recovery necessary.
    with signals.held():
        done = recover(options.path, trust=options.trust)
        print(f"{as_named(options.path, done.path)}: {what[done.forward]}")
    return 0


COMMAND = Command(
    "recover",
    "take back or finish a conversion in place that was interrupted",
    "Brings the disk back after a conversion in place was killed or the power failed: as it was before, or, when\n"
    "the conversion had got that far, as the complete target.",
    _configure,
    _run,
    """exit status:
  0  the disk is complete
  1  it could not be brought back; the message says why
  2  the request makes no sense""",
)
