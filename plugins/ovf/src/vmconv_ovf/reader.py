"""Reads an OVF descriptor to a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from vmconv.machine import Board, Cpu, Firmware, GuestOS, Identity, Machine, Memory, Nvram, Tpm, part, quoted
from vmconv_ovf import keys, sections
from vmconv_ovf.devices import Devices, flag
from vmconv_ovf.envelope import Envelope, configs
from vmconv_ovf.guest import Kind, guest_of, surplus
from vmconv_ovf.hardware import family, serial_of, uuid_seen
from vmconv_ovf.items import Item, items_of
from vmconv_ovf.known import unknown_settings
from vmconv_ovf.units import bytes_of

if TYPE_CHECKING:
    from vmconv.plugin import File

MAX_SETTINGS = 4096


def read(file: File, data: bytes | None = None) -> Machine:
    """Returns the machine of a descriptor: the whole file, or `data` from it."""
    return _Reader(Envelope(file, data)).machine()


class _Reader:
    """The one virtual machine of an envelope, and the sections that describe it."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.system = sections.only_system(envelope)
        self.properties, self.extra = sections.properties(self.system)
        self.hardware = sections.hardware(self.system)
        values = {each.key: each.value or "" for each in self.properties}
        items = items_of(envelope, self.hardware)
        self.devices = Devices(envelope, items, sections.boot_order(self.system), values)
        self.settings = dict(configs(self.hardware))
        self.more = dict(configs(self.hardware, "ExtraConfig"))

    def machine(self) -> Machine:
        devices = self.devices
        values: dict[str, Any] = {
            "name": self._name(),
            "description": self._description(),
            "os": self._os(),
            "cpu": self._cpu(),
            "memory": self._memory(),
            # VMware's virtual TPM has no other version.
            "tpm": Tpm(version="2.0") if devices.has_tpm() else None,
            "controllers": devices.controllers,
            "disks": devices.disks,
            "removables": devices.removables,
            "nics": devices.nics,
            "display": devices.display(),
            "sound": devices.sound(),
            "serials": devices.serials(),
            "usb": devices.usb(),
            "passthrough": devices.passthrough(),
            "properties": self.properties,
        }
        values["board"] = self._board()
        values["identity"] = self._identity(values["board"])
        values["firmware"] = self._firmware()
        self._keep_rest()
        values["extra"] = {"ovf": self.extra} if self.extra else {}
        made = part(self.envelope.file, "VirtualSystem", Machine, **values)
        vbox = next((each for each in self.system.element if each.tag == f"{{{keys.VBOX}}}Machine"), None)
        if vbox is None:
            return made
        from vmconv_ovf.vbox import merged

        return merged(self.envelope, made, vbox)

    def _name(self) -> str | None:
        return self.envelope.text(self.envelope.child(self.system.element, "Name")) or self.envelope.get(
            self.system.element, "id"
        )

    def _description(self) -> str | None:
        section = self.envelope.child(self.system.element, "AnnotationSection")
        found = None if section is None else self.envelope.child(section, "Annotation")
        return self.envelope.text(found) or None

    def _os(self) -> GuestOS:
        section = self.envelope.child(self.system.element, "OperatingSystemSection")
        if section is None:
            return GuestOS()
        vbox = next((each for each in section if each.tag == f"{{{keys.VBOX}}}OSType"), None)
        stated: dict[Kind, str | None] = {
            "vsphere": section.get(f"{{{keys.VMW}}}osType", "").strip(),
            "vbox": self.envelope.text(vbox),
            "cim": self.envelope.get(section, "id"),
        }
        try:
            found = guest_of(stated)
        except ValueError:
            raise self.envelope.refused("OperatingSystemSection", f"{quoted(stated)} has control characters") from None
        self.extra |= surplus(stated, found)
        return found

    # -- processors, memory, board

    def _only(self, kind: int) -> Item | None:
        items = self.devices.of(kind)
        if len(items) > 1:
            raise self.envelope.refused(items[1].where, f"is a second item with ResourceType {kind}")
        return items[0] if items else None

    def _quantity(self, item: Item, high: int) -> int | None:
        text = item.get("VirtualQuantity") or item.get("Reservation")
        return None if text is None else self.envelope.number(f"{item.where} VirtualQuantity", text, high)

    def _cpu(self) -> Cpu:
        item = self._only(keys.PROCESSOR)
        values: dict[str, Any] = {"hot_add": self._take_flag("cpuHotAddEnabled")}
        if item is None:
            return Cpu(**values)
        values["count"] = count = self._quantity(item, 4096)
        threads = self.settings.pop("simultaneousThreads", None)
        if threads is not None:
            values["threads"] = self.envelope.number("Config simultaneousThreads", threads, 64)
        together = item.get("CoresPerSocket")
        if together is not None:
            per_socket = self.envelope.number(f"{item.where} CoresPerSocket", together, 4096)
            values |= self._topology(item, count, per_socket, values.get("threads") or 1)
        return part(self.envelope.file, item.where, Cpu, **values)

    def _topology(self, item: Item, count: int | None, per_socket: int, threads: int) -> dict[str, int]:
        """Returns sockets and cores: VMware counts virtual processors of a socket, threads among them."""
        if not per_socket or per_socket % threads or (count or 0) % per_socket:
            what = f"CoresPerSocket {per_socket} does not divide {count} processors with {threads} threads per core"
            raise self.envelope.refused(item.where, what)
        found = {"cores": per_socket // threads}
        return found if count is None else {**found, "sockets": count // per_socket}

    def _memory(self) -> Memory:
        item = self._only(keys.MEMORY)
        hot_add = self._take_flag("memoryHotAddEnabled")
        if item is None:
            return Memory(hot_add=hot_add)
        # Readers agree on MiB where the unit is missing, as VMware exported it in OVF 0.9.
        text = item.get("AllocationUnits") or "byte * 2^20"
        unit = bytes_of(text)
        if unit is None:
            raise self.envelope.refused(item.where, f"AllocationUnits {quoted(text)} is no unit of bytes")
        amount = self._quantity(item, 1 << 50)
        size = None if amount is None else amount * unit
        return part(self.envelope.file, item.where, Memory, size=size, hot_add=hot_add)

    def _board(self) -> Board:
        system = self.envelope.child(self.hardware, "System")
        names = [] if system is None else [each for each in system if each.tag.endswith("}VirtualSystemType")]
        words = " ".join(self.envelope.text(each) for each in names).split()
        return part(self.envelope.file, "System", Board, hardware_version=" ".join(words) or None)

    def _identity(self, board: Board) -> Identity:
        text = self.settings.pop("uuid", None)
        if not text:
            return Identity()
        try:
            stated = UUID(text)
        except ValueError:
            raise self.envelope.refused("Config uuid", f"{quoted(text)} is not a UUID") from None
        number = family(board.hardware_version)
        seen = uuid_seen(stated, number)
        serial = None if number is None else serial_of(stated)
        return Identity(uuid=seen, uuid_text=stated if stated != seen else None, serial=serial)

    # -- firmware

    def _take_flag(self, key: str) -> bool | None:
        text = self.settings.pop(key, None)
        return None if not text else flag(self.envelope, f"Config {key}", text)

    def _firmware(self) -> Firmware:
        words = {word.lower() for word in (self.settings.pop("firmware", ""), self.more.pop("firmware", "")) if word}
        if len(words) > 1 or words - {"bios", "efi"}:
            stated = quoted(", ".join(sorted(words)))
            raise self.envelope.refused("Config firmware", f"{stated} is neither bios nor efi")
        kind = {"efi": "uefi", "bios": "bios"}.get("".join(words))
        secure = self._take_flag("bootOptions.efiSecureBootEnabled")
        if secure is None and (text := self.more.pop("uefi.secureBoot.enabled", "")):
            secure = flag(self.envelope, "ExtraConfig uefi.secureBoot.enabled", text)
        return Firmware(kind=kind, secure_boot=secure, nvram=self._nvram(), boot_order=self._boot_classes())

    def _boot_classes(self) -> tuple[str, ...]:
        """Returns the classes of VMware's boot order, if each of its words is known."""
        words = [word.strip().lower() for word in self.more.get("bios.bootOrder", "").split(",")]
        neutral = {word: name for name, word in keys.BOOT_CLASSES.items()}
        if not all(word in neutral for word in words):
            return ()
        del self.more["bios.bootOrder"]
        return tuple(dict.fromkeys(neutral[word] for word in words))

    def _nvram(self) -> Nvram | None:
        """Returns the file of EFI variables: VMware names it in a setting, VirtualBox in an item."""
        item = self._only(keys.NVRAM)
        text = self.settings.get("nvram") or self.more.get("nvram") or ""
        if item is not None:
            where, text, kind = item.where, item.get("HostResource") or "", "virtualbox"
        else:
            where, kind = "ExtraConfig nvram", "vmware"
        if not text.startswith(("ovf:/file/", "/file/")):
            # Any other name is that of a file on the source's host, which is not in the package.
            return None
        self.settings.pop("nvram", None)
        self.more.pop("nvram", None)
        name, _ = self.envelope.file_of(text.rpartition("/file/")[2], where)
        return part(self.envelope.file, where, Nvram, file=name, kind=kind)

    # -- what has no neutral meaning

    def _keep_rest(self) -> None:
        extra = self.extra
        if self.envelope.configuration is not None:
            extra["configuration"] = self.envelope.configuration
        if transport := self.envelope.get(self.hardware, "transport"):
            extra["transport"] = transport
        extra |= {f"config.{key}": value for key, value in self.settings.items() if value}
        extra |= {f"extraConfig.{key}": value for key, value in self.more.items() if value}
        extra |= self.devices.extra
        for number, item in enumerate(self.devices.unknown()):
            subtype = " ".join((item.get("ResourceSubType") or "").split())
            extra[f"item.{number}"] = f"{item.type} {subtype}"
        extra |= sections.licences(self.system)
        if keys.ENVELOPES[self.envelope.space] != "0.9":
            extra |= dict(unknown_settings(self.envelope.root))
        if len(extra) > MAX_SETTINGS:
            raise self.envelope.refused("VirtualSystem", f"has {len(extra)} settings, the limit is {MAX_SETTINGS}")
