"""Options of the writers of memory images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmconv.plugin import option


@dataclass(frozen=True)
class ElfOptions:
    """The options of the ELF writer."""

    machine: Literal["source", "x86_64", "aarch64", "riscv64"] = option(
        "source", "processor: x86_64, aarch64 or riscv64; by default that of an ELF core as source, else x86_64"
    )
