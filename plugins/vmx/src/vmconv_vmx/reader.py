"""Reads a VMX. Every file that it names stays a name: nothing is opened."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmconv.machine import (
    Board,
    Cpu,
    Display,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nvram,
    Tpm,
    guest,
    part,
    quoted,
    refused,
)
from vmconv_vmx import devices, names
from vmconv_vmx.settings import Settings, parse

if TYPE_CHECKING:
    from vmconv.plugin import File

_STATE = (
    r"(host|guest|user)cpuid\..*|.*\.redo|cleanshutdown|softpoweroff|migrate\.hostlog|sched\.swap\.derivedname"
    r"|vmotion\..*|monitor\.phys_bits_used|numa\.autosize\.cookie|replay\..*|vmxstats\.filename|extendedconfigfile"
    r"|toolsinstallmanager\..*|uuid\.location|checkpoint\.vmstate\..*|\.encoding|vm\.createdate|viv\.moid"
    r"|guest(info|os)\.detailed\.data"
)
"""Settings in which VMware records a run or a place. They describe no machine, and VMware writes them again."""


def read(file: File) -> Machine:
    """Returns the machine of a VMX.

    Raises `ImageError` with the key and the value for an encrypted VMX, a value that contradicts its type, and a device
    whose type is unknown.
    """
    settings = parse(file)
    for key in ("encryption.data", "encryption.keySafe", "encryption.bundle"):
        if key in settings:
            raise refused(file, key, "the machine is encrypted", hint="remove the encryption in VMware first")
    settings.drop(_STATE)
    settings.drop_same(names.PLATFORM)
    found: dict[str, Any] = {
        "cpu": _cpu(settings),
        "memory": _memory(settings),
        "firmware": _firmware(settings),
        "board": _board(settings),
        "os": _os(settings),
        "tpm": _tpm(settings),
        "name": _checked(settings, "displayName", "name"),
        "description": _checked(settings, "annotation", "description"),
        "memory_state": _checked(settings, "checkpoint.vmState", "memory_state"),
        "display": _display(settings),
        "usb": _usb(settings),
    }
    found["identity"] = _identity(settings, names.version_of(found["board"].hardware_version))
    found |= devices.read(settings, starts_with_disk=found["firmware"].boot_order[:1] in ((), ("disk",)))
    rest = settings.rest()
    if rest:
        found["extra"] = {"vmx": rest}
    return part(file, "machine", Machine, **found)


def _checked(settings: Settings, key: str, field: str) -> str | None:
    """Returns a text of the machine; raises `ImageError` with its key if the model refuses it."""
    text: str | None = getattr(part(settings.file, key, Machine, **{field: settings.take(key)}), field)
    return text


def _cpu(settings: Settings) -> Cpu:
    """Returns the processors. A virtual processor of VMware is a core: there are no threads.

    VMware writes the count only if there are several.
    """
    count = settings.count("numvcpus", 1, 4096) or 1
    cores = settings.count("cpuid.coresPerSocket", 0, 4096)
    if not cores:
        topology = {}
    elif count % cores:
        raise refused(settings.file, "cpuid.coresPerSocket", f"{cores} does not divide numvcpus, which is {count}")
    else:
        topology = {"sockets": count // cores, "cores": cores, "threads": 1}
    return Cpu(count=count, hot_add=settings.flag("vcpu.hotadd"), **topology)


def _memory(settings: Settings) -> Memory:
    size = settings.count("memsize", 1, 1 << 30)
    return Memory(size=size and size << 20, hot_add=settings.flag("mem.hotadd"))


def _firmware(settings: Settings) -> Firmware:
    """Returns the firmware. A VMX without `firmware` is one of a BIOS machine: VMware writes the key for UEFI only.

    The NVRAM file of a BIOS machine holds CMOS memory and no variables, so it is not taken.
    """
    text = (settings.take("firmware") or "bios").lower()
    if text not in ("bios", "efi"):
        raise refused(settings.file, "firmware", f"{quoted(text)} is not bios or efi")
    file = settings.take("nvram")
    return part(
        settings.file,
        "firmware",
        Firmware,
        kind="uefi" if text == "efi" else "bios",
        secure_boot=settings.flag("uefi.secureBoot.enabled"),
        nvram=part(settings.file, "nvram", Nvram, file=file, kind="vmware") if file and text == "efi" else None,
        boot_order=_boot_order(settings),
    )


def _boot_order(settings: Settings) -> tuple[str, ...]:
    """Returns the classes of `bios.bootOrder`; a list with other words stays a setting."""
    words = [re.sub(r"^(ethernet)\d*$", r"\1", word.strip()) for word in settings.look("bios.bootOrder").split(",")]
    if not all(word in names.BOOT for word in words):
        return ()
    settings.take("bios.bootOrder")
    return tuple(dict.fromkeys(names.BOOT[word] for word in words))


def _board(settings: Settings) -> Board:
    version = settings.count("virtualHW.version", 1, 999)
    utc = settings.look("rtc.diffFromUTC") == "0"
    if utc:
        settings.take("rtc.diffFromUTC")
    return Board(hardware_version=version and f"vmx-{version}", clock="utc" if utc else None)


def _os(settings: Settings) -> GuestOS:
    """Returns the system of `guestOS`. An unknown name stays a setting too, so that a round trip keeps it."""
    text = settings.look("guestOS")
    part(settings.file, "guestOS", GuestOS, source_id=text or None)
    found = guest("vmx", text)
    if found.id or found.architecture:
        settings.take("guestOS")
    return found


def _tpm(settings: Settings) -> Tpm | None:
    """Returns the TPM; VMware has version 2.0 only. Its content is encrypted, so no state file is named."""
    present = settings.flag("vtpm.present")
    software = settings.look("managedVM.autoAddVTPM") == "software"
    return Tpm(version="2.0") if present or software else None


def _display(settings: Settings) -> Display | None:
    present = settings.flag("svga.present")
    memory, heads = settings.count("svga.vramSize", 0, 1 << 40), settings.count("svga.numDisplays", 0, 64)
    if present is False or (present, memory, heads) == (None, None, None):
        return None
    return Display(model="vmware", memory=memory, heads=heads)


def _usb(settings: Settings) -> str | None:
    """Returns the fastest controller: `usb` is UHCI, with `ehci` USB 2, and `usb_xhci` is USB 3."""
    uhci, ehci, xhci = (settings.flag(f"{name}.present") for name in ("usb", "ehci", "usb_xhci"))
    return "xhci" if xhci else "ehci" if ehci else "uhci" if uhci else None


def _identity(settings: Settings, version: int | None) -> Identity:
    shown = _uuid(settings, "uuid.bios")
    seen = UUID(bytes_le=shown.bytes) if shown and (version or 0) >= names.SWAPPED_SINCE else shown
    reflected = settings.look("SMBIOS.reflectHost") in ("true", "yes", "1")
    return part(
        settings.file,
        "identity",
        Identity,
        uuid=seen,
        uuid_text=shown if shown != seen else None,
        instance_uuid=_uuid(settings, "vc.uuid"),
        generation_id=_generation_id(settings),
        serial=serial_of(shown) if shown and not reflected else None,
        asset_tag=settings.take("SMBIOS.assetTag"),
    )


def serial_of(shown: UUID) -> str:
    """Returns the serial number in SMBIOS, which VMware forms of `uuid.bios`."""
    return f"VMware-{spaced(shown)}"


def spaced(uuid: UUID) -> str:
    """Returns a UUID as VMX writes it: `56 4d 96 af e6 46 bd 86-5c 4d 65 4e 77 36 ef 31`."""
    return f"{uuid.bytes[:8].hex(' ')}-{uuid.bytes[8:].hex(' ')}"


def _uuid(settings: Settings, key: str) -> UUID | None:
    text = settings.take(key)
    if text is None:
        return None
    digits = re.sub(r"[\s-]", "", text)
    if not re.fullmatch(r"[0-9A-Fa-f]{32}", digits):
        raise refused(settings.file, key, f"{quoted(text)} is not a UUID of 32 hexadecimal digits")
    return UUID(hex=digits)


def _generation_id(settings: Settings) -> UUID | None:
    """Returns the generation id: two signed numbers of 64 bits, whose little-endian bytes the guest sees.

    virt-v2v, `docs/vm-generation-id-across-hypervisors.txt`, measured it.
    """
    low, high = (settings.count(key, -(1 << 63), (1 << 63) - 1) for key in ("vm.genid", "vm.genidX"))
    if low is None or high is None:
        return None
    return UUID(bytes_le=struct.pack("<qq", low, high))
