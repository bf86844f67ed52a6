"""Proxmox's backups: the conformance kit, and archives that vmconv writes, as other readers read them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg
from support.requirements import oracle_module
from support.toy_machines import machine
from support.vma_archives import disks_of
from vmconv.errors import PlanError
from vmconv.machine import Disk, Machine
from vmconv.model.options import parse_options
from vmconv.plugin import Blob, ConfigFile, Extents, Kind, Member
from vmconv.testing import MachineTests, image_file, random_bytes
from vmconv_vma import Vma

VMA = Vma()
OPTIONS = parse_options(VMA.options(), {}, "vma")


def package(found: Machine, tables: dict[str, Extents], modulus: int = 1) -> Extents:
    """Returns the archive of an adapted machine; disks without a table are empty."""
    disks = [disk.model_copy(update={"format": disk.format and "raw"}) for disk in found.disks]
    for number, disk in enumerate(disks):
        if disk.file is not None:
            disks[number] = disk.model_copy(update={"file": VMA.disk_name(found, number, ".raw", OPTIONS)})
    found = found.model_copy(update={"disks": tuple(disks)})
    configs = [each._replace(name=each.name or "web.vma") for each in VMA.write(found, OPTIONS)]
    members = [
        Member(disk.file, tables.get(disk.file, Extents.filled(disk.capacity or 512))) for disk in disks if disk.file
    ]
    return VMA.pack(configs, members, modulus, OPTIONS)


class TestVma(MachineTests):
    format = Vma()

    def config(self, machine: Machine) -> bytes:
        table = package(machine, {})
        return table.read(0, table.size)


# -- layout


@st.composite
def tables(draw: st.DrawFn) -> Extents:
    """Returns a disk of any allocation, down to single bytes."""
    size = 512 * draw(st.integers(1, 4000))
    edges = sorted({0, *draw(st.lists(st.integers(1, size - 1), max_size=30))})
    blob = Blob("payload", random_bytes(size, draw(st.integers(0, 9))))
    rows = [
        (at, Kind.DATA, blob, draw(st.integers(0, at))) if draw(st.booleans()) else (at, Kind.ZERO, None, 0)
        for at in edges
    ]
    return Extents.of(rows, size)


def packed(disks: list[Extents], modulus: int = 1) -> Extents:
    members = [Member(f"drive-scsi{number}", table) for number, table in enumerate(disks)]
    return VMA.pack([ConfigFile("web.vma", b"name: web\n")], members, modulus, OPTIONS)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(disks=st.lists(tables(), min_size=1, max_size=4), modulus=st.sampled_from([1, 4096]), seed=st.integers(0, 99))
def test_what_is_written_is_read_byte_by_byte(disks: list[Extents], modulus: int, seed: int) -> None:
    table = packed(disks, modulus)
    data = table.read(0, table.size)
    wanted = {f"drive-scsi{number}": disk.read(0, disk.size) for number, disk in enumerate(disks)}
    assert disks_of(data) == wanted
    found = {each.name: each.table.read(0, each.table.size) for each in VMA.members(image_file(data, "web.vma"))}
    assert found.pop("qemu-server.conf") == b"name: web\n"
    assert found == wanted
    # Headers are computed when they are read: in any piece the same.
    rng = random.Random(seed)
    for _ in range(20):
        at = rng.randrange(len(data))
        length = rng.randrange(min(5000, len(data) - at))
        assert table.read(at, length) == data[at : at + length]


def test_a_second_reader_reads_what_is_written() -> None:
    other = oracle_module("dissect.archive.vma").VMA
    content = random_bytes(5 * MIB, 1)
    blob = Blob("payload", content)
    rows = [(0, Kind.DATA, blob, 0), (MIB, Kind.ZERO, None, 0), (4 * MIB, Kind.DATA, blob, 4 * MIB)]
    table = packed([Extents.of(rows, 5 * MIB), Extents.filled(MIB)], 4096)
    found = other(io.BytesIO(table.read(0, table.size)))
    assert found.config("qemu-server.conf") == b"name: web\n"
    wanted = content[:MIB] + bytes(3 * MIB) + content[4 * MIB :]
    assert {one.name: one.open().read() for one in found.devices()} == {
        "drive-scsi0": wanted,
        "drive-scsi1": bytes(MIB),
    }


def test_payload_is_aligned_if_blocks_can_be_shared() -> None:
    disk = Extents.whole(Blob("payload", bytes(20 * MIB)))
    for modulus, aligned in ((4096, True), (1, False)):
        table = packed([Extents.filled(9 * MIB), disk, Extents.filled(MIB), disk], modulus)
        payload = [row for row in table if row.source is not None and row.source.name == "payload"]
        assert all((row.start - row.offset) % 4096 == 0 for row in payload) == aligned
        assert table.size <= 40 * MIB + 12 * 4096 + 20480


def test_a_large_disk_takes_little_time_and_memory() -> None:
    # 16 TiB: 4.5 million extents.
    blob = Blob("payload", lambda _, length: bytes(length), 1 << 44)
    table = packed([Extents.whole(blob)], 4096)
    assert table.size > 1 << 44
    assert len(table) < 10_000_000


# -- conversions


@pytest.mark.parametrize("origin", ["vmx", "libvirt", "ovf"])
def test_a_machine_survives_its_backup(origin: str, toys: object, tmp_path: Path, qemu_img: QemuImg) -> None:
    config = machine(tmp_path / "toy", disks=[{"file": "system.raw"}, {"file": "data.qcow2"}])
    source = vmconv.machine_convert(config, tmp_path / "source", target_format=origin).target
    backup = vmconv.machine_convert(source, tmp_path / "backup", target_format="vma")
    assert Path(backup.target).name == "vzdump-qemu-100-web.vma"
    back = vmconv.machine_convert(backup.target, tmp_path / "back", target_format=origin)
    assert len(back.plan.disks) == 2
    for disk in back.plan.disks:
        qemu_img("compare", tmp_path / "toy" / "system.raw", Path(back.target).parent / disk.target)
    before, after = vmconv.machine_info(source), vmconv.machine_info(back.target)
    assert (before.name, before.cpu.count, before.memory.size) == (after.name, after.cpu.count, after.memory.size)


def test_no_payload_is_copied_into_a_backup(toys: object, xfs_dir: Path) -> None:
    config = machine(xfs_dir / "toy", disks=[{"file": "system.raw"}, {"file": "data.qcow2"}])
    result = vmconv.machine_convert(config, xfs_dir / "backup", target_format="vma", zero_copy="require")
    assert result.plan.totals.copied == 0
    assert result.plan.totals.shared > 0
    again = vmconv.machine_convert(result.target, xfs_dir / "again", target_format="vma", zero_copy="require")
    assert Path(again.target).read_bytes() == Path(result.target).read_bytes()


def test_another_compression_is_refused(toys: object, tmp_path: Path) -> None:
    config = machine(tmp_path / "toy")
    with pytest.raises(PlanError, match=r"web\.vma\.lzo: vmconv compresses archives by Zstandard or gzip"):
        vmconv.machine_convert(config, tmp_path / "web.vma.lzo")


def test_a_machine_without_disks_has_no_backup() -> None:
    for disks in ((), (Disk(device="/dev/sdb", bus="scsi"),)):
        with pytest.raises(PlanError, match="at least one disk"):
            VMA.adapt(Machine(name="web", disks=disks), OPTIONS)


def test_what_an_archive_cannot_hold_is_refused() -> None:
    odd = Extents.filled(100)
    with pytest.raises(PlanError, match="whole sectors"):
        packed([odd])
    with pytest.raises(PlanError, match="281474976711168 bytes, disks of a backup have 281474976710656 at most"):
        packed([Extents.filled((65536 << 32) + 512)])
    with pytest.raises(PlanError, match="more than a backup can have"):
        packed([Extents.filled(512)] * 255)
    with pytest.raises(PlanError, match="'a,b' cannot be the name of a device"):
        VMA.pack([ConfigFile("web.vma", b"")], [Member("a,b", Extents.filled(512))], 1, OPTIONS)
    long = Machine(name="web", description="x" * 60_000, disks=(Disk(bus="scsi", capacity=512, file="drive-scsi0"),))
    with pytest.raises(PlanError, match="fit into a backup"):
        VMA.write(long.model_copy(update={"extra": {"proxmox": {"tags": "y" * 60_000}}}), OPTIONS)
