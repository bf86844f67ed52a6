"""Finds entry points and versions of installed distributions.

`importlib.metadata` takes 40 ms, a quarter of a conversion, half of it to import `email` and `zipfile`. This module
looks for one group or name only, and not in archives. Specifications: PyPA, "Entry points", "Recording installed
projects".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from vmconv.errors import PluginError

_METADATA = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}

# Python cannot import from such a path either. Any other error is raised: plugins must not be missing silently.
_NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)


class Plugin(NamedTuple):
    """One entry point: its distribution, the distribution's version, and its module."""

    distribution: str
    version: str
    module: str


def entry_points(group: str) -> list[Plugin]:
    """Returns the entry points of a group, sorted by distribution. The first on `sys.path` hides others of its name."""
    found: dict[str, list[Plugin]] = {}
    for directory in _distributions():
        text = _read(os.path.join(directory, "entry_points.txt"))
        if f"[{group}]" not in text:
            continue
        name, version = _identity(directory)
        found.setdefault(name, [Plugin(name, version, module) for module in _modules(text, group)])
    return [plugin for name in sorted(found) for plugin in found[name]]


def version(distribution: str) -> str:
    """Returns the version of an installed distribution.

    Raises PluginError if it is not installed.
    """
    for directory in _distributions():
        name, found = _identity(directory)
        if _normal(name) == _normal(distribution):
            return found
    raise PluginError(f"distribution {distribution!r} is not installed")


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _distributions() -> Iterator[str]:
    for path in dict.fromkeys(sys.path):
        try:
            names = os.listdir(path or ".")
        except _NOT_THERE:
            # An entry of sys.path may be an archive, or missing.
            continue
        yield from (os.path.join(path, name) for name in names if name.endswith(tuple(_METADATA)))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except _NOT_THERE:
        return ""


def _identity(directory: str) -> tuple[str, str]:
    """Returns name and version from the distribution's metadata, or else from the name of its directory."""
    stem, suffix = os.path.splitext(os.path.basename(directory))
    name, _, version = stem.partition("-")
    fields = {"Name": name.replace("_", "-"), "Version": version}
    for line in _read(os.path.join(directory, _METADATA[suffix])).splitlines():
        key, colon, value = line.partition(":")
        # The header ends at an empty line.
        if not colon:
            break
        if key in fields:
            fields[key] = value.strip()
    return fields["Name"], fields["Version"]


def _modules(text: str, group: str) -> Iterator[str]:
    section = ""
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("["):
            section = line
        elif section == f"[{group}]" and "=" in line and not line.startswith("#"):
            yield line.partition("=")[2].partition("[")[0].strip()
