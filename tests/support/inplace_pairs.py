"""Sources and targets of conversions in place, as real files made by vmconv and by QEMU, and which go together."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import vmconv
from support.variants import QEMU_NAMES
from vmconv.io.registry import installed

NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


class Places(IntEnum):
    """Where a source has its payload, and where a target can have it; a target takes what is at least as orderly."""

    ANYWHERE = 0
    WHOLE_MIB = 1
    AS_THE_GUEST = 2


class Source(NamedTuple):
    """An image to convert: its format, who makes it of a raw disk, and with which options."""

    format: str
    maker: str
    options: Mapping[str, str] = NO_OPTIONS
    places: Places = Places.ANYWHERE
    in_order: bool = True
    """Whether its payload is whole blocks of the filesystem, in the order of the guest: then they can be shifted."""

    def __str__(self) -> str:
        return "-".join([self.format, *self.options.values(), self.maker])

    def make(self, raw: Path, directory: Path) -> Path:
        """Returns the image of a raw disk, the only image in the directory."""
        path = directory / f"disk{suffix(self.format)}"
        if self.maker == "cp":
            shutil.copy(raw, path)
        elif self.maker == "qemu":
            chosen = ",".join(f"{key}={value}" for key, value in self.options.items())
            wish = ["-o", chosen] if chosen else []
            name = QEMU_NAMES.get(self.format, self.format)
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", name, *wish, raw, path], check=True)
        else:
            vmconv.convert(str(raw), str(path), source_format="raw", target_format=self.format, options=self.options)
        return path


class Target(NamedTuple):
    """What to make of it."""

    format: str
    options: Mapping[str, str] = NO_OPTIONS
    places: Places = Places.ANYWHERE

    def __str__(self) -> str:
        return "-".join([self.format, *self.options.values()])

    @property
    def name(self) -> str:
        return f"new{suffix(self.format)}"


def suffix(format_name: str) -> str:
    return installed().formats[format_name].suffixes[0]


SOURCES = (
    Source("raw", "cp", places=Places.AS_THE_GUEST),
    Source("qcow2", "qemu"),
    Source("qcow2", "qemu", {"cluster_size": "512"}, in_order=False),
    Source("vmdk", "qemu"),
    Source("vmdk", "vmconv"),
    Source("vmdk", "qemu", {"subformat": "monolithicFlat"}, places=Places.AS_THE_GUEST),
    Source("vhdx", "qemu", {"block_size": "1048576"}, places=Places.WHOLE_MIB),
    Source("vhd", "qemu", {"force_size": "on"}, in_order=False),
    Source("vhd", "vmconv"),
    Source("vhd", "qemu", {"subformat": "fixed", "force_size": "on"}, places=Places.AS_THE_GUEST),
    Source("vdi", "qemu", in_order=False),
    Source("vdi", "vmconv", places=Places.WHOLE_MIB),
    Source("parallels", "qemu", places=Places.WHOLE_MIB),
    Source("qed", "qemu"),
)

TARGETS = (
    Target("qcow2"),
    Target("vmdk"),
    Target("vhdx", places=Places.WHOLE_MIB),
    Target("parallels", places=Places.WHOLE_MIB),
    Target("vmdk", {"subformat": "monolithicFlat"}, places=Places.AS_THE_GUEST),
    Target("vhd", {"subformat": "fixed"}, places=Places.AS_THE_GUEST),
    Target("raw", places=Places.AS_THE_GUEST),
)

REFUSED = frozenset({("qcow2-512-qemu", "vmdk")})
"""Pairs that cannot be done although one would think so: no VMDK has grains of 512 bytes."""


def pairs() -> Iterator[tuple[Source, Target]]:
    """Yields each pair that can be converted in place."""
    for source in SOURCES:
        for target in TARGETS:
            if source.places >= target.places and (str(source), str(target)) not in REFUSED:
                yield source, target


DEPENDS = frozenset((name, "parallels") for name in ("qcow2-qemu", "vmdk-qemu", "vmdk-vmconv", "qed-qemu"))
"""Pairs that can be shifted or not, as the disk is: its payload, in clusters of 1 MiB, may come in another order."""


def shifted_pairs() -> Iterator[tuple[Source, Target]]:
    """Yields each pair that can be converted by shifting payload inside the file, on ext4 and XFS."""
    for source in SOURCES:
        for target in TARGETS:
            if source.in_order and source.places < target.places and (str(source), str(target)) not in DEPENDS:
                yield source, target


def other_pairs() -> Iterator[tuple[Source, Target]]:
    """Yields each pair that cannot be converted in place."""
    possible = {*map(str, pairs()), *map(str, shifted_pairs())}
    for source in SOURCES:
        for target in TARGETS:
            if str((source, target)) not in possible and (str(source), str(target)) not in DEPENDS:
                yield source, target
