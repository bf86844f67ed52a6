"""Machines of the toy format, with disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import vmconv

from .disks import MIB, make_disk


def machine(directory: Path, **changes: Any) -> Path:
    """Makes a machine with three disks in three formats, and returns its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = make_disk(directory / "system.raw", 4 * MIB)
    for name in ("data.qcow2", "old.vmdk"):
        vmconv.convert(raw, directory / name)
    disks = [{"file": name} for name in ("system.raw", "data.qcow2", "old.vmdk")]
    toy = {"name": "web", "cpu": {"count": 2}, "memory": {"size": 1 << 30}, "disks": disks, **changes}
    config = directory / "web.toy"
    config.write_text(json.dumps({"toy": toy}))
    return config


def names(directory: Path) -> list[str]:
    """Returns the names of the files in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())
