"""A machine of QEMU that was never started, and what its monitor writes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.disks import MIB
from support.requirements import oracle_program
from vmconv.testing import random_bytes

LOADED = random_bytes(3 * MIB, 3)
"""What the machine has in its RAM, at `PLACE`."""
PLACE = 32 * MIB


def qemu(folder: Path, *commands: str, memory: str = "64M", machine: str = "pc", at: int = PLACE) -> str:
    """Runs commands of the monitor in a machine that was never started; returns what QEMU printed."""
    (folder / "loaded").write_bytes(LOADED)
    command = [oracle_program("qemu-system-x86_64"), "-S", "-M", machine, "-accel", "tcg", "-m", memory]
    command += ["-nodefaults", "-display", "none", "-monitor", "stdio"]
    command += ["-device", f"loader,file={folder / 'loaded'},addr={at:#x},force-raw=on"]
    said = "".join(f"{each}\n" for each in (*commands, "quit"))
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
