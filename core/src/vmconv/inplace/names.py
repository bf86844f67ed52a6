"""Names of the files beside a file that is changed in place: its own name with a suffix."""

from __future__ import annotations

import os

from vmconv.io.directory import NAME_MAX

JOURNAL = ".vmconv-journal"
"""Tells how to roll back or forward; exists from before the first change until after the last one."""

WORKING = ".vmconv-inplace"
"""The file itself during the change, so that nothing opens it by its old or new name."""

UNDO = ".vmconv-undo"
"""The data to restore the old container, beside the new one."""

GROUP = ".vmconv-machine"
"""Beside a new configuration: tells how to turn the disks of its machine back, or to complete it."""

_DIGEST = 8
"""Bytes of the digest that replaces the end of a name that is too long."""


def beside(name: str, suffix: str) -> str:
    """Returns a name with a suffix; a name that is too long is cut and gets a digest of the whole."""
    whole = os.fsencode(name)
    if len(whole) + len(suffix) <= NAME_MAX:
        return name + suffix
    from hashlib import blake2b

    digest = blake2b(whole, digest_size=_DIGEST).hexdigest()
    # "ignore" drops a character that was cut in two.
    head = whole[: NAME_MAX - len(suffix) - len(digest) - 1].decode("utf-8", "ignore")
    return f"{head}~{digest}{suffix}"


def is_interrupted(path: str) -> bool:
    """True if a change in place of the file is running or was interrupted."""
    directory, name = os.path.split(path)
    return any(os.path.lexists(os.path.join(directory, beside(name, suffix))) for suffix in (JOURNAL, WORKING))
