"""The options of views that can be written to."""

from __future__ import annotations

import argparse

from vmconv.plugin import UsageError

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


def refuse_contradictions(options: argparse.Namespace, files: int) -> None:
    """Raises `UsageError` for options of a writable view that make no sense."""
    if not options.writable:
        for name in ("overlay", "commit", "discard"):
            if getattr(options, name):
                raise UsageError(f"--{name} needs --writable")
    elif options.parents:
        hint = "vmconv rebase -u stores the name of a parent that was moved"
        raise UsageError("--parent: a layer to write to needs the layers below where they say", hint=hint)
    elif options.overlay and files > 1:
        raise UsageError("--overlay names one layer, for one FILE")
