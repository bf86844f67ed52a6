"""The formats whose images can be malformed."""

from __future__ import annotations

from vmconv.io.registry import installed


def names() -> list[str]:
    """Returns the formats whose images can be malformed: a raw disk may hold anything."""
    return sorted(set(installed().formats) - {"raw"})


def names_with_parents() -> list[str]:
    """Returns the formats whose images name the file of their parent; a VDI has its parent's UUID: see test_vdi."""
    return [name for name in names() if installed().formats[name].supports_backing and name != "vdi"]
