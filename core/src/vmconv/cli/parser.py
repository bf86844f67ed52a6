"""The parser of the whole command line, built from the installed commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Self


def make_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of the command line.

    With `wanted`, the first word of a command line, only that command has its arguments: those of all commands take
    as long as a conversion's metadata.
    """
    from vmconv.cli.options import Parser, formatter
    from vmconv.io.registry import installed

    parser = Parser(
        prog="vmconv",
        description="Converts virtual machine disks between formats without copying their payload.",
        epilog="vmconv COMMAND --help says more about a command; vmconv formats lists what is installed.",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=_Version())
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error, and the distributions of plugins in it"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    registry = installed()
    found = registry.commands.get(wanted or "")
    for command in [found] if found else registry.commands.values():
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=formatter,
        )
        if wanted not in (None, command.name):
            continue
        try:
            command.configure(sub)
            sub.set_defaults(run=command.run)
        # A broken plugin must not break other commands. argparse exits on some mistakes.
        except (Exception, SystemExit) as exc:
            distribution = registry.owners["command", command.name]
            registry.add_problem(distribution, f"command {command.name!r}", exc)
            sub.set_defaults(run=_broken(command.name, distribution))
    return parser


def _broken(name: str, distribution: str) -> Callable[[argparse.Namespace], int]:
    """Returns the function of a command whose arguments could not be set up; it raises `PluginError`."""
    from vmconv.errors import PluginError

    def run(_options: argparse.Namespace) -> int:
        raise PluginError(f"command {name!r} of {distribution} is broken", hint="vmconv formats says why")

    return run


class _Version(str):
    """The version, looked up on use only."""

    def __new__(cls) -> Self:
        return super().__new__(cls, "%(prog)s")

    def __mod__(self, values: object) -> str:
        from vmconv.io.discovery import version

        return f"vmconv {version('vmconv')}"
