"""Configurations of machines and firmware variables, as strangers write them."""

from __future__ import annotations

import contextlib
import gzip
from typing import TYPE_CHECKING, Any

from fuzz.target import Target
from vmconv.errors import VmconvError
from vmconv.interface.machines import MachineFormat
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed_machines
from vmconv.model.options import parse_options
from vmconv.testing.disks import image_file

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File

_MIB = 1 << 20


def machine_formats() -> list[str]:
    """Returns the names of the machine formats that are read."""
    return sorted(name for name, one in installed_machines().machines.items() if one.can_read)


def written(one: MachineFormat, machine: Machine) -> bytes:
    """Returns a configuration, or a package without disks."""
    options = parse_options(one.options(), {}, one.name)
    adapted = one.adapt(machine, options).machine
    configs = one.write(adapted, options)
    if one.is_package:
        table = one.pack([config._replace(name=config.name or "web.ovf") for config in configs], [], 512, options)
        return table.read(0, table.size)
    return configs[-1].content


def sample() -> Machine:
    """Returns a machine with a device of each kind."""
    from uuid import UUID

    from vmconv import machine as m

    return m.Machine(
        name="web",
        description="a shop\nin two lines",
        os=m.GuestOS(id="debian12", architecture="x86_64"),
        cpu=m.Cpu(count=4, sockets=2, cores=2, threads=1),
        memory=m.Memory(size=2048 * _MIB),
        firmware=m.Firmware(kind="uefi", secure_boot=True, boot_order=("disk", "network")),
        tpm=m.Tpm(version="2.0"),
        identity=m.Identity(uuid=UUID(int=0x12345678123412341234123456789ABC), serial="A1", manufacturer="Acme"),
        controllers=(m.Controller(bus="scsi", index=0, model="pvscsi"), m.Controller(bus="sata", index=0)),
        disks=tuple(
            m.Disk(file=f"d{at}.img", format="raw", capacity=_MIB, file_size=_MIB, bus="scsi", controller=0, unit=at)
            for at in range(2)
        ),
        removables=(m.Removable(kind="cdrom", bus="sata", controller=0, unit=0),),
        nics=(m.Nic(mac="00:50:56:01:02:03", mac_origin="static", model="vmxnet3", network="VM Network"),),
        serials=(m.Serial(kind="pipe", target="/tmp/pipe"),),
        usb="xhci",
    )


def _backups() -> list[bytes]:
    """Returns archives with disks, plain and compressed. Their checksums keep most changes from getting far."""
    from support.vma_archives import CONF, Archive, conf_of

    disk = bytes(70_000) + b"payload" * 1000
    plain = Archive({"drive-scsi0": disk}, {"qemu-server.conf": conf_of(CONF, "scsi0")}).written()
    return [plain, gzip.compress(plain, mtime=0)]


def _exports() -> list[bytes]:
    from support.xva_archives import export

    plain = export({"Ref:12": b"x" * 3000})
    return [plain, export({"Ref:12": b"x" * 3000}, HVM_boot_policy=""), gzip.compress(plain, mtime=0)]


def _configurations() -> list[bytes]:
    from support.hyperv_machines import FIRST_GENERATION, SECOND_GENERATION
    from support.hyperv_storage import storage

    return [storage({"configuration": tree}) for tree in (FIRST_GENERATION, SECOND_GENERATION)]


def _objects() -> list[bytes]:
    import yaml

    from support.machine_documents import KUBEVIRT

    volume = "---\nkind: DataVolume\nmetadata: {name: x}\nspec: {source: {http: {url: u}}, storage: {}}\n"
    return [f"{KUBEVIRT}{volume}".encode(), yaml.safe_dump(yaml.safe_load(KUBEVIRT)).encode()]


class HypervTarget(Target):
    """Key tables of a configuration of Hyper-V in a sound container, with checksums that are right."""

    def __init__(self) -> None:
        self._inner = MachineTarget("hyperv")

    def seeds(self) -> list[bytes]:
        from support.hyperv_storage import TABLES

        return [seed[TABLES:].rstrip(b"\0") for seed in self._inner.seeds()]

    def run(self, data: bytes) -> None:
        from support.hyperv_storage import TABLES, resealed

        frame = self._inner.seeds()[0]
        self._inner.run(resealed((frame[:TABLES] + data).ljust(len(frame), b"\0")))


def _read_package(one: MachineFormat, file: File) -> None:
    with contextlib.suppress(VmconvError):
        one.read(file, Opener(Registry()))
    with contextlib.suppress(VmconvError):
        for member in one.members(file):
            member.table.read(0, min(member.table.size, _MIB))
    with contextlib.suppress(VmconvError):
        one.check_payload(file)


class VmaTarget(Target):
    """Backups of Proxmox whose checksums are right, whatever their fields are."""

    def seeds(self) -> list[bytes]:
        return _backups()[:1]

    def run(self, data: bytes) -> None:
        from support.vma_archives import sealed

        one = installed_machines().machines["vma"]
        size = int.from_bytes(data[56:60], "big")
        if data[:4] == b"VMA\0" and 12288 < size <= len(data):
            parts = [sealed(data[:size], 32)]
            for at in range(size, len(data), 512):
                block = data[at : at + 512]
                parts.append(sealed(block, 24) if block[:4] == b"VMAE" and len(block) == 512 else block)
            data = b"".join(parts)
        for file in (image_file(data, "web.vma"), image_file(gzip.compress(data, 1, mtime=0), "web.vma.gz")):
            _read_package(one, file)


class XvaTarget(Target):
    """Exports of XenServer whose headers have right checksums, plain and compressed, and their digests."""

    def seeds(self) -> list[bytes]:
        return _exports()[:2]

    def run(self, data: bytes) -> None:
        from support.xva_archives import summed

        one = installed_machines().machines["xva"]
        data = b"".join(summed(data[at : at + 512]) for at in range(0, len(data), 512))
        for file in (image_file(data, "web.xva"), image_file(gzip.compress(data, 1, mtime=0), "web.xva.gz")):
            _read_package(one, file)


class MachineTarget(Target):
    """The reader of a machine format; what it finds is then written in every other format."""

    def __init__(self, name: str) -> None:
        self._format = installed_machines().machines[name]

    def seeds(self) -> list[bytes]:
        from vmconv.machine import Machine, Memory

        small = Machine(name="x", memory=Memory(size=64 * _MIB))
        own = {"vma": _backups, "xva": _exports, "hyperv": _configurations, "kubevirt": _objects}
        if self._format.name in own:
            return own[self._format.name]()
        if not self._format.can_write or not self._reads_own():
            return [b"\0" * 64, b"<?xml version='1.0'?><x/>"]
        return [written(self._format, machine) for machine in (sample(), small)]

    def _reads_own(self) -> bool:
        return self._format.probe(image_file(written(self._format, sample())))

    def run(self, data: bytes) -> None:
        file = image_file(data, f"web{self._format.suffixes[0]}")
        with contextlib.suppress(VmconvError):
            self._format.probe(file)
            machine = self._format.read(file, Opener(Registry()))
            self._format.members(file)
            for other in installed_machines().machines.values():
                if other.can_write:
                    _written_as(other, machine)


def _written_as(other: MachineFormat, machine: Machine) -> None:
    options: Any = parse_options(other.options(), {}, other.name)
    with contextlib.suppress(VmconvError):
        other.write(other.adapt(machine, options).machine, options)


class NvramTarget(Target):
    """Stores of firmware variables of any kind."""

    def seeds(self) -> list[bytes]:
        from vmconv.machine import nvram

        empty = nvram.Store("ovmf", ())
        return [nvram.converted(empty, "ovmf", size="2M")[0][:4096], b"MRVN" + bytes(200), b"GUESTRTS" + bytes(504)]

    def run(self, data: bytes) -> None:
        from vmconv.machine import nvram

        # A store is large and mostly blank; the input is its beginning.
        for content in (data, data.ljust(0x40000, b"\xff")):
            with contextlib.suppress(VmconvError):
                nvram.converted(nvram.read(content, "web.nvram"), "ovmf")
