"""Virtual machines as configurations in datastores describe them, read by the installed machine formats.

Configurations are as untrusted as images. Names in them are only looked up in the catalogue, never opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmconv.api import Machine

MAX_DISKS = 100
MAX_NICS = 64
_MAX_TEXT = 255

_OF_MANY_PROGRAMS = (".conf", ".json", ".ps1", ".xml", ".yaml", ".yml")
"""Suffixes under which a file is no machine, and no problem, if no machine format claims its content."""


def suffixes() -> tuple[str, ...]:
    """Returns the suffixes of configurations that this node can read, lower case."""
    from vmconv.api import installed_machines

    machines = installed_machines().machines.values()
    return tuple(suffix for one in machines if one.can_read for suffix in one.suffixes)


def capabilities() -> Mapping[str, Mapping[str, Any]]:
    """Returns the installed machine formats as a record has them."""
    from vmconv.api import installed_machines

    return {
        name: {"title": one.title, "reads": one.can_read, "writes": one.can_write, "disks": one.disk_format}
        for name, one in sorted(installed_machines().machines.items())
    }


def summary(path: str, roots: Iterable[str], disk_of: Callable[[str], str | None]) -> dict[str, Any] | None:
    """Returns what the configuration at `path` states, as fields of a `vm` record; None if it is no machine's.

    `roots` are the directories of files that it may consist of. `disk_of` returns the id of the disk at a path.
    Raises VmconvError if the configuration is damaged.
    """
    from vmconv.api import installed_machines, machine_format_of, machine_info

    external = tuple(roots)
    name = machine_format_of(path, external, confined=True)
    if name is None and path.lower().endswith(_OF_MANY_PROGRAMS):
        return None
    machine = machine_info(path, source_format=name, allow_external=external, force_share=True, confined=True)
    packaged = name is not None and installed_machines().machines[name].is_package
    found: dict[str, Any] = {"format": name, **_facts(machine), "packaged": packaged}
    found["disks"] = list(_disks(machine, os.path.dirname(path), (lambda _path: None) if packaged else disk_of))
    return found


def _facts(machine: Machine) -> dict[str, Any]:
    """Returns the stated fields of a machine without its disks."""
    system = machine.os
    stated = {
        "name": _cut(machine.name),
        "system": _cut(system.source_id or system.id or system.architecture),
        "os": _cut(system.id),
        "memory": machine.memory.size,
        "processors": machine.cpu.count,
        "firmware": machine.firmware.kind,
        "nics": [{"mac": nic.mac or "", "network": _cut(nic.network)} for nic in machine.nics[:MAX_NICS]],
    }
    return {name: value for name, value in stated.items() if value not in (None, "")}


def _disks(machine: Machine, directory: str, disk_of: Callable[[str], str | None]) -> Iterable[dict[str, Any]]:
    for disk in machine.disks[:MAX_DISKS]:
        body: dict[str, Any] = {"name": _cut(disk.file or disk.device)}
        if disk.file and (identifier := disk_of(os.path.join(directory, disk.file))):
            body["disk"] = identifier
        if disk.capacity is not None:
            body["capacity"] = disk.capacity
        yield body


def _cut(text: str | None) -> str:
    return (text or "")[:_MAX_TEXT]
