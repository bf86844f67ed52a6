"""No setting of a configuration is dropped in silence: a reader knows it, or keeps it for the list of losses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from support import machine_documents as documents
from support.ovf_packages import OVF
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed_machines
from vmconv.machine import Machine
from vmconv.testing.disks import image_file

Change = tuple[str, str]
"""What was changed, and the changed configuration."""


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in entries:
        yield from _paths(each, (*path, key))


def _yaml(text: str) -> Iterator[Change]:
    root = yaml.safe_load(text)
    for path in _paths(root):
        changed = copy.deepcopy(root)
        *above, last = path or (None,)
        holder = changed
        for key in above:
            holder = holder[key]
        found = holder[last] if path else changed
        if isinstance(found, dict):
            found["unknownField"] = "x"
            yield ".".join(map(str, (*path, "unknownField"))), yaml.safe_dump(changed)
        elif path and not isinstance(found, list):
            what = ".".join(map(str, path))
            if isinstance(holder, dict):
                holder[last] = not found if isinstance(found, bool) else f"{found}7"
                yield what, yaml.safe_dump(changed)
            del holder[last]
            yield what, yaml.safe_dump(changed)


def _xml(text: str) -> Iterator[Change]:
    root = ElementTree.fromstring(text)
    parents = {child: parent for parent in root.iter() for child in parent}

    def where(element: ElementTree.Element) -> str:
        above, name = parents.get(element), element.tag.rpartition("}")[2]
        if above is None:
            return name
        same = [each for each in above if each.tag == element.tag]
        number = f"[{same.index(element) + 1}]" if len(same) > 1 else ""
        return f"{where(above)}/{name}{number}"

    def changed() -> str:
        return ElementTree.tostring(root, encoding="unicode")

    for element in list(root.iter()):
        path = where(element)
        element.set("unknownAttribute", "x")
        yield f"{path}@unknownAttribute", changed()
        del element.attrib["unknownAttribute"]
        child = ElementTree.SubElement(element, re.sub("[^}]+$", "unknownElement", element.tag))
        child.text = "x"
        yield f"{path}/unknownElement", changed()
        element.remove(child)
        for name, value in list(element.attrib.items()):
            what = f"{path}@{name.rpartition('}')[2]}"
            element.set(name, f"{value}7")
            yield what, changed()
            del element.attrib[name]
            yield what, changed()
            element.set(name, value)
        if not len(element) and (element.text or "").strip():
            before, element.text = element.text, None
            yield path, changed()
            element.text = before
        if element in parents and not len(element) and not (element.text or "").strip() and not element.attrib:
            at = list(parents[element]).index(element)
            parents[element].remove(element)
            yield path, changed()
            parents[element].insert(at, element)


def _lines(text: str) -> Iterator[Change]:
    lines = text.splitlines(keepends=True)
    for at, line in enumerate(lines):
        key, mark, value = re.split("( = |: )", line.rstrip("\n"), maxsplit=1) if line[0] != "#" else ("#", "", "")
        yield key, "".join([*lines[:at], *lines[at + 1 :]])
        if mark == ": ":
            parts = value.split(",")
            for number in range(1, len(parts)):
                rest = ",".join(parts[:number] + parts[number + 1 :])
                yield f"{key} {parts[number]}", "".join([*lines[:at], f"{key}: {rest}\n", *lines[at + 1 :]])
            yield f"{key} unknown=x", "".join([*lines[:at], f"{key}: {value},unknown=x\n", *lines[at + 1 :]])
    yield "unknown", text + ('unknown.key = "x"\n' if " = " in text else "unknown: x\n")


CONFIGURATIONS: dict[str, tuple[str, Callable[[str], Iterator[Change]]]] = {
    "kubevirt": (documents.KUBEVIRT, _yaml),
    "libvirt": (documents.LIBVIRT, _xml),
    "ovf": (OVF, _xml),
    "vbox": (documents.VBOX, _xml),
    "proxmox": (documents.PROXMOX, _lines),
    "vmx": (documents.VMX, _lines),
}

WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "kubevirt": {
        "apiVersion": "the version of the schema",
        r"spec\.template\.spec\.domain\.features\.smm\..*": "follows from Secure Boot",
        r"spec\.template\.spec\.domain\.devices\.tpm\.persistent": "no other platform has a TPM that forgets",
        r"spec\.template\.spec\.domain\.devices\.(sound|watchdog)\.name": "names inside the object",
    },
    "libvirt": {
        r"domain/metadata(@|/libosinfo).*": "only libosinfo's id is read, the other tools' elements are kept",
        r"domain/devices(@|/emulator).*|domain/devices/emulator": "the host's program",
        r"domain/os/firmware/feature\[2\]@.*": "keys are enrolled by default",
        "domain/os/nvram@template": "the template made the file",
        "domain/features/(apic|smm@state)": "each PC has an APIC, and SMM follows from Secure Boot",
        "domain/cpu/topology@sockets": "not all processors are plugged in",
        r".*/disk\[[13]\]/driver@name": "QEMU's only driver",
        r".*/disk\[1\]/target@dev|.*/disk\[1\]/address@bus": "the address has the place",
        r".*/disk\[\d\]/target@bus": "follows from the name of the disk",
        r".*/disk\[4\](@type|/readonly)": "CDs are read-only, and this drive is empty",
        r".*/controller\[2\]@index": "there is one USB controller",
        ".*/hostdev@mode|.*/hostdev/source/address/unknownElement": "a host device is named by its address",
        ".*/rng/backend": "the host's source of random numbers",
    },
    "ovf": {
        "Envelope/NetworkSection[@/].*": "a card names its network",
        ".*/Info([@/].*)?": "for people",
        r".*/Item\[\d\]/(ElementName|Description)": "for people",
        r".*/Item\[\d\]/\w+[@/].*": "properties of CIM are plain values",
        r".*/Item\[1\]/Address": "the only controller",
        r".*/Item\[4\]/AllocationUnits": "the default",
        ".*/Reservation": "stands in for a missing quantity",
        ".*/BootOrderSection[@/].*": "an item is named by its id",
        ".*/System[@/].*|.*/(Annotation|Product)@.*": "texts",
    },
    "vbox": {
        "VirtualBox/Machine@currentSnapshot|.*/Machine/Snapshot[@/].*": "snapshots are only named",
        r".*/HardDisk\[2\]@type": "the default",
        r".*/Order\[3\]@device": "the device None",
        ".*/(Controller|StorageController.*)@name": "names of controllers",
        r".*/Adapter\[\d\]@slot|.*/DisabledModes[@/].*|.*/Adapter\[4\].*": "places, and what is disabled",
        r".*/Port\[\d\]@(IOBase|IRQ)|.*/Port\[2\]@.*": "follows from the slot, and what is disabled",
        ".*/AudioAdapter@driver|.*@useHostIOCache": "the host's",
        ".*/StorageController.*@(PortCount|Bootable)": "follows from the drives",
        "VirtualBox/Machine/Hardware/CPU/CpuTree.*": "processors are only counted",
    },
    "proxmox": {
        "(efidisk0|ide2|tpmstate0) size=.*|efidisk0 efitype=.*": "of the old file",
        "localtime": "the default of Windows",
    },
    "vmx": {
        r"\.encoding|config\.version": "of the file",
        r"(svga|usb|pciBridge0|scsi0|sata0)\.present": "another setting says so too",
        r"floppy0\.present": "there is none",
    },
}
"""Settings whose change makes no other machine, and why."""


def _read(name: str, text: str) -> Machine | None:
    """Returns the machine of a configuration; None if it is refused."""
    one = installed_machines().machines[name]
    try:
        return one.read(image_file(text.encode(), f"web{one.suffixes[0]}"), Opener(Registry()))
    except ImageError:
        return None


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_setting_has_an_effect(name: str) -> None:
    text, changes = CONFIGURATIONS[name]
    whole = _read(name, text)
    assert whole is not None
    effects: dict[str, bool] = {}
    for what, changed in changes(text):
        effects[what] = effects.get(what, False) or _read(name, changed) != whole
    silent = {what for what, has_effect in effects.items() if not has_effect}
    known = {pattern: {what for what in effects if re.fullmatch(pattern, what)} for pattern in WITHOUT_EFFECT[name]}
    assert silent - set().union(*known.values()) == set()
    assert [pattern for pattern, found in known.items() if not found & silent] == []
