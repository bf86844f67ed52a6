"""Options of the VDI writer; the name is that of `qemu-img create -o`."""

from __future__ import annotations

from dataclasses import dataclass

from vmconv.plugin import Identified, option


@dataclass(frozen=True)
class Options(Identified):
    """The options of the VDI writer."""

    static: bool = option(False, "on: every block has its place from the beginning, in the guest's order")
