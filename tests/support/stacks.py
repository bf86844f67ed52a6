"""Chains of images that QEMU makes at random, and what a guest must read of them: a model that is not vmconv's.

Layers have sizes of their own, and are longer or shorter than what is below them. Each is written, zeroed and resized
before the next is made on it, so a layer that was finished does not change.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import NamedTuple

UNIT = 512
LARGEST = 320
"""Sectors of the largest layer: some clusters, grains and tables of the formats below."""
# How QEMU makes small clusters, so that a small disk has several.
_OPTIONS = {"qcow2": "cluster_size={cluster}", "qed": "cluster_size=4096,table_size=2"}
_BASES = ("raw", "qcow2", "qed", "vmdk", "vdi", "parallels", "vhdx")
_TOPS = ("qcow2", "qcow2", "qed", "vmdk")
SUFFIXES = {"parallels": "hds"}
_RESIZABLE = ("raw", "qcow2", "qed")


class Layer(NamedTuple):
    """`size` bytes for a guest, and what this layer itself says, by address."""

    size: int
    own: dict[int, int]


def reads(layers: list[Layer], address: int) -> int:
    """Returns the byte that a guest reads: the top layer's own, or that of the next; past the end of one, zero."""
    for size, own in layers:
        if address >= size:
            return 0
        if address in own:
            return own[address]
    return 0


def content(layers: list[Layer]) -> bytes:
    """Returns all that a guest reads."""
    return bytes(reads(layers, address) for address in range(layers[0].size))


class Stack(NamedTuple):
    """A chain on storage, the top first: its files, their formats and the model of what they hold."""

    files: list[Path]
    formats: list[str]
    layers: list[Layer]


def make_stack(directory: Path, seed: int) -> Stack:
    """Makes a chain of two to four layers; the same for the same seed."""
    rng = random.Random(seed)
    stack = Stack([], [], [])
    for depth in range(rng.choice((2, 3, 3, 4))):
        size = _base(directory, rng, stack) if not depth else _overlay(directory, depth, rng, stack)
        stack.layers.insert(0, Layer(size, {}))
        _change(rng, stack)
    return stack


def _create(path: Path, kind: str, size: int, rng: random.Random, *backing: str) -> int:
    """Makes an image and returns its size as QEMU has it, bytes."""
    option = _OPTIONS.get(kind, "").format(cluster=rng.choice((512, 4096, 65536)))
    _run("qemu-img", "create", "-q", "-f", kind, *(["-o", option] if option else []), *backing, path, str(size))
    return -(-size // UNIT) * UNIT


def _base(directory: Path, rng: random.Random, stack: Stack) -> int:
    kind = rng.choice(_BASES)
    path = directory / f"layer0.{SUFFIXES.get(kind, kind)}"
    stack.files.insert(0, path)
    stack.formats.insert(0, kind)
    sectors = rng.randint(1, LARGEST)
    if kind != "raw":
        return _create(path, kind, sectors * UNIT, rng)
    # A raw disk may end anywhere; what is missing of its last sector reads as zero.
    path.touch()
    size = sectors * UNIT - rng.choice((0, 0, 1, 100, 511))
    with path.open("wb") as file:
        file.truncate(size)
    return -(-size // UNIT) * UNIT


def _overlay(directory: Path, depth: int, rng: random.Random, stack: Stack) -> int:
    below, kind_below = stack.files[0], stack.formats[0]
    # QEMU puts a VMDK on nothing but a VMDK.
    kind = rng.choice([kind for kind in _TOPS if kind != "vmdk" or kind_below == "vmdk"])
    path = directory / f"layer{depth}.{kind}"
    stack.files.insert(0, path)
    stack.formats.insert(0, kind)
    size = stack.layers[0].size if rng.random() < 0.2 else rng.randint(1, LARGEST) * UNIT
    return _create(path, kind, size, rng, "-b", below.name, "-F", kind_below)


def _change(rng: random.Random, stack: Stack) -> None:
    """Writes, zeroes and resizes the top layer, on storage and in the model."""
    # A base that is full shows wherever a shorter layer above it should hide it.
    if len(stack.layers) == 1 and rng.random() < 0.6:
        _write(rng, stack, whole=True)
    for _ in range(rng.choice((0, 1, 2))):
        _write(rng, stack)
        if rng.random() < 0.3 and stack.formats[0] in _RESIZABLE:
            _resize(rng, stack)


def _write(rng: random.Random, stack: Stack, *, whole: bool = False) -> None:
    path, kind, (size, own) = stack.files[0], stack.formats[0], stack.layers[0]
    commands = []
    for _ in range(1 if whole else rng.randint(1, 4)):
        start = 0 if whole else rng.randrange(size // UNIT) * UNIT
        length = size if whole else min(rng.choice((1, 7, 8, 40, 128)) * UNIT, size - start)
        if kind == "raw" and start + length > path.stat().st_size:
            # A raw disk that ends within a sector is not written to past its end.
            length -= UNIT
        if not length:
            continue
        value = rng.randrange(1, 255) if whole else rng.choice((0, 0, *range(1, 255, 25)))
        # QEMU 7.2 leaves some of what a QED image held under zeros that begin or end inside a cluster.
        what = "write -z" if value == 0 and kind != "qed" else f"write -P {value}"
        commands += ["-c", f"{what} {start} {length}"]
        own.update((address, value) for address in range(start, start + length))
    if commands:
        _run("qemu-io", "-f", kind, *commands, path)


def _resize(rng: random.Random, stack: Stack) -> None:
    size, own = stack.layers[0]
    wanted = rng.randint(1, LARGEST) * UNIT
    arguments = ["qemu-img", "resize", "-q", "-f", stack.formats[0], "--shrink", str(stack.files[0]), str(wanted)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        # QED cannot shrink, nor grow over a longer parent.
        assert stack.formats[0] == "qed", done.stderr
        return
    kept = {address: value for address, value in own.items() if address < wanted}
    # What is added reads as zero, even where a layer below is longer.
    kept.update((address, 0) for address in range(size, wanted))
    stack.layers[0] = Layer(wanted, kept)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout + done.stderr, (command, done.stdout, done.stderr)
