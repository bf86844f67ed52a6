"""PowerShell that makes a machine: a fixed list of cmdlets and parameters, and quoting.

Checked against Microsoft's reference of the module Hyper-V for Windows Server 2022. No parameter forces anything. No
cmdlet starts, stops or removes a machine.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CMDLETS: dict[str, frozenset[str]] = {
    "Join-Path": frozenset({"Path", "ChildPath"}),
    "Get-Item": frozenset({"LiteralPath"}),
    "Get-VMSwitch": frozenset({"Name"}),
    "New-VM": frozenset({"Name", "Generation", "MemoryStartupBytes", "NoVHD"}),
    "Set-VM": frozenset({"VM", "Notes"}),
    "Set-VMProcessor": frozenset({"VM", "Count"}),
    "Set-VMMemory": frozenset({"VM", "DynamicMemoryEnabled", "StartupBytes", "MinimumBytes", "MaximumBytes"}),
    "Set-VMFirmware": frozenset({"VM", "EnableSecureBoot", "SecureBootTemplate", "BootOrder"}),
    "Set-VMBios": frozenset({"VM", "StartupOrder"}),
    "Set-VMKeyProtector": frozenset({"VM", "NewLocalKeyProtector"}),
    "Enable-VMTPM": frozenset({"VM"}),
    "New-VHD": frozenset({"Path", "SizeBytes", "Dynamic"}),
    "Get-VMScsiController": frozenset({"VM"}),
    "Remove-VMScsiController": frozenset({"VMScsiController"}),
    "Add-VMScsiController": frozenset({"VM"}),
    "Get-VMDvdDrive": frozenset({"VM"}),
    "Remove-VMDvdDrive": frozenset({"VMDvdDrive"}),
    "Remove-VMNetworkAdapter": frozenset({"VM"}),
    "Add-VMHardDiskDrive": frozenset(
        {"VM", "ControllerType", "ControllerNumber", "ControllerLocation", "Path", "Passthru"}
    ),
    "Add-VMDvdDrive": frozenset({"VM", "ControllerNumber", "ControllerLocation", "Passthru"}),
    "Add-VMNetworkAdapter": frozenset({"VM", "IsLegacy", "StaticMacAddress", "SwitchName", "Passthru"}),
}
"""All cmdlets that a script may use, each with its parameters."""

_SWITCHES = frozenset({"NoVHD", "NewLocalKeyProtector", "Dynamic", "Passthru"})

_QUOTES = re.compile("['\u2018\u2019\u201a\u201b]")
"""Characters that end a single-quoted string; PowerShell takes typographic quotes for the plain one."""

_VARIABLE = re.compile(r"\$[A-Za-z][A-Za-z0-9]*")


class Variable(NamedTuple):
    """A variable of the script; `name` has its dollar sign."""

    name: str


Value = str | int | bool | Variable | tuple["str | Variable", ...]


def quote(text: str) -> str:
    """Returns a verbatim string: nothing in it has a meaning but quotes, which are doubled."""
    return f"'{_QUOTES.sub(lambda found: found[0] * 2, text)}'"


def literal(value: Value) -> str:
    """Returns a value in PowerShell."""
    if isinstance(value, Variable):
        if not _VARIABLE.fullmatch(value.name):
            raise ValueError(f"{value.name!r} is no variable")
        return value.name
    if isinstance(value, tuple):
        return ", ".join(map(literal, value))
    if isinstance(value, bool):
        return "$true" if value else "$false"
    return quote(value) if isinstance(value, str) else str(value)


def command(cmdlet: str, **parameters: Value | None) -> str:
    """Returns a command with parameters by name, those that are None left out; switches are given as True.

    Raises `ValueError` for a cmdlet or parameter that is not in the list.
    """
    unknown = parameters.keys() - CMDLETS.get(cmdlet, frozenset())
    if cmdlet not in CMDLETS or unknown:
        raise ValueError(f"{cmdlet} with {sorted(unknown)} is not in the list")
    words = [cmdlet]
    for name, value in parameters.items():
        if name in _SWITCHES and value:
            words.append(f"-{name}")
        elif value is not None and name not in _SWITCHES:
            words += [f"-{name}", literal(value)]
    return " ".join(words)
