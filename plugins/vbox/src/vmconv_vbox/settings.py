"""The elements of a machine while it is read: what is read is taken, and the rest remains as extra settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from vmconv.machine import GuestOS, number, part, quoted, refused, unknown
from vmconv_vbox.structs import NS

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from vmconv.plugin import File

EXTRA_DATA = "ExtraData:"
"""What keys of extra data begin with, to tell them from settings."""

DEFAULTS = {
    "CPU/PAE@enabled": "false",
    "CPU/LongMode@enabled": "true",
    "CPU/HardwareVirtExLargePages@enabled": "false",
    "CPU/X2APIC@enabled": "true",
    "BIOS/IOAPIC@enabled": "true",
    "BIOS/AutoSerialNumGen@enabled": "true",
    "Firmware/AutoSerialNumGen@enabled": "true",
    "AudioAdapter@useDefault": "true",
    "Network/Adapter/NAT@localhost-reachable": "true",
}
"""What new machines have."""

_KNOWN = {
    "Machine": "",
    # Read elsewhere; a snapshot is only named.
    **{f"Machine/{name}": "*" for name in ("Hardware", "Platform", "StorageControllers", "Snapshot")},
    "Machine/Description": "",
    "Machine/ExtraData": "",
    "Machine/ExtraData/ExtraDataItem": "name value",
    "Machine/MediaRegistry": "",
    "Machine/MediaRegistry/HardDisks": "",
    # Disks that were made on this one are inside it, to any depth.
    "Machine/MediaRegistry/HardDisks/HardDisk": "*",
    **{f"Machine/MediaRegistry/{name}": "" for name in ("DVDImages", "FloppyImages")},
    **{f"Machine/MediaRegistry/{name}/Image": "uuid location" for name in ("DVDImages", "FloppyImages")},
}

_OF_THE_HOST = ("AudioAdapter@driver", "AudioAdapter@codec")

# Times and places that say nothing of the hardware.
_PASSING = ("snapshotFolder", "lastStateChange", "currentSnapshot", "currentStateModified", "stateFile", "aborted")


def is_default(key: str, value: str) -> bool:
    return key in _OF_THE_HOST or DEFAULTS.get(re.sub(r"\[\d+\]", "", key)) == value


def children(element: Element, name: str) -> list[Element]:
    return element.findall(f"{NS}{name}")


def all_below(element: Element, name: str) -> Iterator[Element]:
    return element.iter(f"{NS}{name}")


class Settings:
    """The machine's elements. Since 1.20, processors, chipset and clock are in Platform."""

    def __init__(self, file: File, machine: Element, hardware: Element) -> None:
        self.file, self.machine, self.hardware = file, machine, hardware
        platform = machine.find(f"{NS}Platform")
        self._roots = [hardware] if platform is None else [hardware, platform]
        if platform is not None:
            self._roots += [one for name in ("x86", "arm") for one in children(platform, name)]
        self._kept: dict[str, str] = {}
        self._data: dict[str, str] = {}
        for item in machine.iterfind(f"{NS}ExtraData/{NS}ExtraDataItem"):
            self._data[item.get("name", "")] = item.get("value", "")

    def all(self, path: str) -> list[Element]:
        below = "/".join(f"{NS}{step}" for step in path.split("/"))
        return [element for root in self._roots for element in root.findall(below)]

    def take(self, element: Element, name: str) -> str | None:
        return element.attrib.pop(name, None)

    def value(self, path: str, name: str) -> str | None:
        """Returns an attribute of the only element at a path. Raises `ImageError` if several have it."""
        found = [value for each in self.all(path) if (value := self.take(each, name)) is not None]
        if len(found) > 1:
            raise refused(self.file, f"{path} {name}", "is given more than once")
        return found[0] if found else None

    def number(self, path: str, name: str, low: int, high: int, default: str, *, at: Element | None = None) -> int:
        text = self.value(path, name) if at is None else self.take(at, name)
        return number(self.file, f"{path} {name}", text or default, low, high)

    def flag(self, path: str, name: str) -> bool | None:
        text = self.value(path, name)
        return None if text is None else self.boolean(f"{path} {name}", text)

    def boolean(self, element: str, text: str) -> bool:
        if text in ("true", "yes", "1"):
            return True
        if text in ("false", "no", "0"):
            return False
        raise refused(self.file, element, f"{quoted(text)} is neither true nor false")

    def uuid(self, element: Element, name: str) -> UUID | None:
        text = self.take(element, name)
        return None if text is None else self.as_uuid(f"{element.tag.removeprefix(NS)} {name}", text)

    def as_uuid(self, element: str, text: str) -> UUID:
        try:
            return UUID(text.strip().removeprefix("{").removesuffix("}"))
        except ValueError as exc:
            raise refused(self.file, element, f"{quoted(text)} is not a UUID") from exc

    def text(self, element: str, text: str | None) -> None:
        """Raises `ImageError` for a text that the model cannot hold."""
        part(self.file, element, GuestOS, source_id=text)

    def description(self) -> str | None:
        found = self.machine.findtext(f"{NS}Description")
        return found.strip() or None if found else None

    def extra_data(self, key: str) -> str | None:
        """Returns a value of the extra data, without the prefix that keeps VirtualBox from taking it for a number."""
        value = self._data.pop(key, None)
        return None if value is None else value.removeprefix("string:") or None

    def keep(self, key: str, value: str) -> None:
        self._kept[key] = value

    def rest(self) -> dict[str, str]:
        """Returns the settings that nobody took, by the paths of their attributes."""
        found = {f"{EXTRA_DATA}{key}": value for key, value in self._data.items() if key}
        for name in _PASSING:
            self.machine.attrib.pop(name, None)
        found |= {f"@{name}": value for name, value in self.machine.attrib.items()}
        # With a slash in front, the writer does not take them for settings of the hardware.
        found |= {f"/{key}": value for key, value in unknown(self.machine, "Machine", _KNOWN) if "/" in key}
        for root in self._roots:
            for child, path in _numbered(root, ""):
                if child.tag not in (f"{NS}x86", f"{NS}arm"):
                    found |= dict(_attributes(child, path))
        return {key: value for key, value in (found | self._kept).items() if not is_default(key, value)}


def _attributes(element: Element, path: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{path}@{name}", value) for name, value in element.attrib.items())
    if text := (element.text or "").strip():
        yield path, text
    for child, below in _numbered(element, f"{path}/"):
        yield from _attributes(child, below)


def _numbered(element: Element, prefix: str) -> Iterator[tuple[Element, str]]:
    """Yields the children with their paths; the second of a name and later ones are numbered."""
    count: dict[str, int] = {}
    for child in element:
        name = child.tag.removeprefix(NS)
        count[name] = count.get(name, 0) + 1
        yield child, f"{prefix}{name}" + (f"[{count[name]}]" if count[name] > 1 else "")
