"""Options of the VHD writer; names and values are those of `qemu-img create -o` where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import Identified, option


@dataclass(frozen=True)
class Options(Identified):
    """The options of the VHD writer. Raises `ValueError` for values that the format does not allow."""

    subformat: Literal["dynamic", "fixed"] | None = option(
        None, "dynamic (grows as it is written) or fixed; fixed with azure=on, else dynamic by default"
    )
    force_size: bool = option(True, "off: round the size up to whole cylinders, as Virtual PC needs it")
    azure: bool = option(False, "on: round the size up to whole MiB, as Azure needs it, in a fixed image")

    def __post_init__(self) -> None:
        if self.subformat is None:
            object.__setattr__(self, "subformat", "fixed" if self.azure else "dynamic")
        if self.azure and self.subformat != "fixed":
            raise ValueError("azure=on needs subformat=fixed")
        if self.azure and not self.force_size:
            raise ValueError("azure=on needs force_size=on")
