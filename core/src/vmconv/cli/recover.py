"""`vmconv recover`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_trust, as_named
from vmconv.cli.output import say
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the source or the target of the conversion, or its journal")
    add_trust(parser, "a journal")


def _run(options: argparse.Namespace) -> int:
    from vmconv.inplace.group import recover
    from vmconv.system import signals

    what = {None: "nothing to recover", True: "the conversion is finished", False: "is as it was before the conversion"}
    # A signal in the middle would only require another recovery.
    with signals.held():
        done = recover(options.path, trust=options.trust)
        say(f"{as_named(options.path, done.path)}: {what[done.forward]}")
    return 0


VERB = Verb(
    "Restores the disk after a conversion in place was killed or the power failed: to its old state, or, after the\n"
    "commit, to the complete target.",
    _configure,
    _run,
    """exit status:
  0  the disk is complete
  1  the disk could not be restored; the message says why
  2  the request makes no sense""",
)
