"""Recovers a file after an interrupted conversion, before a command opens it.

A command opts in by passing `settle` to its openers.
"""

from __future__ import annotations

import os

from vmconv.errors import AccessError, warn
from vmconv.inplace.names import GROUP, beside, is_interrupted


def settle(path: str) -> None:
    """Rolls back or completes an interrupted conversion of `path`; does nothing for other files.

    Raises AccessError if the file has another name afterwards.
    """
    directory, name = os.path.split(path)
    if not os.path.lexists(path) or os.path.lexists(os.path.join(directory, beside(name, GROUP))):
        _settle_machine(path)
    if is_interrupted(path) or not os.path.lexists(path):
        _settle(path)


def refuse_interrupted(path: str) -> None:
    """Raises AccessError if a conversion of `path` in place was interrupted; changes nothing."""
    directory, name = os.path.split(path)
    if is_interrupted(path) or os.path.lexists(os.path.join(directory, beside(name, GROUP))):
        raise AccessError(
            f"{path}: a change in place is running or was interrupted", hint="vmconv recover, on its own machine"
        )


def _settle_machine(path: str) -> None:
    """Settles the machine whose disks were being converted in place, if the file is one of them."""
    from vmconv.inplace import group

    done = group.recover_if_own(path)
    if done is None:
        return
    became = "completed" if done.forward else "rolled back"
    what = f"a conversion of a machine in place was interrupted, and has been {became}"
    if not os.path.lexists(path):
        raise AccessError(f"{path}: does not exist: {what}", hint=f"the machine's file is {done.path}")
    warn(f"{path}: {what}")


def _settle(path: str) -> None:
    from vmconv.inplace.recovery import settle_disk

    settle_disk(path)
