"""The beginning of a descriptor. Cheap to import, because every probe uses it."""

from __future__ import annotations

import re

_TITLE = re.compile(rb"#\s*disk\s*descriptor\s*file", re.IGNORECASE)
_VERSION = re.compile(rb"version\s*=\s*\d+", re.IGNORECASE)


def is_descriptor(head: bytes) -> bool:
    """True if these are the first bytes of a descriptor: its title, or blank lines, comments and then a version.

    QEMU requires the version and no title, VirtualBox the title, so each writes descriptors that others refuse.
    """
    for line in map(bytes.strip, head.removeprefix(b"\xef\xbb\xbf").splitlines()):
        if _TITLE.match(line):
            return True
        if line and not line.startswith(b"#"):
            return _VERSION.fullmatch(line) is not None
    return False
