"""The options of views that can be written to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vmconv.plugin import UsageError, is_url, parse_url

SUFFIX = ".overlay.qcow2"
"""What the default name of a layer has behind that of its image."""


def add_writable(parser: argparse.ArgumentParser) -> None:
    """Adds the options of writable views."""
    parser.add_argument(
        "--writable",
        action="store_true",
        help=f"let clients write; their writes go to a layer on FILE, FILE{SUFFIX}, which is kept and used again",
    )
    parser.add_argument("--overlay", metavar="LAYER", help="the layer for --writable; made if it does not exist")
    end = parser.add_mutually_exclusive_group()
    end.add_argument(
        "--commit", action="store_true", help="bring what was written into FILE at the end, and remove the layer"
    )
    end.add_argument("--discard", action="store_true", help="remove the layer with all that was written at the end")


def refuse_contradictions(options: argparse.Namespace, files: Sequence[str]) -> None:
    """Raises `UsageError` for options of a writable view that make no sense."""
    if not options.writable:
        for name in ("overlay", "commit", "discard"):
            if getattr(options, name):
                raise UsageError(f"--{name} needs --writable")
    elif options.parents:
        hint = "vmconv rebase -u stores the name of a parent that was moved"
        raise UsageError("--parent: a layer to write to needs the layers below where they say", hint=hint)
    elif url := next(filter(is_url, files), None):
        hint = "vmconv convert makes a local image of it"
        raise UsageError(f"{parse_url(url).shown}: a layer to write to is for a local image", hint=hint)
    elif options.overlay and len(files) > 1:
        raise UsageError("--overlay names one layer, for one FILE")
