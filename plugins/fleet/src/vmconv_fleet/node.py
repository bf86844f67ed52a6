"""`vmconv node`."""

from __future__ import annotations

import argparse

from vmconv.cli.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_subparsers(dest="action", metavar="ACTION", required=True)


def _run(options: argparse.Namespace) -> int:
    run: int = options.act(options)
    return run


COMMAND = Command(
    name="node",
    help="make this machine a node of a fleet",
    description="Makes a directory a node of a fleet, and runs it.",
    configure=_configure,
    run=_run,
)
