"""Disks on real storage for the tests, and what a process reads and writes."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

QemuImg = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture that runs qemu-img; `ok` are the exit codes that pass."""

MIB = 1 << 20


def make_disk(path: Path, size: int, pieces: int = 20, unit: int = 4096, seed: int = 0) -> Path:
    """Writes a sparse disk with random payload in some pieces of whole units, the first and last unit among them."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        starts = [0, (size - 1) // unit * unit, *(rng.randrange(size) // unit * unit for _ in range(pieces))]
        for start in starts:
            file.seek(start)
            file.write(rng.randbytes(min(rng.randrange(1, 40) * unit, size - start)))
    return path


def qemu_io(image: Path, *commands: str, format_name: str | None = None) -> None:
    """Lets QEMU write to an image."""
    named = ["-f", format_name] if format_name else []
    arguments = [argument for command in commands for argument in ("-c", command)]
    done = subprocess.run(["qemu-io", *named, *arguments, str(image)], capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def scribble(image: Path, size: int, seed: int, count: int = 20, unit: int = 512) -> None:
    """Lets QEMU write, zero and discard at random places of an image."""
    rng = random.Random(seed)
    commands = []
    for _ in range(count):
        offset, length = rng.randrange(size) // unit * unit, rng.randrange(1, 300) * unit
        length = min(length, size - offset)
        what = rng.random()
        if what < 0.2:
            commands.append(f"write -z {offset} {length}")
        elif what < 0.3:
            commands.append(f"discard {offset} {length}")
        else:
            commands.append(f"write -P {rng.randrange(1, 255)} {offset} {length}")
    qemu_io(image, *commands)


def process_io() -> dict[str, int]:
    """Returns what this process has read and written so far, bytes, by the kernel's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
