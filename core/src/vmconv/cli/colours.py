"""Colours on terminals. `NO_COLOR` and `TERM=dumb` turn them off, `FORCE_COLOR` turns them on for files and pipes."""

from __future__ import annotations

import os
from typing import TextIO

_CODES = {"error": "1;31", "warning": "33", "hint": "36", "faint": "2", "strong": "1"}


def coloured(stream: TextIO | None) -> bool:
    """Returns whether text for `stream` may have colours (https://no-color.org, https://force-color.org)."""
    if os.environ.get("NO_COLOR") or stream is None:
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM", "dumb") != "dumb" and is_terminal(stream)


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    # A closed stream.
    except ValueError:
        return False


def paint(text: str, style: str, stream: TextIO | None) -> str:
    """Returns text, which is printable already, in a style if `stream` has colours."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if coloured(stream) else text
