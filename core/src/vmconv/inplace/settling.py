"""Recovers a file after an interrupted conversion, before a command opens it.

A command opts in by passing `settle` to its openers.
"""

from __future__ import annotations

import os

from vmconv.errors import AccessError, warn
from vmconv.inplace.names import is_interrupted


def settle(path: str) -> None:
    """Rolls back or completes an interrupted conversion of `path`; does nothing for other files.

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
    what = f"a conversion in place was interrupted, and has been {'completed' if done.forward else 'rolled back'}"
    if not os.path.lexists(path):
        raise AccessError(f"{path}: is {done.path} now: {what}")
    # A warning of the command and not of the image, which is fine now.
    warn(f"{path}: {what}")
