"""Expresses a machine in the terms of VMware, with a reason for each change."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from vmconv.machine import Changes, Firmware, Machine, Nic, guest, name_in
from vmconv.plugin import Adapted, PlanError
from vmconv_vmx import names, placing
from vmconv_vmx.reader import serial_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from vmconv_vmx.options import Options

MAX_NICS = 10
HARDWARE = 19
"""The hardware version of new machines: ESXi 7.0 U2 and Workstation 16 have it."""

_OLD_NICS = ("rtl8139", "ne2k", "hyperv-legacy")
_MIB = 1 << 20
_ALIGNMENT = 4 * _MIB
"""VMware refuses a memory size that is no multiple of it."""


def setting(machine: Machine, key: str) -> str:
    """Returns a setting without a field in the model, lower case; empty if there is none."""
    return next(
        (value.lower() for each, value in machine.extra.get("vmx", {}).items() if each.lower() == key.lower()), ""
    )


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine as VMware can have it; raises `PlanError` for more devices than it has places."""
    changes = Changes()
    machine = _hardware(machine, options, changes)
    steps: tuple[Callable[[Machine, Changes], Machine], ...] = (
        _os,
        _cpu,
        _memory,
        _firmware,
        _identity,
        placing.storage,
        _boot,
        _nics,
        _rest,
    )
    for step in steps:
        machine = step(machine, changes)
    return Adapted(machine, tuple(changes.found))


def _with(machine: Machine, name: str, part: BaseModel | tuple[BaseModel, ...]) -> Machine:
    return machine.model_copy(update={name: part})


def _hardware(machine: Machine, options: Options, changes: Changes) -> Machine:
    board = machine.board
    own = names.version_of(board.hardware_version)
    version = options.hardware_version or own or HARDWARE
    reason = "as the option says" if own else "that is no hardware version of VMware"
    board = changes.update(board, "board.", reason, hardware_version=f"vmx-{version}")
    if board.clock == "localtime":
        board = changes.update(board, "board.", "the clock of VMware is that of its host", clock=None)
    return _with(machine, "board", board)


def _os(machine: Machine, changes: Changes) -> Machine:
    """Names the system as VMware does. A name that is VMware's own already is kept."""
    os = machine.os
    known = os == guest("vmx", os.source_id or "") and (os.id or os.architecture)
    own = os.source_id and setting(machine, "guestOS") == os.source_id.lower()
    name = None if known or own else name_in("vmx", os)
    if name is None:
        return machine
    same = guest("vmx", name)
    values = {"id": same.id, "architecture": same.architecture, "source_id": same.source_id}
    return _with(machine, "os", changes.update(os, "os.", f"VMware calls this system {name}", **values))


def _cpu(machine: Machine, changes: Changes) -> Machine:
    cpu = machine.cpu
    if cpu.cores and cpu.threads and cpu.threads > 1:
        values = {"cores": cpu.cores * cpu.threads, "threads": 1}
        cpu = changes.update(cpu, "cpu.", "a virtual processor of VMware is a core", **values)
    count = (cpu.sockets or 0) * (cpu.cores or 0)
    if count and cpu.count in (None, count):
        return _with(machine, "cpu", cpu.model_copy(update={"count": count, "threads": 1}))
    cpu = cpu.model_copy(update={"count": cpu.count or 1})
    reason = "VMware needs sockets x cores to be the number of processors"
    return _with(machine, "cpu", changes.update(cpu, "cpu.", reason, sockets=None, cores=None, threads=None))


def _memory(machine: Machine, changes: Changes) -> Machine:
    size = machine.memory.size
    if size is None or size % _ALIGNMENT == 0:
        return machine
    rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
    return _with(
        machine, "memory", changes.update(machine.memory, "memory.", "VMware needs a multiple of 4 MiB", size=rounded)
    )


def _firmware(machine: Machine, changes: Changes) -> Machine:
    firmware: Firmware = machine.firmware.model_copy(update={"kind": machine.firmware.kind or "bios"})
    if firmware.kind == "bios" and firmware.secure_boot:
        firmware = changes.update(firmware, "firmware.", "a BIOS has no Secure Boot", secure_boot=False)
    return _with(machine, "firmware", firmware)


def _identity(machine: Machine, changes: Changes) -> Machine:
    """Sets what VMware shows for the UUID that the guest reads, and the serial number that follows from it."""
    identity = machine.identity
    shown = shown_uuid(machine)
    text = shown if shown != identity.uuid else None
    identity = changes.update(identity, "identity.", "VMware writes the UUID in another order", uuid_text=text)
    if identity.serial or shown:
        reflected = setting(machine, "SMBIOS.reflectHost") in ("true", "yes", "1")
        serial = serial_of(shown) if shown and not reflected else None
        identity = changes.update(identity, "identity.", "VMware forms the serial number of the UUID", serial=serial)
    return _with(machine, "identity", identity)


def shown_uuid(machine: Machine) -> UUID | None:
    """Returns the UUID as `uuid.bios` has it, for an adapted machine's hardware version."""
    uuid = machine.identity.uuid
    swapped = (names.version_of(machine.board.hardware_version) or 0) >= names.SWAPPED_SINCE
    return UUID(bytes=uuid.bytes_le) if uuid and swapped else uuid


def _boot(machine: Machine, changes: Changes) -> Machine:
    """Orders classes as devices are ordered: VMware starts classes in an order, and one disk before the others."""
    ordered = [(disk.boot_index, "disk") for disk in machine.disks]
    ordered += [(nic.boot_index, "network") for nic in machine.nics]
    ordered += [(drive.boot_index, drive.kind) for drive in machine.removables]
    first = [kind for index, kind in sorted((index, kind) for index, kind in ordered if index is not None)]
    classes = tuple(dict.fromkeys([*first, *machine.firmware.boot_order]))
    firmware = changes.update(machine.firmware, "firmware.", "VMware orders classes of devices", boot_order=classes)
    starts = min(
        (at for at, disk in enumerate(machine.disks) if disk.boot_index is not None),
        key=lambda at: machine.disks[at].boot_index or 0,
        default=0,
    )
    reason = "VMware starts one disk, the first of bios.hddOrder"
    disks = [
        changes.update(disk, f"disks[{at}].", reason, boot_index=0 if at == starts != 0 else None)
        for at, disk in enumerate(machine.disks)
    ]
    # The place of a card or a drive is that of its class.
    placed = [(f"nics[{at}]", nic.boot_index, "network") for at, nic in enumerate(machine.nics)]
    placed += [(f"removables[{at}]", drive.boot_index, drive.kind) for at, drive in enumerate(machine.removables)]
    for path, index, kind in placed:
        if index is not None:
            after = f"{kind}, class {classes.index(kind) + 1} of bios.bootOrder"
            changes.add(f"{path}.boot_index", index, after, "VMware orders classes of devices")
    left = {
        "nics": tuple(nic.model_copy(update={"boot_index": None}) for nic in machine.nics),
        "removables": tuple(drive.model_copy(update={"boot_index": None}) for drive in machine.removables),
    }
    return machine.model_copy(update={"firmware": firmware, "disks": tuple(disks), **left})


def _nics(machine: Machine, changes: Changes) -> Machine:
    if len(machine.nics) > MAX_NICS:
        raise PlanError(f"the machine has {len(machine.nics)} network cards, VMware has at most {MAX_NICS}")
    return _with(
        machine, "nics", tuple(_nic(nic, machine, f"nics[{at}].", changes) for at, nic in enumerate(machine.nics))
    )


def _nic(nic: Nic, machine: Machine, prefix: str, changes: Changes) -> Nic:
    if nic.model and nic.model not in (*names.NICS.values(), "vmxnet2", "vmxnet", "sriov"):
        windows = names.is_windows(machine.os.source_id)
        model = "e1000" if nic.model in _OLD_NICS else names.WINDOWS_NIC if windows else names.OTHER_NIC
        nic = changes.update(nic, prefix, f"VMware has no {nic.model}", model=model)
    if nic.network_kind in ("internal", "none"):
        after = "host-only" if nic.network_kind == "internal" else None
        reason = "VMware's networks are bridged, NAT, host-only or named"
        nic = changes.update(nic, prefix, reason, network_kind=after)
    if nic.pci_slot and not nic.pci_slot.isdecimal():
        nic = changes.update(nic, prefix, placing.OWN_SLOTS, pci_slot=None)
    return _mac(nic, prefix, changes)


def _mac(nic: Nic, prefix: str, changes: Changes) -> Nic:
    """Makes an address static that VMware would not generate, or else it would replace it."""
    if nic.mac is None:
        return changes.update(nic, prefix, "there is no address", mac_origin=None)
    own = nic.mac.startswith(names.GENERATED) or names.is_vpx(nic.mac)
    origin = nic.mac_origin if own and nic.mac_origin else "static"
    return changes.update(
        nic, prefix, "VMware does not generate such addresses, so it keeps a static one", mac_origin=origin
    )


def _rest(machine: Machine, changes: Changes) -> Machine:
    if machine.sound and machine.sound not in names.SOUND.values():
        after = "es1371" if machine.sound == "ac97" else "hda"
        machine = changes.update(machine, "", f"VMware has no {machine.sound}", sound=after)
    if machine.display:
        display = changes.update(machine.display, "display.", "VMware has one graphics card", model="vmware")
        machine = _with(machine, "display", display)
    serials = [
        changes.update(port, f"serials[{at}].", "VMware has no such serial port", kind=None)
        if port.kind not in (None, *names.SERIAL.values())
        else port
        for at, port in enumerate(machine.serials)
    ]
    return _with(machine, "serials", tuple(serials))
