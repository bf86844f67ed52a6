"""What a command prints that changes an image where it lies."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vmconv.cli.output import as_plain, print_json, say, size_text

if TYPE_CHECKING:
    from vmconv.conversion.editing import Edited
    from vmconv.syncing.commit import CommitResult
    from vmconv.syncing.rebase import RebaseResult


def report(result: Edited, options: argparse.Namespace) -> None:
    """Prints the outcome of an edit of metadata."""
    print_result(result, options, f"{result.path}: written {size_text(result.written)}")


def print_result(result: Edited | CommitResult | RebaseResult, options: argparse.Namespace, line: str) -> None:
    """Prints a result as `--output` and `-q` ask for; `line` is the result in words."""
    if options.output == "json":
        print_json({"event": "result", **as_plain(result)})
        return
    for warning in result.warnings:
        say(f"warning: {warning}", to=sys.stderr)
    if not options.quiet:
        say(line)
