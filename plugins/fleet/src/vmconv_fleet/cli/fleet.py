"""`vmconv fleet`: the verbs, each with its arguments; what they do is imported when it is done."""

from __future__ import annotations

import argparse

from vmconv.cli.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_subparsers(dest="verb", metavar="VERB", required=True)


def _run(options: argparse.Namespace) -> int:
    run: int = options.act(options)
    return run


COMMAND = Command(
    name="fleet",
    help="see and change a fleet of nodes",
    description="Shows the nodes, disks and conversions of a fleet and asks for changes of them, from any node.",
    configure=_configure,
    run=_run,
)
