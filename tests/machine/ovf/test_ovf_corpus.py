"""Real descriptors and packages: read as another reader of XML reads them, or refused for a reason that it sees too."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from xml.etree import ElementTree

import pytest

from support.requirements import CORPUS, missing
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine import Machine, restricted
from vmconv.testing import image_file
from vmconv_ovf import Ova, Ovf
from vmconv_ovf.options import Options

OPENER = Opener(Registry())

DESCRIPTORS, READ = 505, 302

REFUSED = {
    "is outside the package": 94,
    "virtual systems: ": 47,
    "has no VirtualSystem": 23,
    "is not well-formed XML": 10,
    "is no envelope of OVF 0.9, 1 or 2": 5,
    "is a URL, and packages with files elsewhere": 3,
    "has no InstanceID": 3,
    "is not a relative path": 2,
    "which the DiskSection does not list": 2,
    "has no ovf:diskId": 2,
    "has ovf:compression 'gzip'": 2,
    "section is required by the package and not known": 2,
    "is stored in chunks": 1,
    "is a delta of disk": 1,
    "two have this ovf:diskId": 1,
    "two items have this InstanceID": 1,
    "has no ResourceType": 1,
    "has no VirtualHardwareSection": 1,
    "ovf:size: '-2' is not a number": 1,
    "which References does not list": 1,
}

UNITS = {
    "byte * 2^20": 1 << 20,
    "byte * 2 ^ 20": 1 << 20,
    "MegaBytes": 1 << 20,
    "byte*1024*1024": 1 << 20,
    "byte * 2^30": 1 << 30,
    "byte * 2 ^ 30": 1 << 30,
    "byte": 1,
}


@cache
def descriptors() -> dict[str, bytes]:
    """Returns the descriptors of the corpus by their names."""
    packed = CORPUS / "configs.tar.xz"
    if not packed.exists():
        missing("corpus", f"{packed} is missing")
    with tarfile.open(packed) as tar:
        listed = [each for each in tar.getmembers() if each.isfile() and each.name.lower().endswith(".ovf")]
        return {each.name: content.read() for each in listed if (content := tar.extractfile(each))}


@cache
def found() -> dict[str, Machine | str]:
    """Returns the machine of each descriptor, or the message of its refusal."""
    results: dict[str, Machine | str] = {}
    for name, content in descriptors().items():
        try:
            results[name] = Ovf().read(image_file(content, "web.ovf"), OPENER)
        except ImageError as exc:
            results[name] = str(exc)
    return results


def test_each_descriptor_is_read_or_refused_for_a_known_reason() -> None:
    messages = [each for each in found().values() if isinstance(each, str)]
    reasons = Counter(next((each for each in REFUSED if each in message), message) for message in messages)
    assert len(found()) == DESCRIPTORS
    assert reasons == REFUSED
    assert len(found()) - len(messages) == READ


def local(element: ElementTree.Element) -> str:
    """Returns the name of an element; in OVF 0.9 that of its type."""
    name = element.tag.rpartition("}")[2]
    typed = next((value for key, value in element.attrib.items() if key.endswith("}type")), "")
    return re.sub(r".*:|_Type$", "", typed) if name in ("Section", "Content") else name


def attribute(element: ElementTree.Element, name: str) -> str | None:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), None)


def count(content: bytes, name: str) -> int:
    return sum(local(each) == name for each in ElementTree.fromstring(content).iter())


def hrefs(content: bytes) -> list[str]:
    return [attribute(each, "href") or "" for each in ElementTree.fromstring(content).iter() if local(each) == "File"]


SEEN: dict[str, Callable[[bytes], bool]] = {
    "is outside the package": lambda content: any("../" in each for each in hrefs(content)),
    "virtual systems: ": lambda content: count(content, "VirtualSystem") > 1,
    "has no VirtualSystem": lambda content: count(content, "VirtualSystem") == 0,
    "is a URL, and packages": lambda content: any(each.startswith("http://") for each in hrefs(content)),
    "has ovf:compression 'gzip'": lambda content: b'compression="gzip"' in content,
    "is stored in chunks": lambda content: b"chunkSize" in content,
    "is a delta of disk": lambda content: b"parentRef" in content,
}


@pytest.mark.parametrize("reason", SEEN)
def test_refused_descriptors_have_what_the_reason_says(reason: str) -> None:
    refused = [name for name, each in found().items() if isinstance(each, str) and reason in each]
    assert [name for name in refused if not SEEN[reason](descriptors()[name])] == []


# -- a second reader, which knows only what these tests compare

Values = dict[str, str]


def items(content: bytes) -> list[Values]:
    """Returns the values of the items of the deployed configuration, which replace those for all with the same id."""
    root = ElementTree.fromstring(content)
    options = [each for each in root.iter() if local(each) == "Configuration"]
    default = [each for each in options if attribute(each, "default") == "true"] or options
    wanted = attribute(default[0], "id") if default else None
    hardware = next(each for each in root.iter() if local(each) == "VirtualHardwareSection")
    general, special = {}, {}
    for item in hardware:
        if local(item) not in ("Item", "StorageItem", "EthernetPortItem") or attribute(item, "bound") in ("min", "max"):
            continue
        values = {re.sub("Id$", "ID", local(child)): (child.text or "").strip() for child in item}
        stated = attribute(item, "configuration")
        if stated is None:
            general[values["InstanceID"]] = values
        elif wanted in stated.split():
            special[values["InstanceID"]] = values
    return list({**general, **special}.values())


def capacities(content: bytes) -> dict[str, int | None]:
    """Returns the capacity of each disk; None for the value of a property."""
    listed = [each for each in ElementTree.fromstring(content).iter() if local(each) == "Disk"]
    return {attribute(each, "diskId") or "": capacity(each) for each in listed}


def capacity(disk: ElementTree.Element) -> int | None:
    text = attribute(disk, "capacity")
    unit = UNITS[attribute(disk, "capacityAllocationUnits") or "byte"]
    return int(text) * unit if text and text.isdecimal() else None


def summary(content: bytes) -> dict[str, object]:
    """Returns processors, memory, disks and network cards."""
    devices = items(content)
    of = {kind: [each for each in devices if each.get("ResourceType") == kind] for kind in ("3", "4", "10", "17")}
    sizes = capacities(content)
    quantity = [each.get("VirtualQuantity") or each.get("Reservation") or "" for each in (*of["3"], *of["4"])]
    return {
        "cpus": [int(each) for each in quantity[: len(of["3"])] if each],
        "memory": [
            int(each) * UNITS[item.get("AllocationUnits") or "MegaBytes"]
            for each, item in zip(quantity[len(of["3"]) :], of["4"], strict=True)
            if each
        ],
        "disks": [sizes.get(each["HostResource"].rpartition("/")[2]) for each in of["17"] if each.get("HostResource")],
        "macs": [each.get("Address", "").lower() for each in of["10"]],
        "networks": [each.get("Connection", "") for each in of["10"]],
    }


def test_machines_are_what_a_second_reader_finds() -> None:
    compared = 0
    for name, each in found().items():
        if isinstance(each, str):
            continue
        wanted = summary(descriptors()[name])
        assert [one for one in (each.cpu.count,) if one is not None] == wanted["cpus"], name
        assert [one for one in (each.memory.size,) if one is not None] == wanted["memory"], name
        resources = [item for item in items(descriptors()[name]) if item.get("ResourceType") == "17"]
        stated = [disk.capacity for disk, item in zip(each.disks, resources, strict=True) if item.get("HostResource")]
        second = wanted["disks"]
        assert isinstance(second, list)
        assert [one for one, other in zip(stated, second, strict=True) if other is not None] == [
            other for other in second if other is not None
        ], name
        assert [nic.mac or "" for nic in each.nics] == wanted["macs"], name
        assert [nic.network or "" for nic in each.nics] == wanted["networks"], name
        compared += 1
    assert compared == READ


def test_vmware_settings_are_what_a_second_reader_finds() -> None:
    firmware: Counter[str | None] = Counter()
    for name, each in found().items():
        if not isinstance(each, str):
            settings = {attribute(one, "key"): one for one in ElementTree.fromstring(descriptors()[name]).iter()}
            stated = attribute(settings["firmware"], "value") if "firmware" in settings else None
            assert each.firmware.kind == ({"efi": "uefi", "bios": "bios"}[stated] if stated else None), name
            firmware[each.firmware.kind] += 1
    assert firmware["uefi"] > 10
    assert firmware["bios"] > 10


def test_read_machines_come_back_from_their_own_writer() -> None:
    ovf, options = Ovf(), Options()
    for name, each in found().items():
        if not isinstance(each, str):
            adapted = ovf.adapt(each, options).machine
            again = ovf.read(image_file(ovf.write(adapted, options)[-1].content, "web.ovf"), OPENER)
            assert restricted(again, ovf.carries) == restricted(adapted, ovf.carries), name


# -- packages


def package(name: str) -> bytes:
    path = CORPUS / name
    if not path.exists():
        missing("corpus", f"{path} is missing")
    return lzma.decompress(path.read_bytes())


@pytest.mark.parametrize("version", [1, 2])
def test_packages_of_virtualbox_are_read_whole(version: int) -> None:
    content = package(f"machines/virtualbox7-ovf{version}.ova.xz")
    file = image_file(content, "demo.ova")
    machine = Ova().read(file, OPENER)
    assert machine.model_dump(mode="json", exclude_defaults=True) == {
        "name": "demo",
        "os": {"architecture": "x86_64", "source_id": "Debian_64"},
        "cpu": {"count": 2},
        "memory": {"size": 2 << 30},
        "firmware": {
            "kind": "uefi",
            "nvram": {"file": "demo.nvram", "kind": "virtualbox"},
            "boot_order": ["disk", "cdrom"],
        },
        "tpm": {"version": "2.0"},
        "identity": {"uuid": "564d1234-0000-1111-2222-333344445555", "serial": "ABC"},
        "board": {"hardware_version": "virtualbox-2.2", "clock": "utc"},
        "controllers": [{"bus": "sata", "model": "ahci"}],
        "disks": [
            {
                "bus": "sata",
                "controller": 0,
                "unit": 0,
                "file": "demo-disk001.vmdk",
                "format": "vmdk",
                "capacity": 64 << 20,
            }
        ],
        "nics": [
            {
                "mac": "08:00:27:aa:bb:cc",
                "model": "e1000",
                "network": "NAT",
                "network_kind": "nat",
                "connected": True,
            }
        ],
        "sound": "ac97",
    }
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        names = tar.getnames()
        for member in Ova().members(file):
            extracted = tar.extractfile(member.name)
            assert extracted is not None
            assert member.table.read(0, member.table.size) == extracted.read()
    assert [member.name for member in Ova().members(file)] == names


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("cdi/fake.ova", "the descriptor has 7804077568 bytes for 'disk1.vmdk', and the member has 65536"),
        ("glance/testserver-no-ovf.ova", "a package has one member that ends in .ovf, this one has none"),
    ],
    ids=["sizes", "no-descriptor"],
)
def test_packages_that_contradict_themselves_are_refused(name: str, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        Ova().read(image_file(package(f"images/{name}.xz"), "x.ova"), OPENER)


def test_a_package_whose_disk_is_text_is_read() -> None:
    file = image_file(package("images/glance/testserver.ova.xz"), "x.ova")
    machine = Ova().read(file, OPENER)
    assert (machine.name, machine.memory.size) == ("testserver", 512 << 20)
    # The disk is refused when it is opened.
    assert [member.table.size for member in Ova().members(file)] == [13383, 4]
