"""Handing a command over to the real qemu-img, and the record of who answered.

The front end may be installed under the name of the real program. It finds that in PATH without calling itself, and a
process never tries the same program twice: an `exec` keeps the process id.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

NAME = "qemu-img"

REAL = "VMCONV_QEMU_IMG_REAL"
"""Variable with the path of the real qemu-img, instead of the one in PATH."""

LOG = "VMCONV_QEMU_IMG_LOG"
"""Variable with the name of a file that gets a line for each command: who answered it."""

VERBS = "VMCONV_QEMU_IMG_HAND_OVER"
"""Variable with the verbs that are always handed over, separated by commas."""

_TRIED = "VMCONV_QEMU_IMG_TRIED"
"""Variable of the front end itself: process id, and the programs that this process has been."""


# Values may hold two commas for one.
_SECRET = re.compile(r"((?:^|[,.])(?:data|password|cookie)=)(?:[^,]|,,)*")
_AUTHORITY = re.compile(r"(://[^/@:]*:)[^/@]*@")


class NotAnsweredError(Exception):
    """The front end does not answer this command, for the reason given; nothing was changed or printed."""


def find() -> str | None:
    """Returns the path of the real qemu-img; None if only this front end is found."""
    given = os.environ.get(REAL)
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    tried = {os.path.realpath(path) for path in (*_tried(), sys.argv[0])}
    for path in [given] if given else [os.path.join(folder or ".", NAME) for folder in folders]:
        if os.path.isfile(path) and os.access(path, os.X_OK) and os.path.realpath(path) not in tried:
            return path
    return None


def hand_over(arguments: Sequence[str], reason: str, code: int = 1) -> int:
    """Becomes the real qemu-img. Without one, prints the reason and returns `code`."""
    real = find()
    if real is not None:
        note(real, arguments, reason)
        done = os.pathsep.join((*_tried(), sys.argv[0], real))
        os.execve(real, [NAME, *arguments], {**os.environ, _TRIED: f"{os.getpid()}{os.pathsep}{done}"})
    note("nobody", arguments, reason)
    print(f"{NAME}: {reason} (there is no other {NAME} to ask)", file=sys.stderr)
    return code


def _without_secrets(argument: str) -> str:
    """Returns an argument for the log, which others may read: without passphrases."""
    if argument.startswith("json:"):
        return "json:..."
    return _AUTHORITY.sub(r"\1...@", _SECRET.sub(r"\1...", argument))


def _tried() -> list[str]:
    """Returns the programs that this process has been already."""
    number, _, paths = os.environ.get(_TRIED, "").partition(os.pathsep)
    return paths.split(os.pathsep) if paths and number == str(os.getpid()) else []


def note(who: str, arguments: Sequence[str], reason: str = "") -> None:
    """Appends a line to the log: who answers which command, and why not vmconv. A log never fails a command."""
    log = os.environ.get(LOG)
    if not log:
        return
    shown = [_without_secrets(argument) for argument in arguments]
    text = f"{who}: {shlex.join(shown)}{f': {reason}' if reason else ''}"
    with suppress(OSError), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(" ".join(text.splitlines()) + "\n")
