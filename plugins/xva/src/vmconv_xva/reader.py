"""The machine in an export: the records VM, VBD, VDI, VIF and network of xapi's data model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmconv.machine import (
    Board,
    Cpu,
    Disk,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nic,
    Removable,
    Tpm,
    mac_address,
    number,
    part,
    quoted,
    refused,
)
from vmconv_xva.archive import config_of
from vmconv_xva.records import NULL, Record, Records, size_of, text, texts

if TYPE_CHECKING:
    from vmconv.plugin import File

_MAX_DEVICE = 255
_ORDER = {"c": "disk", "d": "cdrom", "n": "network"}
_OWN_BIOS = {"Xen", "HVM domU", ""}
"""What Xen tells each guest."""


def read(file: File) -> Machine:
    """Returns the machine of an export; raises `ImageError` with the record and the field that is damaged."""
    records = Records.of(file, config_of(file))
    vm = _machine(records)
    disks, removables = _drives(records, vm)
    platform = texts(vm, "platform")
    is_hvm = bool(text(file, vm, "HVM_boot_policy"))
    extra = dict(_extra(records, vm, is_hvm=is_hvm))
    return part(
        file,
        f"ova.xml VM {vm.reference[:40]}",
        Machine,
        name=_line(text(file, vm, "name_label")),
        description=_plain(text(file, vm, "name_description")) or None,
        os=GuestOS(architecture="x86_64", source_id=_line(text(file, vm, "reference_label"))),
        cpu=_cpu(records, vm, platform),
        memory=_memory(records, vm),
        firmware=_firmware(vm, platform, is_hvm=is_hvm),
        tpm=Tpm(version="2.0") if vm.fields.get("VTPMs") else None,
        identity=_identity(records, vm),
        board=Board(chipset="i440fx"),
        disks=disks,
        removables=removables,
        nics=tuple(_nics(records, vm)),
        memory_state=_suspended(records, vm),
        extra={"xva": extra} if extra else {},
    )


def _machine(records: Records) -> Record:
    """Returns the machine's record: snapshots of it are records of the same class."""
    found = [vm for vm in records.of_kind("VM") if text(records.file, vm, "is_a_snapshot") not in ("1", "true")]
    if len(found) != 1:
        names = ", ".join(quoted(text(records.file, vm, "name_label")) for vm in found[:8]) or "none"
        raise refused(records.file, "ova.xml", f"an export has one machine, this one has {names}")
    return found[0]


def _count(records: Records, record: Record, field: str, default: int, most: int) -> int:
    value = text(records.file, record, field)
    return number(
        records.file, f"ova.xml {record.kind} {record.reference[:40]} {field}", value or str(default), 0, most
    )


def _cpu(records: Records, vm: Record, platform: dict[str, str]) -> Cpu:
    most = _count(records, vm, "VCPUs_max", 1, 4096) or 1
    count = min(_count(records, vm, "VCPUs_at_startup", most, 4096) or most, most)
    cores = platform.get("cores-per-socket", "1")
    if not re.fullmatch(r"[1-9]\d{0,3}", cores) or count % int(cores):
        return Cpu(count=count)
    return Cpu(count=count, sockets=count // int(cores), cores=int(cores), threads=1)


def _memory(records: Records, vm: Record) -> Memory:
    most = _count(records, vm, "memory_static_max", 1 << 30, 1 << 50)
    size = _count(records, vm, "memory_dynamic_max", most, 1 << 50) or most
    return part(
        records.file, "ova.xml VM memory_dynamic_max", Memory, size=size or None, max=most if most > size else None
    )


def _firmware(vm: Record, platform: dict[str, str], *, is_hvm: bool) -> Firmware:
    parameters = texts(vm, "HVM_boot_params")
    uefi = parameters.get("firmware") == "uefi"
    secure = {"true": True, "false": False}.get(platform.get("secureboot", "")) if uefi else None
    order = dict.fromkeys(_ORDER[each] for each in parameters.get("order", "") if each in _ORDER) if is_hvm else {}
    return Firmware.model_validate(
        {"kind": "uefi" if uefi else "bios", "secure_boot": secure, "boot_order": tuple(order)}
    )


def _identity(records: Records, vm: Record) -> Identity:
    strings = texts(vm, "bios_strings")
    names = {"manufacturer": "system-manufacturer", "product": "system-product-name", "serial": "system-serial-number"}
    found: dict[str, Any] = {own: _line(strings.get(name, "")) for own, name in names.items()}
    kept = {own: value for own, value in found.items() if value not in _OWN_BIOS}
    uuid = text(records.file, vm, "uuid")
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", uuid):
        raise records.refused(vm, "uuid", f"{quoted(uuid)} is not a UUID")
    return part(records.file, "ova.xml VM bios_strings", Identity, uuid=UUID(uuid), **kept)


def _of(records: Records, kind: str, vm: Record, place: str) -> list[Record]:
    """Returns the devices of a machine, by their numbers."""
    own = [one for one in records.of_kind(kind) if text(records.file, one, "VM") == vm.reference]
    numbered = [(_count(records, one, place, 0, _MAX_DEVICE), one) for one in own]
    seen: set[int] = set()
    for place_of, one in numbered:
        if place_of in seen:
            raise records.refused(one, place, f"{place_of} is there twice")
        seen.add(place_of)
    return [one for _, one in sorted(numbered, key=lambda pair: pair[0])]


def _drives(records: Records, vm: Record) -> tuple[tuple[Disk, ...], tuple[Removable, ...]]:
    disks, removables = [], []
    for vbd in _of(records, "VBD", vm, "userdevice"):
        where = f"ova.xml VBD {vbd.reference[:40]}"
        vdi = records.related(vbd, "VDI", "VDI")
        kind = text(records.file, vbd, "type")
        if kind == "CD":
            file = _line(text(records.file, vdi, "name_label")) if vdi else None
            removables.append(part(records.file, where, Removable, kind="cdrom", file=file, connected=file is not None))
        elif kind == "Disk" and vdi is not None:
            size = size_of(records, vdi)
            shared = text(records.file, vdi, "sharable") in ("1", "true")
            disks.append(
                part(records.file, where, Disk, file=vdi.reference, format="raw", capacity=size, shared=shared or None)
            )
        else:
            raise records.refused(vbd, "type", f"{quoted(kind)} is neither a disk with a VDI nor a CD")
    return tuple(disks), tuple(removables)


def _nics(records: Records, vm: Record) -> Iterator[Nic]:
    for vif in _of(records, "VIF", vm, "device"):
        where = f"ova.xml VIF {vif.reference[:40]}"
        reference = text(records.file, vif, "network")
        network = records.found.get(reference)
        name = text(records.file, network, "name_label") if network and network.kind == "network" else ""
        mac = text(records.file, vif, "MAC")
        generated = text(records.file, vif, "MAC_autogenerated") in ("1", "true")
        yield part(
            records.file,
            where,
            Nic,
            mac=mac_address(records.file, f"{where} MAC", mac) if mac else None,
            mac_origin=("generated" if generated else "static") if mac else None,
            network=_line(name),
            network_kind="bridged",
        )


def _suspended(records: Records, vm: Record) -> str | None:
    state = text(records.file, vm, "suspend_VDI")
    return None if state in NULL or text(records.file, vm, "power_state") != "Suspended" else _line(state)


def _extra(records: Records, vm: Record, *, is_hvm: bool) -> Iterator[tuple[str, str]]:
    """Yields what the model has no place for."""
    if not is_hvm:
        # Its kernel may have no drivers but Xen's, and its disk no boot loader.
        yield "domain_type", "pv"
    variables = texts(vm, "NVRAM").get("EFI-variables")
    if variables:
        yield "NVRAM", f"{len(variables)} characters of EFI variables"
    if records.of_kind("VGPU"):
        yield "VGPUs", str(len(records.of_kind("VGPU")))


def _plain(value: str) -> str:
    return re.sub(r"[^\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", value).strip()


def _line(value: str) -> str | None:
    """Returns one line of text; None for none."""
    return _plain(" ".join(value.split()))[:1024].strip() or None
