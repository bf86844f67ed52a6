"""Persistent bitmaps of qcow2, as QEMU has them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from support.daemons import running


def served(path: Path, name: str, where: Path) -> list[tuple[int, int]]:
    """Returns the `(start, end)` ranges of a bitmap from QEMU."""
    nbd = f"driver=nbd,server.type=unix,server.path={where},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    # The file is free again when the server has ended.
    with running(["qemu-nbd", "-r", "-t", "-B", name, "-f", "qcow2", "-k", where, path], where):
        done = subprocess.run(
            ["qemu-img", "map", "--output=json", "--image-opts", nbd], check=True, capture_output=True
        )
    return [(row["start"], row["start"] + row["length"]) for row in json.loads(done.stdout) if not row["data"]]
