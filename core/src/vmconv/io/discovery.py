"""Finds the entry points of installed distributions, as the packaging specifications lay them down on disk.

`importlib.metadata` does this for every purpose and takes 40 ms for it, a quarter of a conversion, half of that for
importing e-mail and archives. Here only what vmconv needs is read: of each distribution whether it has our group.
Distributions inside archives are not found. (Specification: PyPA, "Entry points" and "Recording installed projects".)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

_METADATA = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}

# What Python cannot import from either. With any other error plugins would go missing without a word.
_NOT_THERE = (FileNotFoundError, NotADirectoryError, PermissionError)


class Plugin(NamedTuple):
    """One entry point: the distribution it is from, that one's version, and the module that it names."""

    distribution: str
    version: str
    module: str


def entry_points(group: str) -> list[Plugin]:
    """Returns the entry points of a group by distribution; of two of one name the first on `sys.path` counts."""
    found: dict[str, list[Plugin]] = {}
    for directory in _distributions():
        text = _read(os.path.join(directory, "entry_points.txt"))
        if f"[{group}]" not in text:
            continue
        name, version = _identity(directory)
        found.setdefault(name, [Plugin(name, version, module) for module in _modules(text, group)])
    return [plugin for name in sorted(found) for plugin in found[name]]


def _distributions() -> Iterator[str]:
    for path in dict.fromkeys(sys.path):
        try:
            names = os.listdir(path or ".")
        except _NOT_THERE:
            # An entry of sys.path may be an archive, or nothing at all.
            continue
        yield from (os.path.join(path, name) for name in names if name.endswith(tuple(_METADATA)))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except _NOT_THERE:
        return ""


def _identity(directory: str) -> tuple[str, str]:
    """Returns name and version from the header of the distribution's metadata, or else from the directory's name."""
    stem, suffix = os.path.splitext(os.path.basename(directory))
    name, _, version = stem.partition("-")
    fields = {"Name": name.replace("_", "-"), "Version": version}
    for line in _read(os.path.join(directory, _METADATA[suffix])).splitlines():
        key, colon, value = line.partition(":")
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
