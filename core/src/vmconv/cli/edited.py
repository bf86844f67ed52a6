"""What a command that edits metadata in place prints."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vmconv.cli.output import as_plain, print_json, say, size_text

if TYPE_CHECKING:
    from vmconv.conversion.editing import Edited


def report(result: Edited, options: argparse.Namespace) -> None:
    """Prints the outcome as `--output` and `-q` ask for."""
    if options.output == "json":
        print_json({"event": "result", **as_plain(result)})
        return
    for warning in result.warnings:
        say(f"warning: {warning}", to=sys.stderr)
    if not options.quiet:
        say(f"{result.path}: written {size_text(result.written)}")
