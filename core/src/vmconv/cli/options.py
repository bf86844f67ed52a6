"""Arguments that several commands share; their names are those of qemu-img."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence


class formatter(argparse.RawDescriptionHelpFormatter):  # noqa: N801
    """Help of one width wherever it is shown, with descriptions as they were written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(_columns(), 100))


def _columns() -> int:
    """Returns the columns of the terminal, as `shutil` does, whose import takes longer than the rest of the parser."""
    try:
        return int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns or 100
    except (OSError, ValueError):
        return 100


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=("human", "json"), default="human", help="how to print (default: human)")


def add_format(
    parser: argparse.ArgumentParser, flag: str = "-f", whose: str = "FILE", default: str = "by its suffix and content"
) -> None:
    parser.add_argument(
        flag,
        dest=f"format_{flag.strip('-')}",
        metavar="FMT",
        help=f"format of {whose} (default: {default})",
    )


def add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-external",
        action="append",
        default=[],
        metavar="PATH",
        help="let images refer to files in this tree besides their own directory; may be repeated",
    )
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read images that another process has open for writing"
    )


class SetOptions(argparse.Action):
    """Collects `-o name=value,name=value` into a dictionary; `-o` may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        given = dict(getattr(namespace, self.dest) or {})
        for part in str(values).split(","):
            name, equals, value = part.partition("=")
            if not equals or not name:
                parser.error(f"argument {option_string}: {part!r} is not name=value")
            given[name] = value
        setattr(namespace, self.dest, given)
