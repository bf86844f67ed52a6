"""File names in packages: percent-encoded references, and names that need no encoding."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmconv.machine import Machine

MAX_NAME = 80
"""Characters of a new name without its suffix, so that a USTAR header (100 bytes) holds it."""


def plain_name(name: str | None) -> str:
    """Returns a file name for a machine with ASCII letters, digits, `.`, `_` and `-` only.

    VirtualBox does not decode references, and VMware does. So new names need no encoding.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name or "")[:MAX_NAME].strip("-.") or "machine"


def encoded(name: str) -> str:
    """Returns a file name as a relative URI reference (RFC 3986)."""
    from urllib.parse import quote

    return quote(name, safe="/._-~()+,@$!'*=&")


def decoded(reference: str) -> str:
    """Returns the file name of a relative reference; bytes that are not UTF-8 become U+FFFD."""
    from urllib.parse import unquote

    return unquote(reference)


def problem_of(reference: str) -> str | None:
    """Returns why a reference names no file of its package, or None."""
    name = decoded(reference)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", reference):
        return "is a URL, and packages with files elsewhere are not supported"
    if not name or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "is not a relative path"
    if ".." in re.split(r"[/\\]", name) or posixpath.normpath(name) in (".", ""):
        return "is outside the package"
    if "\0" in name or "\n" in name:
        return "is not a file name"
    return None


def id_of(machine: Machine) -> str:
    """Returns the `ovf:id` of a machine's VirtualSystem: an XML name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", machine.name or "")[:MAX_NAME]
    return name if re.match(r"[A-Za-z_]", name) else f"vm_{name}"
