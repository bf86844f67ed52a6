"""Options of the VHDX writer; names and values are those of `qemu-img create -o` where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import Identified, Size, option

_MIB = 1 << 20


@dataclass(frozen=True)
class Options(Identified):
    """The options of the VHDX writer. Raises `ValueError` for values that the format does not allow."""

    subformat: Literal["dynamic", "fixed"] = option("dynamic", "dynamic (grows as it is written) or fixed")
    block_size: Size = option(0, "bytes of a block: a power of two from 1M to 256M; 0: 8M to 64M by the disk's size")
    log_size: Size = option(_MIB, "bytes of the log: whole MiB, less than 4G")
    logical_sector_size: Size = option(0, "bytes of a sector for the guest: 512 or 4096; 0: the source's")
    physical_sector_size: Size = option(0, "bytes of a sector of the medium: 512 or 4096; 0: the source's")

    def __post_init__(self) -> None:
        if self.block_size and self.block_size not in (_MIB << power for power in range(9)):
            raise ValueError("a block is a power of two from 1M to 256M")
        if not _MIB <= self.log_size < 4 << 30 or self.log_size % _MIB:
            raise ValueError("the log is whole MiB, less than 4G")
        for name in ("logical_sector_size", "physical_sector_size"):
            if getattr(self, name) not in (0, 512, 4096):
                raise ValueError(f"{name} is 512 or 4096")
