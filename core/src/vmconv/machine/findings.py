"""Findings of `vmconv machine check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from vmconv.machine.model import Machine

Level = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One finding: an error keeps the machine from starting, a warning may. `path` is the part of the machine."""

    level: Level
    path: str
    text: str
    hint: str = ""


def first_disk(machine: Machine) -> int | None:
    """Returns the number of the disk that the firmware tries first; None if the machine has no disks."""
    chosen = [(disk.boot_index, number) for number, disk in enumerate(machine.disks) if disk.boot_index is not None]
    return min(chosen)[1] if chosen else 0 if machine.disks else None
