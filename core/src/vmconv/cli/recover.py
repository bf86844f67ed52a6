"""`vmconv recover`."""

from __future__ import annotations

import argparse

from vmconv.cli.options import add_output, add_trust, as_named
from vmconv.cli.output import print_json, say
from vmconv.cli.verbs import Verb


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the source or the target of the change, or its journal")
    add_trust(parser, "a journal")
    add_output(parser)


def _run(options: argparse.Namespace) -> int:
    from vmconv.inplace.group import recover
    from vmconv.system import signals

    # A signal in the middle would only require another recovery.
    with signals.held():
        done = recover(options.path, trust=options.trust)
        named, (state, words) = as_named(options.path, done.path), _STATES[done.forward]
        if options.output == "json":
            print_json({"event": "result", "path": named, "state": state})
        else:
            say(f"{named}: {words}")
    return 0


_STATES = {
    None: ("unchanged", "nothing to recover"),
    True: ("after", "the change is complete"),
    False: ("before", "is as it was before the change"),
}


VERB = Verb(
    "Restores the disk after a conversion in place, a resize or another change was killed or the power failed: to its\n"
    "old state, or, after the commit, to the complete target.",
    _configure,
    _run,
    """exit status:
  0  the disk is complete
  1  the disk could not be restored; the message says why
  2  the request makes no sense""",
)
