"""What VirtualBox's own element in a descriptor adds to the items: firmware, addresses, boot order, identity.

VirtualBox 7.2 exports network cards without their address and says only here that a machine starts by EFI.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID
from xml.etree.ElementTree import Element

from vmconv.machine import Machine, Nic, Tpm, mac_address, part, quoted
from vmconv_ovf.envelope import Envelope

_BOOT = {"harddisk": "disk", "dvd": "cdrom", "floppy": "floppy", "network": "network"}
_TPM = {"v1_2": "1.2", "v2_0": "2.0"}
_CHIPSETS = {"piix3": "i440fx", "ich9": "q35"}
_ADAPTERS = {
    "Am79C970A": "pcnet32",
    "Am79C973": "pcnet32",
    "82540EM": "e1000",
    "82543GC": "e1000",
    "82545EM": "e1000",
    "virtio": "virtio",
}
_NETWORKS = {
    "NAT": "nat",
    "BridgedInterface": "bridged",
    "HostOnlyInterface": "host-only",
    "InternalNetwork": "internal",
}
_USB = {"XHCI": "xhci", "EHCI": "ehci", "OHCI": "uhci"}
_SOUND = {"AC97": "ac97", "HDA": "hda", "SB16": "sb16"}
_DMI = {
    "DmiSystemSerial": "serial",
    "DmiBoardSerial": "board_serial",
    "DmiChassisSerial": "chassis_serial",
    "DmiSystemVendor": "manufacturer",
    "DmiSystemProduct": "product",
    "DmiChassisAssetTag": "asset_tag",
}


def merged(envelope: Envelope, machine: Machine, vbox: Element) -> Machine:
    """Returns the machine with the fields that only VirtualBox's element states."""
    hardware = _child(vbox, "Hardware")
    if hardware is None:
        return machine
    changes: dict[str, Any] = {
        "firmware": _firmware(envelope, machine, hardware),
        "identity": _identity(envelope, machine, vbox, hardware),
        "nics": _nics(envelope, machine, hardware),
        "board": _board(machine, hardware),
        "sound": _sound(machine, hardware),
        "usb": _usb(machine, hardware),
        "tpm": machine.tpm or _tpm(hardware),
    }
    return machine.model_copy(update=changes)


def _child(parent: Element | None, name: str) -> Element | None:
    return next((each for each in parent if _local(each) == name), None) if parent is not None else None


def _local(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _get(parent: Element, name: str, attribute: str) -> str | None:
    found = _child(parent, name)
    return None if found is None else found.get(attribute)


def _firmware(envelope: Envelope, machine: Machine, hardware: Element) -> Any:
    text = _get(hardware, "Firmware", "type")
    # VirtualBox writes the element only for firmware other than its default, BIOS.
    kind = "bios" if text is None or text.upper() == "BIOS" else "uefi"
    if text is not None and not text.upper().startswith(("BIOS", "EFI")):
        raise envelope.refused("vbox:Machine Firmware", f"type {quoted(text)} is neither BIOS nor EFI")
    if machine.firmware.kind not in (None, kind):
        raise envelope.refused("vbox:Machine Firmware", f"is {kind}, vmw:Config has {machine.firmware.kind}")
    orders = _child(hardware, "Boot")
    listed = sorted(orders, key=lambda each: each.get("position", "")) if orders is not None else []
    classes: list[Any] = [_BOOT[name] for each in listed if (name := each.get("device", "").lower()) in _BOOT]
    order = machine.firmware.boot_order or tuple(dict.fromkeys(classes))
    return machine.firmware.model_copy(update={"kind": kind, "boot_order": order})


def _identity(envelope: Envelope, machine: Machine, vbox: Element, hardware: Element) -> Any:
    """Returns the identity: the UUID of the hardware, else that of the machine, and SMBIOS texts."""
    found: dict[str, Any] = {}
    text = hardware.get("uuid") or vbox.get("uuid")
    if text and machine.identity.uuid is None:
        try:
            stated = UUID(text.strip("{}"))
        except ValueError:
            raise envelope.refused("vbox:Machine Hardware uuid", f"{quoted(text)} is not a UUID") from None
        bios = _child(hardware, "BIOS")
        little = bios is not None and _get(bios, "SmbiosUuidLittleEndian", "enabled") == "true"
        # Without the setting, as in machines of VirtualBox before 5.2, the table has the bytes in the text's order.
        seen = stated if little else UUID(bytes_le=stated.bytes)
        found = {"uuid": seen, "uuid_text": stated if stated != seen else None}
    for item in _child(vbox, "ExtraData") or ():
        key, value = item.get("name", "").rpartition("/")[2], item.get("value", "").removeprefix("string:").strip()
        if key in _DMI and value:
            found[_DMI[key]] = value
    kept = {name: value for name, value in machine.identity if value is not None}
    return part(envelope.file, "vbox:Machine", type(machine.identity), **{**found, **kept})


def _nics(envelope: Envelope, machine: Machine, hardware: Element) -> tuple[Nic, ...]:
    """Returns the network cards with what the adapters state, which are in the order of the items."""
    adapters = [each for each in _child(hardware, "Network") or () if each.get("enabled") == "true"]
    adapters.sort(key=lambda each: int(each.get("slot", "")) if each.get("slot", "").isdecimal() else 0)
    if len(adapters) != len(machine.nics):
        return machine.nics
    return tuple(_nic(envelope, nic, adapter) for nic, adapter in zip(machine.nics, adapters, strict=True))


def _nic(envelope: Envelope, nic: Nic, adapter: Element) -> Nic:
    where = f"vbox:Machine Adapter {quoted(adapter.get('slot', ''))}"
    address = adapter.get("MACAddress")
    kinds = [_NETWORKS[_local(each)] for each in adapter if _local(each) in _NETWORKS]
    changes: dict[str, Any] = {"network_kind": kinds[0] if kinds else None}
    if nic.mac is None and address:
        changes["mac"] = mac_address(envelope.file, where, address)
    # The item has "E1000" for all cards that it has no word for.
    if model := _ADAPTERS.get(adapter.get("type", "")):
        changes["model"] = model
    return nic.model_copy(update=changes)


def _board(machine: Machine, hardware: Element) -> Any:
    clock = {"UTC": "utc", "local": "localtime"}.get(_get(hardware, "RTC", "localOrUTC") or "")
    chipset = _CHIPSETS.get((_get(hardware, "Chipset", "type") or "").lower())
    return machine.board.model_copy(update={"clock": clock, "chipset": chipset})


def _sound(machine: Machine, hardware: Element) -> str | None:
    """Returns the sound card: the item says `ensoniq1371` whatever the card is."""
    adapter = _child(hardware, "AudioAdapter")
    if adapter is None or machine.sound is None:
        return machine.sound
    # AC97 is the default, which is not written.
    return _SOUND.get(adapter.get("controller", "AC97"), machine.sound)


def _usb(machine: Machine, hardware: Element) -> str | None:
    controllers = _child(_child(hardware, "USB"), "Controllers")
    found = {_USB.get(each.get("type", "")) for each in controllers} if controllers is not None else set()
    return next((speed for speed in ("xhci", "ehci", "uhci") if speed in found), machine.usb)


def _tpm(hardware: Element) -> Tpm | None:
    text = _get(hardware, "TrustedPlatformModule", "type")
    if text is None or text == "None":
        return None
    # "Host" and "Swtpm" pass another TPM through, whose version is not stated.
    return Tpm(version=_TPM.get(text))
