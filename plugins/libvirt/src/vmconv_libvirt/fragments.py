"""Parts of a domain without a neutral meaning: kept as XML text in `extra`, and written back where that is safe."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, ParseError, fromstring, tostring

from vmconv.machine import refused, unknown
from vmconv_libvirt.known import KNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmconv.plugin import File

MAX_FRAGMENTS = 1000

DOMAIN = (
    *("blkiotune", "clock", "cputune", "currentMemory", "iothreads", "on_crash", "on_poweroff", "on_reboot"),
    *("perf", "pm", "title", "vcpu"),
)
_OS = ("bios", "bootmenu")
_CPU = ("cache", "feature", "maxphysaddr", "vendor")
_DEVICES = ("controller", "graphics", "hub", "input", "memballoon", "panic", "redirdev")
_DISK = ("blockio", "driver", "geometry", "iotune", "product", "readonly", "vendor", "wwn")
_NIC = ("bandwidth", "mtu", "source", "vlan")

_KEPT = re.compile(
    "|".join(
        (
            rf"(?:{'|'.join(DOMAIN)})(?:\.\d+)?",
            rf"os\.(?:{'|'.join(_OS)})(?:\.\d+)?",
            rf"cpu\.(?:{'|'.join(_CPU)})(?:\.\d+)?",
            r"features\.[a-z_-]+(?:\.\d+)?",
            r"metadata\.[a-z_-]+(?:\.\d+)?",
            r"sysinfo\.(?:bios|system|baseBoard|chassis|oemStrings)\.entry(?:\.\d+)?",
            rf"devices\.(?:{'|'.join(_DEVICES)})(?:\.\d+)?",
            rf"(?P<disk>disks\.\d+)\.(?:{'|'.join(_DISK)})",
            rf"(?P<nic>nics\.\d+)\.(?:{'|'.join(_NIC)})",
        )
    )
)
"""Fragments that the writer takes over. Others reach the host: its files, devices, programs and sockets."""


class Fragments:
    """Collects the fragments of a domain; raises `ImageError` if there are more than `MAX_FRAGMENTS`."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.found: dict[str, str] = {}

    def add(self, key: str, element: Element) -> None:
        """Stores an element: `key`, and `key.1`, `key.2` for further ones."""
        self._make_room(element)
        count = sum(1 for each in self.found if each == key or each.startswith(f"{key}."))
        self.found[f"{key}.{count}" if count else key] = text_of(element)

    def add_others(self, prefix: str, parent: Element | None, understood: Iterable[str]) -> None:
        """Stores the children of an element that are not understood."""
        for child in parent if parent is not None else ():
            if child.tag not in understood:
                self.add(f"{prefix}{local(child.tag)}", child)

    def add_unknown(self, element: Element, path: str, shown: str, *, fragments: str = "") -> None:
        """Stores what the reader does not know of an element and of those below it, under the path `shown`.

        `add_others` has stored the elements whose paths below this one match `fragments`.
        """
        for key, value in unknown(element, path, KNOWN):
            below = key[len(path) :]
            if not re.fullmatch(fragments, below):
                self._make_room(element)
                self.found[f"{shown}{below}"] = value

    def _make_room(self, element: Element) -> None:
        if len(self.found) >= MAX_FRAGMENTS:
            raise refused(self._file, element.tag, f"the domain has more than {MAX_FRAGMENTS} elements of this kind")


def local(tag: str) -> str:
    """Returns a tag without its namespace."""
    return tag.rpartition("}")[2]


def text_of(element: Element) -> str:
    """Returns an element as text, without white space between elements."""
    copy = deepcopy(element)
    copy.tail = None
    for each in copy.iter():
        if each.text is not None and not each.text.strip():
            each.text = None
        for child in each:
            child.tail = None
    return tostring(copy, encoding="unicode")


def element_of(text: str) -> Element | None:
    """Returns the element of a fragment; None if it is no single element, or has a DOCTYPE."""
    if "<!" in text:
        return None
    try:
        return fromstring(text)
    except ParseError:
        return None


def why_dropped(key: str, text: str, disks: int, nics: int) -> str | None:
    """Returns why the writer does not take a fragment over; None if it does."""
    known = _KEPT.fullmatch(key)
    if known is None:
        return "it reaches the source's host, or is not known"
    for device, count in (("disk", disks), ("nic", nics)):
        if known[device] and int(known[device].partition(".")[2]) >= count:
            return "the domain has no such device"
    element = element_of(text)
    if element is None or text_of(element) != text:
        return "it is no XML element as the reader stores it"
    wanted = next(part for part in reversed(key.split(".")) if not part.isdigit())
    if local(element.tag) != wanted:
        return f"it is not an element {wanted}"
    if key.startswith("devices.controller") and element.get("type") not in ("pci", "virtio-serial"):
        return "only PCI and virtio-serial controllers are kept"
    return None


def kept_element(kept: dict[str, str], key: str) -> Element | None:
    """Returns the element of one fragment; None if there is none of this key."""
    return element_of(kept[key]) if key in kept else None


def append_all(parent: Element, kept: dict[str, str], prefix: str, besides: str = "") -> None:
    """Appends the fragments whose keys begin with a prefix, but the one of the key `besides`."""
    for key in kept:
        element = kept_element(kept, key) if key.startswith(prefix) and key != besides else None
        if element is not None:
            parent.append(element)
