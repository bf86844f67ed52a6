"""How a descriptor begins: cheap to import, because every probe asks."""

from __future__ import annotations

import re

_TITLE = re.compile(rb"#\s*disk\s*descriptor\s*file", re.IGNORECASE)
_VERSION = re.compile(rb"version\s*=\s*\d+", re.IGNORECASE)


def is_descriptor(head: bytes) -> bool:
    """True when these are the first bytes of a descriptor: its title, or blank lines, comments and then a version.

    QEMU wants the version and no title, VirtualBox the title; each writes what some of the others' readers refuse.
    """
    for line in map(bytes.strip, head.removeprefix(b"\xef\xbb\xbf").splitlines()):
        if _TITLE.match(line):
            return True
        if line and not line.startswith(b"#"):
            return _VERSION.fullmatch(line) is not None
    return False
