"""Names of what lies beside a file while it is changed in place, and afterwards; each begins with the file's own."""

from __future__ import annotations

import os

from vmconv.io.directory import NAME_MAX

JOURNAL = ".vmconv-journal"
"""Says how to go back or forward; exists from before the first change until after the last one."""

WORKING = ".vmconv-inplace"
"""The file itself while it is neither one nor the other: nobody finds it by the name that it had or will have."""

UNDO = ".vmconv-undo"
"""What it takes to make the old container again, beside the new one."""

_DIGEST = 8
"""Bytes of the digest that stands for the rest of a name that is too long."""


def beside(name: str, suffix: str) -> str:
    """Returns a name with a suffix; one that would be too long is shortened, and then has a digest of the whole."""
    whole = os.fsencode(name)
    if len(whole) + len(suffix) <= NAME_MAX:
        return name + suffix
    from hashlib import blake2b

    digest = blake2b(whole, digest_size=_DIGEST).hexdigest()
    # A character that is cut in two would be no text any more.
    head = whole[: NAME_MAX - len(suffix) - len(digest) - 1].decode("utf-8", "ignore")
    return f"{head}~{digest}{suffix}"


def is_interrupted(path: str) -> bool:
    """True when the file is being changed in place, or was when its run was stopped."""
    directory, name = os.path.split(path)
    return any(os.path.lexists(os.path.join(directory, beside(name, suffix))) for suffix in (JOURNAL, WORKING))
