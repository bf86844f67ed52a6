"""Reads a domain: what the machine is, without its devices. See `devices` for those.

libvirt, "Domain XML format". Elements of no neutral meaning become fragments, see `fragments`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from uuid import UUID
from xml.etree.ElementTree import Element

from vmconv.machine import (
    Board,
    Cpu,
    Firmware,
    GuestOS,
    Identity,
    Machine,
    Memory,
    Nvram,
    number,
    part,
    quoted,
    refused,
)
from vmconv.machine import parse_xml as parse
from vmconv_libvirt.devices import Devices
from vmconv_libvirt.fragments import Fragments, local
from vmconv_libvirt.words import BOOT, MACHINES, OSINFO, QEMU_TYPES, chipset, opposite, osinfo_short

if TYPE_CHECKING:
    from vmconv.plugin import File

_UNDERSTOOD = (
    *("name", "uuid", "genid", "description", "memory", "maxMemory", "currentMemory", "vcpu", "os", "cpu", "clock"),
    *("features", "sysinfo", "metadata", "devices"),
)
_OS = ("type", "firmware", "loader", "nvram", "boot", "smbios")
_SYSINFO = {
    ("system", "serial"): "serial",
    ("system", "manufacturer"): "manufacturer",
    ("system", "product"): "product",
    ("baseBoard", "serial"): "board_serial",
    ("chassis", "serial"): "chassis_serial",
    ("chassis", "asset"): "asset_tag",
}
_FRAGMENTS = r"/(?:(?:os|cpu|features)/)?[^/@]+"
"""Paths of unknown children below the domain that `add_others` stores."""

_POWERS = {"": 0, **{letter: power for power, letter in enumerate("kmgtpe", start=1)}}


def read(file: File) -> Machine:
    """Returns the machine of a domain. Raises `ImageError` with the element for bad values, containers and Xen's PV."""
    root = parse(file)
    if root.tag != "domain":
        raise refused(file, root.tag, "is not a domain")
    return _Domain(file, root).machine()


class _Domain:
    def __init__(self, file: File, root: Element) -> None:
        self.file, self.root = file, root
        self.qemu = root.get("type") in QEMU_TYPES
        self.kept = Fragments(file)

    def machine(self) -> Machine:
        for tag in ("name", "uuid", "genid", "memory", "vcpu", "os", "cpu", "clock", "features", "devices", "metadata"):
            self._one(self.root, tag)
        parts: dict[str, Any] = {
            "name": _text(self.root, "name"),
            "description": _text(self.root, "description"),
            "os": self._guest(),
            "cpu": self._cpu(),
            "memory": self._memory(),
            "firmware": self._firmware(),
            "identity": self._identity(),
            "board": self._board(),
        }
        devices = self.root.find("devices")
        if devices is not None:
            parts.update(Devices(self.file, devices, self.kept, qemu=self.qemu).parts())
        self._others()
        parts["extra"] = {"libvirt": self.kept.found} if self.kept.found else {}
        return part(self.file, "domain", Machine, **parts)

    def _one(self, parent: Element, tag: str) -> Element | None:
        found = parent.findall(tag)
        if len(found) > 1:
            raise refused(self.file, tag, f"the domain has {len(found)} of it")
        return found[0] if found else None

    def _guest(self) -> GuestOS:
        kind = self.root.find("os/type")
        if kind is None or (kind.text or "").strip() != "hvm":
            found = "" if kind is None else (kind.text or "").strip()
            raise refused(self.file, "os/type", f"{quoted(found)} is not hvm, a machine with its own kernel")
        architecture = kind.get("arch")
        if architecture not in (None, "i686", "x86_64", "aarch64"):
            raise refused(self.file, "os/type@arch", f"{quoted(architecture)} is not i686, x86_64 or aarch64")
        system = self.root.find(f"metadata/{OSINFO}libosinfo/{OSINFO}os")
        url = None if system is None else system.get("id")
        short = osinfo_short(url) if url else None
        source = None if short else url or None
        return part(self.file, "metadata", GuestOS, id=short, architecture=architecture, source_id=source)

    def _cpu(self) -> Cpu:
        count = self._vcpus()
        element = self.root.find("cpu")
        if element is None:
            return Cpu(count=count)
        self.kept.add_others("cpu.", element, ("model", "topology"))
        mode = element.get("mode", "custom")
        model = (element.findtext("model") or "").strip() if mode == "custom" else mode
        return part(self.file, "cpu", Cpu, count=count, model=model or None, **self._topology(element, count))

    def _vcpus(self) -> int | None:
        element = self.root.find("vcpu")
        if element is None:
            return None
        most = number(self.file, "vcpu", element.text or "", 1, 4096)
        count = number(self.file, "vcpu@current", element.get("current", str(most)), 1, most)
        element.attrib.pop("current", None)
        if element.get("placement") == "static":
            del element.attrib["placement"]
        if element.attrib or most != count:
            self.kept.add("vcpu", element)
        return count

    def _topology(self, cpu: Element, count: int | None) -> dict[str, int]:
        """Returns the topology that the guest sees: dies and clusters are parts of sockets."""
        element = cpu.find("topology")
        if element is None:
            return {}
        found = {
            name: number(self.file, f"cpu/topology@{name}", element.get(name, "1"), 1, 4096)
            for name in ("sockets", "dies", "clusters", "cores", "threads")
        }
        cores = found["dies"] * found["clusters"] * found["cores"]
        if found["sockets"] * cores * found["threads"] != count:
            # Some processors are not plugged in yet: the sockets are not full.
            return {"cores": cores, "threads": found["threads"]}
        return {"sockets": found["sockets"], "cores": cores, "threads": found["threads"]}

    def _memory(self) -> Memory:
        size, most = (self._bytes(self.root.find(tag), tag) for tag in ("memory", "maxMemory"))
        now = self.root.find("currentMemory")
        if now is not None and self._bytes(now, "currentMemory") != size:
            self.kept.add("currentMemory", now)
        return part(self.file, "memory", Memory, size=size or None, max=most or None)

    def _bytes(self, element: Element | None, name: str) -> int | None:
        """Returns a size in bytes; without a unit it is in KiB. `k` and `KiB` are 1024 bytes, `KB` is 1000."""
        if element is None:
            return None
        unit = element.get("unit", "KiB").strip().lower()
        found = re.fullmatch(r"(?:([kmgtpe]?)(|b|ib)|bytes?)", unit)
        if not found or (found[2] == "ib" and not found[1]):
            raise refused(self.file, f"{name}@unit", f"{quoted(unit)} is not a unit of memory")
        base = 1000 if found[1] and found[2] == "b" else 1024
        return int(number(self.file, name, element.text or "", 0, 1 << 50) * base ** (_POWERS[found[1] or ""]))

    def _firmware(self) -> Firmware:
        system = self.root.find("os")
        assert system is not None
        self.kept.add_others("os.", system, _OS)
        boot = tuple(opposite(BOOT).get(each.get("dev", ""), "") for each in system.findall("boot"))
        if "" in boot:
            raise refused(self.file, "os/boot@dev", "is not hd, cdrom, fd or network")
        kind, secure = self._firmware_kind(system)
        nvram = self._nvram(system) if kind == "uefi" else None
        order = tuple(dict.fromkeys(boot))
        return part(self.file, "os", Firmware, kind=kind, secure_boot=secure, nvram=nvram, boot_order=order)

    def _firmware_kind(self, system: Element) -> tuple[str | None, bool | None]:
        """Returns the kind of firmware and whether Secure Boot is on.

        Without `firmware` and `loader`, QEMU's PCs have a BIOS. A `loader` of type rom may be of either kind.
        """
        chosen, loader = system.get("firmware"), system.find("loader")
        if chosen is None and loader is None:
            kind = system.find("type")
            virtual = kind is not None and kind.get("arch") == "aarch64"
            return (None if virtual else "bios"), None
        if chosen not in (None, "efi", "bios"):
            raise refused(self.file, "os@firmware", f"{quoted(chosen)} is neither efi nor bios")
        if chosen == "bios" or (chosen is None and loader is not None and loader.get("type", "rom") != "pflash"):
            if loader is not None:
                self.kept.add("os.loader", loader)
            return ("bios" if chosen else None), None
        if loader is not None and (loader.text or "").strip():
            self.kept.add("os.loader", loader)
        return "uefi", self._secure_boot(system, loader)

    def _secure_boot(self, system: Element, loader: Element | None) -> bool | None:
        """True if the firmware enforces Secure Boot: it needs the feature, and keys unless they are refused."""
        features = {each.get("name"): each.get("enabled") for each in system.findall("firmware/feature")}
        feature = features.get("secure-boot") or (loader.get("secure") if loader is not None else None)
        if feature is None:
            return None
        return feature == "yes" and features.get("enrolled-keys") != "no"

    def _nvram(self, system: Element) -> Nvram | None:
        element = system.find("nvram")
        if element is None:
            return None
        source = element.find("source")
        name = (element.text or "").strip() or ((source.get("file") or "") if source is not None else "")
        if not name:
            # The file is made from the template at the first start, or lies on a network.
            if source is not None:
                self.kept.add("os.nvram", element)
            return None
        return part(self.file, "os/nvram", Nvram, file=name, kind="ovmf")

    def _identity(self) -> Identity:
        found: dict[str, Any] = {
            "uuid": self._uuid("uuid", _text(self.root, "uuid")),
            "generation_id": self._uuid("genid", _text(self.root, "genid")),
        }
        smbios = self.root.find("os/smbios")
        mode = None if smbios is None else smbios.get("mode")
        for element in self.root.findall("sysinfo"):
            # Without this mode the guest does not see them.
            if mode == "sysinfo" and element.get("type") == "smbios":
                found |= self._sysinfo(element, found["uuid"])
            else:
                self.kept.add("sysinfo", element)
        if mode not in (None, "sysinfo"):
            assert smbios is not None
            self.kept.add("os.smbios", smbios)
        return part(self.file, "sysinfo", Identity, **found)

    def _uuid(self, element: str, text: str | None) -> UUID | None:
        if not text:
            return None
        if not re.fullmatch(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}", text):
            raise refused(self.file, element, f"{quoted(text)} is not a UUID")
        return UUID(text)

    def _sysinfo(self, sysinfo: Element, uuid: UUID | None) -> dict[str, str]:
        found: dict[str, str] = {}
        for block in sysinfo:
            for entry in block.findall("entry"):
                name, text = entry.get("name", ""), (entry.text or "").strip()
                if (block.tag, name) == ("system", "uuid"):
                    if self._uuid("sysinfo/system uuid", text) != uuid:
                        raise refused(self.file, "sysinfo/system uuid", f"{quoted(text)} is not the domain's UUID")
                elif (block.tag, name) in _SYSINFO and text:
                    found.setdefault(_SYSINFO[block.tag, name], text)
                else:
                    self.kept.add(f"sysinfo.{block.tag}.entry", entry)
        return found

    def _board(self) -> Board:
        kind = self.root.find("os/type")
        machine = kind.get("machine") if kind is not None and self.qemu else None
        clock = self.root.find("clock")
        offset = None if clock is None else clock.get("offset", "utc")
        if clock is not None and offset in ("utc", "localtime"):
            clock.attrib.pop("offset", None)
        if clock is not None and (len(clock) or clock.attrib):
            self.kept.add("clock", clock)
        return part(
            self.file,
            "os/type@machine",
            Board,
            chipset=chipset(machine) if machine else None,
            # Aliases name whichever version is the newest.
            hardware_version=machine if machine not in MACHINES.values() else None,
            clock=offset if offset in ("utc", "localtime") else None,
        )

    def _others(self) -> None:
        self.kept.add_unknown(self.root, "domain", "domain", fragments=_FRAGMENTS)
        self.kept.add_others("", self.root, _UNDERSTOOD)
        features = self.root.find("features")
        # SMM follows from Secure Boot, and each PC has an APIC.
        self.kept.add_others("features.", features, ("acpi", "apic", "smm"))
        if self.qemu and self.root.find("features/acpi") is None:
            self.kept.add("features.acpi", Element("acpi", state="off"))
        for element in self.root.findall("metadata/*"):
            if element.tag != f"{OSINFO}libosinfo":
                self.kept.add(f"metadata.{local(element.tag)}", element)


def _text(root: Element, tag: str) -> str | None:
    return (root.findtext(tag) or "").strip() or None
