"""Each real VMX of the corpus, against what libvirt and virt-v2v expect of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from support.corpus import configurations
from vmconv.machine import Machine
from vmconv.testing import image_file
from vmconv_vmx import Vmx
from vmconv_vmx.options import Options

FORMAT = Vmx()


@pytest.fixture(scope="module")
def machines() -> dict[str, Machine]:
    """The machines of all VMX in the corpus, by path."""
    found = {}
    for path, content in configurations(".vmx").items():
        file = image_file(content, Path(path).name)
        assert FORMAT.probe(file), path
        found[path] = FORMAT.read(file, None)  # type: ignore[arg-type]
    return found


def test_all_are_read(machines: dict[str, Machine]) -> None:
    counts: Counter[str] = Counter()
    for machine in machines.values():
        counts["machines"] += 1
        counts["uuid"] += machine.identity.uuid is not None
        counts["uefi"] += machine.firmware.kind == "uefi"
        counts["systems"] += machine.os.id is not None
        counts["physical disks"] += sum(disk.device is not None for disk in machine.disks)
        counts["static addresses"] += sum(nic.mac_origin == "static" for nic in machine.nics)
        counts["generated addresses"] += sum(nic.mac_origin == "generated" for nic in machine.nics)
        for kind in ("disks", "removables", "nics", "controllers", "serials"):
            counts[kind] += len(getattr(machine, kind))
    assert counts == {
        "machines": 71,
        "uuid": 46,
        "uefi": 3,
        "systems": 11,
        "physical disks": 0,
        "static addresses": 15,
        "generated addresses": 31,
        "disks": 61,
        "removables": 47,
        "nics": 46,
        "controllers": 68,
        "serials": 7,
    }


def test_all_are_the_same_after_writing(machines: dict[str, Machine]) -> None:
    for path, machine in machines.items():
        adapted = FORMAT.adapt(machine, Options())
        content = FORMAT.write(adapted.machine, Options())[-1].content
        again = FORMAT.read(image_file(content, Path(path).name), None)  # type: ignore[arg-type]
        assert again.model_dump(exclude=LEFT) == adapted.machine.model_dump(exclude=LEFT), path
        changed = {each.path for each in adapted.substitutions}
        assert changed <= ({"nics[2].mac_origin"} if path.endswith("mac-type.vmx") else set()), path


LEFT: Any = {"firmware": {"nvram"}}
"""VMware makes a new NVRAM."""


def ours(machine: Machine) -> dict[str, object]:
    """The fields that libvirt's XML has too, in its terms."""
    memory = machine.memory.size
    return {
        "name": machine.name,
        "memory": memory and str(memory >> 10),
        "vcpu": str(machine.cpu.count),
        "uuid": str(machine.identity.uuid_text or machine.identity.uuid or ""),
        "generation id": str(machine.identity.generation_id or ""),
        "description": machine.description,
        "architecture": machine.os.architecture,
        "firmware": machine.firmware.kind,
        "disks": sorted((str(disk.bus), _base(disk.file or disk.device)) for disk in machine.disks),
        "drives": sorted(str(one.bus) for one in machine.removables if one.kind == "cdrom"),
        "floppies": sum(one.kind == "floppy" for one in machine.removables),
        "cards": [(nic.mac, nic.model, nic.network) for nic in machine.nics],
        "scsi": sorted((one.index, one.model) for one in machine.controllers if one.bus == "scsi"),
        "serials": len(machine.serials),
    }


def _base(name: str | None) -> str:
    return (name or "").rpartition("/")[2]


def theirs(domain: Element) -> dict[str, object]:
    """The same fields of libvirt's XML."""
    disks = [(disk.get("device", "disk"), _at(disk, "target", "bus"), disk) for disk in domain.iterfind("devices/disk")]
    uuid = domain.findtext("uuid") or ""
    return {
        "name": domain.findtext("name"),
        "memory": domain.findtext("memory"),
        "vcpu": domain.findtext("vcpu"),
        "uuid": uuid if uuid.strip("0-") else "",
        "generation id": domain.findtext("genid") or "",
        "description": (domain.findtext("description") or "").strip() or None,
        "architecture": _at(domain, "os/type", "arch"),
        "firmware": "uefi" if _at(domain, "os", "firmware") == "efi" else "bios",
        "disks": sorted(
            (bus, _base(_at(disk, "source", "file") or _at(disk, "source", "dev")))
            for kind, bus, disk in disks
            if kind in ("disk", "lun")
        ),
        "drives": sorted(bus for kind, bus, _ in disks if kind == "cdrom"),
        "floppies": sum(kind == "floppy" for kind, _, _ in disks),
        "cards": [
            (
                _at(card, "mac", "address") or None,
                _at(card, "model", "type").replace("vlance", "pcnet32") or None,
                _at(card, "source", "bridge") or _at(card, "source", "network") or None,
            )
            for card in domain.iterfind("devices/interface")
        ],
        "scsi": sorted(
            (int(one.get("index", "0")), one.get("model", "").replace("vmpvscsi", "pvscsi") or None)
            for one in domain.iterfind("devices/controller[@type='scsi']")
        ),
        "serials": len(domain.findall("devices/serial")),
    }


def _at(element: Element, path: str, attribute: str) -> str:
    found = element.find(path)
    return "" if found is None else found.get(attribute, "")


def test_libvirt_expects_the_same_of_its_samples(machines: dict[str, Machine]) -> None:
    """Files by field that differ.

    memory: libvirt assumes VMware's 32 MiB if the VMX is silent. architecture: it assumes i686. generation id: it
    orders the bytes in its own way; ours are those that virt-v2v measured. drives: it leaves out a drive of the client,
    and takes the host's drive for a disk. floppies: it leaves out a floppy drive that is present by default.
    """
    expected = configurations(".xml")
    different: dict[str, list[str]] = defaultdict(list)
    compared = 0
    for path, machine in machines.items():
        folder, _, name = path.rpartition("/")
        pair = {"serial-pipe-client-vm.vmx": "serial-pipe.xml"}.get(name, name.replace(".vmx", ".xml"))
        if folder != "libvirt/vmx2xmldata":
            continue
        compared += 1
        wanted = theirs(ElementTree.fromstring(expected[f"{folder}/{pair}"]))
        for field, value in ours(machine).items():
            if value != wanted[field]:
                different[field].append(name.removesuffix(".vmx"))
    assert compared == 35
    silent = [name for name in different.pop("memory") if "wild" not in name]
    assert len(silent) == 24
    assert set(different.pop("architecture")) <= set(silent)
    wild = [f"esx-in-the-wild-{number}" for number in (1, 10, 11, 14, 4, 5)]
    assert different == {
        "generation id": ["esx-in-the-wild-10"],
        "disks": ["cdrom-scsi-raw-device"],
        "drives": ["cdrom-scsi-raw-device", *wild],
        "floppies": ["esx-in-the-wild-2", "esx-in-the-wild-6", "ws-in-the-wild-1"],
    }


def test_virt_v2v_expects_the_same_of_its_samples(machines: dict[str, Machine]) -> None:
    for number, disks, network in (
        (1, ["scsi"] * 21, 'Network "VM Network" mac: 00:0c:29:36:ef:31 [vmxnet3]'),
        (3, ["scsi"], 'Network "VM Network" mac: 00:0c:29:4b:2b:8c [vmxnet3]'),
        (4, ["scsi"], 'Network "VM Network" mac: 00:0c:29:94:89:23 [e1000]'),
        (5, ["scsi"], 'Bridge "ethernet0" mac: 00:0c:29:bf:e4:5d [e1000e]'),
        (6, ["nvme"], 'Network "VM Network" mac: 00:50:56:ac:cf:51 [vmxnet3]'),
    ):
        machine = machines[f"virt-v2v/test-i-vmx-{number}.vmx"]
        text = configurations(".expected")[f"virt-v2v/test-i-vmx-{number}.expected"].decode()
        (nic,) = machine.nics
        kind, name = ("Bridge", "ethernet0") if nic.network_kind == "bridged" else ("Network", nic.network)
        assert f'{kind} "{name}" mac: {nic.mac} [{nic.model}]' == network
        assert [disk.bus for disk in machine.disks] == disks
        assert f"source name: {machine.name}\n" in text
        assert f"memory: {machine.memory.size} (bytes)\n" in text
        assert f"nr vCPUs: {machine.cpu.count}\n" in text
        assert f"firmware: {machine.firmware.kind}\n" in text
        assert f"VM genid: {machine.identity.generation_id or ''}\n" in text
        assert network in text
        assert [line for line in text.splitlines() if line.startswith("\t")][: len(disks)] == [
            f"\t{at} [{bus}]" for at, bus in enumerate(disks)
        ]
