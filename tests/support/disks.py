"""Disks on real storage for the tests, and what a process reads and writes."""

from __future__ import annotations

from pathlib import Path

from vmconv.testing.storage import MIB, QemuImg, make_disk, qemu_io, scribble

__all__ = ["MIB", "QemuImg", "make_disk", "process_io", "qemu_io", "scribble"]


def process_io() -> dict[str, int]:
    """Returns what this process has read and written so far, bytes, by the kernel's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
