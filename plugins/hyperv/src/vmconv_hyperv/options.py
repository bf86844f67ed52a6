"""Options of the PowerShell script."""

from __future__ import annotations

from dataclasses import dataclass

from vmconv.plugin import option


@dataclass(frozen=True)
class Options:
    switch: str = option("", "virtual switch that all network adapters are connected to; empty: as the machine states")
