"""Makes the pictures of the documentation: `python docs/pictures.py DIR`, in a directory that can share blocks."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

MIB = 1 << 20


def make(directory: Path) -> dict[str, str]:
    """Makes images in a directory, draws them, and returns the pictures by name."""
    _disk(directory / "web.raw", seed=1, pieces=40)
    _vmconv(directory, "convert", "-q", "web.raw", "web.qcow2")
    _vmconv(directory, "create", "-q", "-b", "web.qcow2", "layer.qcow2")
    _write(directory / "layer.qcow2", seed=2, pieces=12)
    _vmconv(directory, "map", "--picture", "map.svg", "layer.qcow2")
    _vmconv(directory, "plan", "--picture", "plan.svg", "layer.qcow2", "web.vmdk")
    return {name: (directory / name).read_text() for name in ("map.svg", "plan.svg")}


def _disk(path: Path, seed: int, pieces: int) -> None:
    places = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(2048 * MIB)
        for _ in range(pieces):
            file.seek(places.randrange(2000) * MIB)
            file.write(places.randbytes(MIB) * places.randrange(1, 24))


def _write(path: Path, seed: int, pieces: int) -> None:
    places = random.Random(seed)
    commands = [
        f"write -P {number + 1} {places.randrange(1900)}M {places.randrange(1, 48)}M" for number in range(pieces)
    ]
    arguments = [word for command in [*commands, "write -z 900M 100M"] for word in ("-c", command)]
    subprocess.run(["qemu-io", *arguments, path], check=True, stdout=subprocess.DEVNULL)


def _vmconv(directory: Path, *arguments: str) -> None:
    program = os.path.join(os.path.dirname(sys.executable), "vmconv")
    subprocess.run([program, *arguments], cwd=directory, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    kept = Path(__file__).parent / "pictures"
    kept.mkdir(exist_ok=True)
    for name, text in make(Path(sys.argv[1])).items():
        (kept / name).write_text(text)
