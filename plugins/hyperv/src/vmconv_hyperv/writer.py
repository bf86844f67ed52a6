"""Writes the PowerShell script. It looks for files and switches first, so that it fails before it has made anything."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmconv.machine import Disk, Machine, Removable
from vmconv.plugin import ConfigFile, PlanError
from vmconv_hyperv import keys
from vmconv_hyperv.cmdlets import Value, Variable, command

HEAD = """\
#Requires -Version 5.1
#Requires -Modules Hyper-V
#Requires -RunAsAdministrator
# Makes a virtual machine from the files beside this script, and does not start it.
$ErrorActionPreference = 'Stop'
"""

_VM = Variable("$vm")
_ROOT = Variable("$PSScriptRoot")
_MIB = 1 << 20
_CLASSES = {"disk": "disk", "cdrom": "dvd", "network": "nic"}


class _Bootable(NamedTuple):
    """A device in the boot order of generation 2."""

    kind: str
    order: int | None
    variable: Variable


def write(machine: Machine) -> tuple[ConfigFile, ...]:
    """Returns the script of an adapted machine. Raises `PlanError` for a VHD in generation 2."""
    _refuse_vhd(machine)
    lines = [*_checks(machine), *_base(machine), *_controllers(machine), *_drives(machine), *_nics(machine)]
    lines += _boot(machine)
    text = HEAD + "".join(f"{line}\n" for line in lines)
    # Windows PowerShell takes a script without the mark for one in the system's code page.
    return (ConfigFile("", codecs.BOM_UTF8 + text.encode()),)


def _refuse_vhd(machine: Machine) -> None:
    vhd = next((disk.file for disk in machine.disks if disk.format == "vhd"), None)
    if vhd is not None and machine.firmware.kind == "uefi":
        raise PlanError(f"{vhd}: Hyper-V's generation 2, which has UEFI, takes no VHD", hint="--disk-format vhdx")


def _checks(machine: Machine) -> Iterator[str]:
    for number, disk in enumerate(machine.disks):
        if disk.device is None:
            name = disk.file or f"{keys.file_name(machine.name)}-disk{number + 1}.vhdx"
            yield _assigned(_path(number), command("Join-Path", Path=_ROOT, ChildPath=name))
            if disk.file is not None:
                yield _ignored(command("Get-Item", LiteralPath=_path(number)))
    for network in dict.fromkeys(nic.network for nic in machine.nics if nic.network):
        yield _ignored(command("Get-VMSwitch", Name=network))


def _path(number: int) -> Variable:
    return Variable(f"$path{number}")


def _assigned(variable: Variable, text: str) -> str:
    return f"{variable.name} = {text}"


def _ignored(text: str) -> str:
    return f"$null = {text}"


def _base(machine: Machine) -> Iterator[str]:
    size, uefi = machine.memory.size, machine.firmware.kind == "uefi"
    made = command("New-VM", Name=machine.name, Generation=2 if uefi else 1, MemoryStartupBytes=size, NoVHD=True)
    yield _assigned(_VM, made)
    if machine.description:
        yield command("Set-VM", VM=_VM, Notes=machine.description)
    if machine.cpu.count is not None:
        yield command("Set-VMProcessor", VM=_VM, Count=machine.cpu.count)
    yield _memory(machine)
    if uefi:
        yield _secure_boot(machine)
    if machine.tpm is not None:
        yield command("Set-VMKeyProtector", VM=_VM, NewLocalKeyProtector=True)
        yield command("Enable-VMTPM", VM=_VM)


def _memory(machine: Machine) -> str:
    limits = machine.extra.get("hyperv")
    low, high = ("MinimumBytes", "memory.minimum"), ("MaximumBytes", "memory.maximum")
    more: dict[str, Value] = {name: int(limits[key]) * _MIB for name, key in (low, high)} if limits else {}
    return command("Set-VMMemory", VM=_VM, DynamicMemoryEnabled=bool(limits), StartupBytes=machine.memory.size, **more)


def _secure_boot(machine: Machine) -> str:
    """Returns the command for Secure Boot; keys for Windows do not start other systems."""
    windows = (machine.os.id or "").startswith("win")
    template = "MicrosoftWindows" if windows else "MicrosoftUEFICertificateAuthority"
    if not machine.firmware.secure_boot:
        return command("Set-VMFirmware", VM=_VM, EnableSecureBoot="Off")
    return command("Set-VMFirmware", VM=_VM, EnableSecureBoot="On", SecureBootTemplate=template)


def _controllers(machine: Machine) -> Iterator[str]:
    """Yields commands that remove what New-VM adds by itself, and add SCSI controllers."""
    yield command("Remove-VMNetworkAdapter", VM=_VM)
    for cmdlet, parameter in (("VMDvdDrive", "VMDvdDrive"), ("VMScsiController", "VMScsiController")):
        yield f"{command(f'Get-{cmdlet}', VM=_VM)} | {command(f'Remove-{parameter}')}"
    for controller in machine.controllers:
        if controller.bus == "scsi":
            yield command("Add-VMScsiController", VM=_VM)


def _drives(machine: Machine) -> Iterator[str]:
    for number, disk in enumerate(machine.disks):
        if disk.device is not None:
            # The number of a physical disk is the host's own.
            continue
        if disk.file is None:
            yield _ignored(command("New-VHD", Path=_path(number), SizeBytes=disk.capacity, Dynamic=True))
        yield _assigned(Variable(f"$disk{number}"), _disk(disk, number))
    for number, drive in enumerate(machine.removables):
        yield _assigned(Variable(f"$dvd{number}"), _dvd(drive))


def _disk(disk: Disk, number: int) -> str:
    return command(
        "Add-VMHardDiskDrive",
        VM=_VM,
        ControllerType=(disk.bus or "").upper(),
        ControllerNumber=disk.controller,
        ControllerLocation=disk.unit,
        Path=_path(number),
        Passthru=True,
    )


def _dvd(drive: Removable) -> str:
    place = {"ControllerNumber": drive.controller, "ControllerLocation": drive.unit}
    return command("Add-VMDvdDrive", VM=_VM, **place, Passthru=True)


def _nics(machine: Machine) -> Iterator[str]:
    for number, nic in enumerate(machine.nics):
        added = command(
            "Add-VMNetworkAdapter",
            VM=_VM,
            IsLegacy=True if nic.model == "hyperv-legacy" else None,
            StaticMacAddress=None if nic.mac is None else nic.mac.replace(":", "").upper(),
            SwitchName=nic.network,
            Passthru=True,
        )
        yield _assigned(Variable(f"$nic{number}"), added)


def _boot(machine: Machine) -> Iterator[str]:
    if machine.firmware.kind != "uefi":
        if machine.firmware.boot_order:
            order = tuple(keys.STARTUP[each] for each in machine.firmware.boot_order)
            yield command("Set-VMBios", VM=_VM, StartupOrder=order)
        return
    devices = _ordered(list(_bootable(machine)), machine.firmware.boot_order)
    if devices:
        yield command("Set-VMFirmware", VM=_VM, BootOrder=tuple(each.variable for each in devices))


def _bootable(machine: Machine) -> Iterator[_Bootable]:
    for number, disk in enumerate(machine.disks):
        if disk.device is None:
            yield _Bootable("disk", disk.boot_index, Variable(f"$disk{number}"))
    for number, drive in enumerate(machine.removables):
        yield _Bootable("dvd", drive.boot_index, Variable(f"$dvd{number}"))
    for number, nic in enumerate(machine.nics):
        yield _Bootable("nic", nic.boot_index, Variable(f"$nic{number}"))


def _ordered(devices: Sequence[_Bootable], classes: Sequence[str]) -> list[_Bootable]:
    """Returns the devices with an index in its order, then those of the classes; none if nothing is stated."""
    first = sorted((each for each in devices if each.order is not None), key=lambda each: each.order or 0)
    rest = [each for word in classes for each in devices if each.kind == _CLASSES.get(word) and each.order is None]
    return [*first, *rest]
