"""Options of the VMDK writer; names and values are those of `qemu-img create -o`, with VMware's vmfs beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import Identified, option

Subformat = Literal[
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "vmfs",
    "streamOptimized",
    "reference",
]
AdapterType = Literal["ide", "buslogic", "lsilogic", "legacyESX", "pvscsi"]

FLAT = {"monolithicFlat": "FLAT", "twoGbMaxExtentFlat": "FLAT", "vmfs": "VMFS"}
"""Subformats with flat extents, and the kind of extent in their descriptors."""

REFERENCE = "reference"
"""The subformat with extents in the source's own files; a name of vmconv's own."""

SPLIT = frozenset({"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"})

MAX_SECTORS = 1 << 37
"""64 TiB: a directory of 2 Mi grain tables."""

SPLIT_SECTORS = 4192256
"""Sectors of each extent of a split disk except the last: 2047 MiB, as in VMware."""

_EXTENT_NAMES = {
    "monolithicFlat": "-flat",
    "vmfs": "-flat",
    "twoGbMaxExtentSparse": "-s{:03d}",
    "twoGbMaxExtentFlat": "-f{:03d}",
}


@dataclass(frozen=True)
class Options(Identified):
    """The options of the VMDK writer. Raises `ValueError` for values that the format does not allow."""

    subformat: Subformat = option(
        "monolithicSparse", "how extents are stored; streamOptimized compresses, reference leaves payload in SOURCE"
    )
    adapter_type: AdapterType | None = option(None, "virtual adapter; by default the source's, or ide")
    hwversion: str = option("4", "version of the virtual hardware")
    toolsversion: str = option("2147483647", "version of VMware's guest tools")
    zeroed_grain: bool = option(False, "on: zeros that hide the parent take no space (not for old readers)")

    def __post_init__(self) -> None:
        for field in ("hwversion", "toolsversion"):
            if not re.fullmatch(r"\d{1,10}", getattr(self, field)):
                raise ValueError(f"{field} is a number")
        if self.zeroed_grain and (self.flat or self.subformat in ("streamOptimized", REFERENCE)):
            raise ValueError(f"zeroed_grain needs sparse extents, {self.subformat} has none")

    @property
    def flat(self) -> bool:
        return self.subformat in FLAT

    @property
    def create_type(self) -> str:
        """The subformat as in descriptors."""
        return "twoGbMaxExtentFlat" if self.subformat == REFERENCE else self.subformat

    @property
    def split(self) -> bool:
        return self.subformat in SPLIT


def extent_names(options: Options, name: str, sectors: int) -> list[str]:
    """Returns the names of the files beside the VMDK `name` with its extents; none if it holds its only extent."""
    pattern = _EXTENT_NAMES.get(options.subformat)
    if pattern is None:
        return []
    count = -(-sectors // SPLIT_SECTORS) if options.split else 1
    stem = name.removesuffix(".vmdk")
    return [f"{stem}{pattern.format(number)}.vmdk" for number in range(1, count + 1)]
