"""Expresses a machine in the terms of OVF as VMware and VirtualBox read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmconv.machine import Changes
from vmconv.plugin import Adapted, PlanError
from vmconv_ovf import keys
from vmconv_ovf.guest import guest_of, written
from vmconv_ovf.hardware import family, serial_of, uuid_seen
from vmconv_ovf.known import UNKNOWN
from vmconv_ovf.places import settled

if TYPE_CHECKING:
    from vmconv.machine import Cpu, Machine
    from vmconv_ovf.options import Options

_MIB = 1 << 20


class Adapting(Changes):
    """The machine while it is adapted, and its changes."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def replace(self, **values: Any) -> None:
        """Replaces fields of the machine."""
        self.machine = self.machine.model_copy(update=values)


def adapt(machine: Machine, options: Options) -> Adapted:
    """Returns the machine as the writer can store it. Raises `PlanError` for devices that no package can hold."""
    for number, disk in enumerate(machine.disks):
        if disk.device is not None:
            raise PlanError(
                f"disk {number + 1} is the physical device {disk.device!r}, which a package cannot contain",
                hint="remove it from the configuration, or copy it to an image",
            )
    keys_ = [each.key for each in machine.properties]
    if len(set(keys_)) < len(keys_):
        raise PlanError("two properties have the same key, which OVF does not allow")
    changes = Adapting(machine)
    for step in (_name, _os, _cpu, _memory, _tpm, _nvram, settled, _nics, _boot, _rest, _unknown):
        step(changes)
    _hardware(changes, options)
    _identity(changes)
    return Adapted(changes.machine, tuple(changes.found))


def _unknown(changes: Adapting) -> None:
    """Drops what only the source's reader could name."""
    extra = changes.machine.extra.get("ovf", {})
    kept = {key: value for key, value in extra.items() if not key.startswith(UNKNOWN)}
    for key in extra.keys() - kept.keys():
        changes.add("extra.ovf", key, None, "its meaning is not known")
    if kept != extra:
        others = {name: values for name, values in changes.machine.extra.items() if name != "ovf"}
        changes.replace(extra={**others, "ovf": kept} if kept else others)


def _name(changes: Adapting) -> None:
    # The id of a VirtualSystem is required, and stands for a missing name.
    changes.replace(name=changes.machine.name or "machine")


def _os(changes: Adapting) -> None:
    os, extra = changes.machine.os, changes.machine.extra.get("ovf", {})
    found = guest_of(written(os, extra))
    for field in ("id", "architecture"):
        before, after = getattr(os, field), getattr(found, field)
        if before is not None and before != after:
            changes.add(f"os.{field}", before, after, "VMware and CIM have no name of this system alone")
    changes.replace(os=os.model_copy(update={"id": found.id, "architecture": found.architecture}))


def _cpu(changes: Adapting) -> None:
    cpu = changes.machine.cpu
    new = _topology(cpu)
    for field in ("sockets", "cores", "threads"):
        before = getattr(cpu, field)
        if before is not None and before != getattr(new, field):
            changes.add(f"cpu.{field}", before, None, "sockets, cores and threads do not multiply to the processors")
    changes.replace(cpu=new)


def _topology(cpu: Cpu) -> Cpu:
    """Returns processors with a complete topology, or with none."""
    threads = cpu.threads or 1
    count = cpu.count or ((cpu.sockets or 0) * (cpu.cores or 0) * threads) or None
    bare = {"count": count, "sockets": None, "cores": None, "threads": None}
    if count is None or count % threads:
        return cpu.model_copy(update=bare)
    if cpu.sockets is None and cpu.cores is None:
        return cpu.model_copy(update={"count": count})
    sockets = cpu.sockets or count // ((cpu.cores or 1) * threads)
    cores = cpu.cores or count // (sockets * threads)
    if sockets * cores * threads != count:
        return cpu.model_copy(update=bare)
    return cpu.model_copy(update={"count": count, "sockets": sockets, "cores": cores})


def _memory(changes: Adapting) -> None:
    memory = changes.machine.memory
    if memory.size is None or memory.size % _MIB == 0:
        return
    size = -(-memory.size // _MIB) * _MIB
    changes.add("memory.size", memory.size, size, "VMware and virt-v2v count memory in MiB")
    changes.replace(memory=memory.model_copy(update={"size": size}))


def _tpm(changes: Adapting) -> None:
    tpm = changes.machine.tpm
    if tpm is None or tpm.version == "2.0":
        return
    path = "tpm" if tpm.version is None else "tpm.version"
    changes.add(path, tpm.version or "TPM", "2.0", "VMware's virtual TPM has no other version")
    changes.replace(tpm=tpm.model_copy(update={"version": "2.0"}))


def _nvram(changes: Adapting) -> None:
    firmware = changes.machine.firmware
    if firmware.nvram is None or firmware.nvram.kind in ("vmware", "virtualbox"):
        return
    reason = "VMware and VirtualBox cannot read variables of this kind"
    changes.add("firmware.nvram", f"{firmware.nvram.file} ({firmware.nvram.kind})", None, reason)
    changes.replace(firmware=firmware.model_copy(update={"nvram": None}))


def _nics(changes: Adapting) -> None:
    nics = []
    for number, nic in enumerate(changes.machine.nics):
        model = nic.model if nic.model is None or nic.model in keys.WRITTEN_NIC else "e1000"
        if model != nic.model:
            changes.add(f"nics[{number}].model", nic.model, model, f"VMware has no {nic.model}")
        origin = "static" if nic.mac else None
        if nic.mac_origin not in (None, origin):
            reason = (
                "an address in OVF stays as it is" if nic.mac else "importers generate an address that is not stated"
            )
            changes.add(f"nics[{number}].mac_origin", nic.mac_origin, origin, reason)
        nics.append(nic.model_copy(update={"model": model, "mac_origin": origin}))
    changes.replace(nics=tuple(nics))


def _boot(changes: Adapting) -> None:
    """Numbers the devices of the boot order from 0."""
    machine = changes.machine
    groups: dict[str, tuple[Any, ...]] = {
        "disks": machine.disks,
        "removables": machine.removables,
        "nics": machine.nics,
    }
    listed = sorted(
        (device.boot_index, group, number)
        for group, devices in groups.items()
        for number, device in enumerate(devices)
        if device.boot_index is not None
    )
    new: dict[str, list[Any]] = {group: list(devices) for group, devices in groups.items()}
    for rank, (index, group, number) in enumerate(listed):
        if index != rank:
            changes.add(f"{group}[{number}].boot_index", index, rank, "OVF has the order of boot devices, not numbers")
            new[group][number] = new[group][number].model_copy(update={"boot_index": rank})
    changes.replace(**{group: tuple(devices) for group, devices in new.items()})


def _rest(changes: Adapting) -> None:
    sound, display = changes.machine.sound, changes.machine.display
    if sound is not None and sound not in keys.WRITTEN_SOUND:
        changes.add("sound", sound, "hda", "VMware has es1371, hda and sb16")
        changes.replace(sound="hda")
    if display is not None and display.memory is not None and display.memory % 1024:
        size = -(-display.memory // 1024) * 1024
        changes.add("display.memory", display.memory, size, "VMware counts video memory in KiB")
        changes.replace(display=display.model_copy(update={"memory": size}))


def _hardware(changes: Adapting, options: Options) -> None:
    board = changes.machine.board
    number = family(board.hardware_version)
    # vmx-13 is the first with NVMe and Secure Boot, vmx-14 the first with a TPM.
    default = "vmx-14" if changes.machine.tpm else "vmx-13"
    new = options.hardware or (default if number is None else f"vmx-{number:02}")
    if board.hardware_version not in (None, new):
        reason = "chosen by the option" if options.hardware else "VMware's importers take one of their own families"
        changes.add("board.hardware_version", board.hardware_version, new, reason)
    changes.replace(board=board.model_copy(update={"hardware_version": new}))


def _identity(changes: Adapting) -> None:
    machine = changes.machine
    uuid = machine.identity.uuid
    serial = uuid and serial_of(uuid_seen(uuid, family(machine.board.hardware_version)))
    if machine.identity.serial not in (None, serial):
        changes.add("identity.serial", machine.identity.serial, serial, "VMware forms the serial number of the UUID")
    changes.replace(identity=machine.identity.model_copy(update={"serial": serial}))
