"""Names of what lies beside a file while it is changed in place, and afterwards; each begins with the file's own."""

from __future__ import annotations

import os

from vmconv.errors import AccessError

JOURNAL = ".vmconv-journal"
"""Says how to go back or forward; exists from before the first change until after the last one."""

WORKING = ".vmconv-inplace"
"""The file itself while it is neither one nor the other: nobody finds it by the name that it had or will have."""

UNDO = ".vmconv-undo"
"""What it takes to make the old container again, beside the new one."""


def interrupted(path: str) -> bool:
    """True when the file is being changed in place, or was when its run was stopped."""
    return os.path.lexists(path + JOURNAL) or os.path.lexists(path + WORKING)


def refuse_interrupted(path: str) -> None:
    """Raises `AccessError` when the file is being changed in place, or was when its run was stopped."""
    if interrupted(path):
        raise AccessError(
            f"{path}: a conversion in place is running, or was interrupted", hint=f"vmconv recover {path}"
        )
