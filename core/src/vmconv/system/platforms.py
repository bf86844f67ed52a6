"""Which systems vmconv runs on."""

from __future__ import annotations

import sys

_HINTS = {
    "win32": "WSL 2 is Linux: install it there",
    "darwin": "use a Linux machine or a Linux guest",
}


def refusal() -> str | None:
    """Returns why vmconv does not run on this system, in one line; None if it does."""
    # A type checker would skip what follows a comparison of `sys.platform` itself.
    system = str(sys.platform)
    if system == "linux":
        return None
    hint = _HINTS.get(system, "use Linux")
    return f"needs Linux: conversions, copies and views do not work on {system}; {hint}"
