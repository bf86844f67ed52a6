"""Options of the raw writer; names and values are those of `qemu-img create -o`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option

Preallocation = Literal["off", "falloc", "full"]


@dataclass(frozen=True)
class Options:
    """The options of the raw writer."""

    preallocation: Preallocation = option("off", "falloc: allocate the space of holes; full: write zeros into them")
