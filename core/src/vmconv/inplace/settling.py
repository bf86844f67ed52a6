"""Settles what an interrupted conversion has left of a file, before a command opens it.

The edge of a command decides whether that happens: it gives `settle` to the openers that it makes.
"""

from __future__ import annotations

import os

from vmconv.errors import AccessError, warn
from vmconv.inplace.names import is_interrupted


def settle(path: str) -> None:
    """Takes back or finishes the conversion that has left `path` incomplete; does nothing for any other file.

    Raises AccessError if the file has another name afterwards.
    """
    if is_interrupted(path) or not os.path.lexists(path):
        _settle(path)


def _settle(path: str) -> None:
    from vmconv.backends.targets import finish_set
    from vmconv.inplace.recovery import recover_if_own

    if not os.path.lexists(path) and finish_set(path, trust=False):
        return
    done = recover_if_own(path)
    if done is None:
        return
    what = f"a conversion in place was interrupted, and has been {'finished' if done.forward else 'taken back'}"
    if not os.path.lexists(path):
        raise AccessError(f"{path}: is {done.path} now: {what}")
    # Not a property of the image: the command that met the file says it.
    warn(f"{path}: {what}")
