"""Proxmox's backups are read: the machine, its disks, and archives that are not as they should be."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg
from support.requirements import oracle_module
from support.vma_archives import CONF, UUID, Archive, conf_of, disks_of, extent, sealed
from vmconv.errors import ImageError, VmconvError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry, installed_machines
from vmconv.machine import Machine
from vmconv.testing import image_file, random_bytes
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_vma import Vma

VMA = Vma()
EFI = bytes(540672)


def read(data: bytes) -> Machine:
    return VMA.read(image_file(data, "web.vma"), Opener(Registry()))


def members(data: bytes) -> dict[str, bytes]:
    found = VMA.members(image_file(data, "web.vma"))
    return {each.name: each.table.read(0, each.table.size) for each in found}


def sparse(size: int, seed: int, *, pieces: int = 20) -> bytes:
    """Returns a disk with random pieces of payload of any alignment."""
    rng, disk = random.Random(seed), bytearray(size)
    for _ in range(pieces):
        piece = rng.randbytes(rng.randrange(1, 100_000))
        at = rng.randrange(size)
        disk[at : at + len(piece)] = piece[: size - at]
    return bytes(disk)


def simple(disk: bytes = b"", **changes: object) -> Archive:
    return Archive({"drive-scsi0": disk or sparse(MIB, 1)}, {"qemu-server.conf": conf_of(CONF, "scsi0")}, **changes)  # type: ignore[arg-type]


# -- what Proxmox writes


def test_the_machine_is_that_of_the_configuration() -> None:
    conf = CONF + (
        "bios: ovmf\nefidisk0: local-lvm:vm-100-disk-1,efitype=4m,size=4M\n"
        "tpmstate0: local-lvm:vm-100-disk-2,size=4M,version=v2.0\n"
        "scsi1: nfs:100/vm-100-disk-3.qcow2,backup=0,size=32G\n"
    )
    disks = {"drive-efidisk0": EFI, "drive-scsi0": sparse(MIB, 1), "drive-tpmstate0-backup": bytes(4 * MIB)}
    configs = {
        "qemu-server.fw": b"[OPTIONS]\nenable: 1\n",
        "qemu-server.conf": conf_of(conf, "efidisk0", "scsi0", "tpmstate0"),
    }
    found = read(Archive(disks, configs).written())
    assert (found.name, found.description, found.cpu.count) == ("web", "web, from the shop", 2)
    assert [(disk.file, disk.format, disk.capacity) for disk in found.disks] == [
        ("drive-scsi0", "raw", MIB),
        (None, None, 32 << 30),
    ]
    # It is not in the backup.
    assert found.disks[1].device == "vm-100-disk-3.qcow2"
    assert found.firmware.nvram is not None
    assert found.firmware.nvram.file == "drive-efidisk0"
    assert found.tpm is not None
    assert found.tpm.state == "drive-tpmstate0-backup"
    assert found.extra["vma"] == {"qemu-server.fw": "[OPTIONS]\nenable: 1"}


def test_devices_are_found_without_comments() -> None:
    found = read(
        Archive({"drive-scsi0": bytes(MIB), "vmstate": bytes(MIB)}, {"qemu-server.conf": CONF.encode()}).written()
    )
    assert found.disks[0].file == "drive-scsi0"
    assert found.extra["vma"] == {"device.vmstate": "1048576 bytes"}


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    sizes = draw(st.lists(st.integers(1, 2048), min_size=1, max_size=3))
    disks = {f"drive-scsi{number}": sparse(512 * size, draw(st.integers(0, 99))) for number, size in enumerate(sizes)}
    order = [(number, at) for number, data in enumerate(disks.values(), 1) for at in range(-(-len(data) // 65536))]
    if draw(st.booleans()):
        order = draw(st.permutations(order))
    return Archive(
        disks,
        {"qemu-server.conf": conf_of(CONF, "scsi0")},
        order=order,
        per_extent=draw(st.integers(1, 59)),
        keep_zeros=draw(st.booleans()),
        header_padding=512 * draw(st.integers(0, 8)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(archive=archives())
def test_any_archive_has_its_disks(archive: Archive) -> None:
    data = archive.written()
    assert disks_of(data) == archive.disks
    found = members(data)
    assert found.pop("qemu-server.conf") == archive.configs["qemu-server.conf"]
    assert found == archive.disks


def test_a_second_reader_finds_the_same() -> None:
    Other = oracle_module("dissect.archive.vma").VMA  # noqa: N806
    data = Archive({"drive-scsi0": sparse(3 * MIB, 4)}, {"qemu-server.conf": conf_of(CONF, "scsi0")}).written()
    other = Other(io.BytesIO(data))
    assert other.config("qemu-server.conf") == conf_of(CONF, "scsi0")
    assert {one.name: one.open().read() for one in other.devices()} == {"drive-scsi0": members(data)["drive-scsi0"]}


def test_many_extents_take_little_memory() -> None:
    # 600 extents of one cluster are more than are looked at together.
    disk = sparse(600 * 65536, 7, pieces=200)
    with memory_limit():
        assert members(simple(disk, per_extent=1).written())["drive-scsi0"] == disk


# -- conversions


@pytest.fixture
def backup(xfs_dir: Path) -> Path:
    """A backup of a dense disk on XFS, with the disk beside it."""
    disk = random_bytes(8 * MIB, 5)
    (xfs_dir / "web.vma").write_bytes(simple(disk).written())
    (xfs_dir / "disk.raw").write_bytes(disk)
    return xfs_dir / "web.vma"


@pytest.mark.parametrize("target", sorted(name for name, one in installed_machines().machines.items() if one.can_write))
def test_a_backup_becomes_a_machine_of_any_platform(target: str, backup: Path, qemu_img: QemuImg) -> None:
    result = vmconv.machine_convert(backup, backup.parent / "new", target_format=target)
    for disk in result.plan.disks:
        made = Path(result.target).parent / disk.target
        if made.exists():
            assert vmconv.compare(made, backup.parent / "disk.raw")
            if disk.target_format in ("raw", "qcow2", "vmdk", "vdi"):
                qemu_img("compare", backup.parent / "disk.raw", made)
    assert len(result.plan.disks) == 1


def test_grains_of_a_vmdk_share_all_blocks(backup: Path) -> None:
    # Grains begin at any sector, so their phase can be that of the archive.
    result = vmconv.machine_convert(backup, backup.parent / "new", target_format="vmx", zero_copy="require")
    assert result.plan.totals.shared >= 8 * MIB


def test_small_clusters_of_a_qcow2_share_nearly_all_blocks(backup: Path) -> None:
    plan = vmconv.machine_plan(backup, backup.parent / "new", target_format="libvirt")
    # Only the edges of extents are copied.
    assert plan.totals.copied < 32 * 1024
    assert plan.totals.shared > 8 * MIB - 32 * 1024


def test_a_raw_disk_shares_the_extents_at_its_phase(backup: Path) -> None:
    plan = vmconv.machine_plan(backup, backup.parent / "new", target_format="libvirt", disk_format="raw")
    # Extents are 512 bytes out of step with each other; three hold this disk, and at most one in eight fits.
    assert plan.totals.shared + plan.totals.copied == 8 * MIB
    assert plan.totals.copied > 0
    assert "offset" in " ".join(copy.reason for copy in plan.copies)


def test_a_reference_leaves_all_payload_in_the_backup(backup: Path, qemu_img: QemuImg) -> None:
    result = vmconv.machine_convert(backup, backup.parent, target_format="vmx", disk_options={"subformat": "reference"})
    assert result.plan.totals.copied == 0
    qemu_img("compare", backup.parent / "disk.raw", backup.parent / result.plan.disks[0].target)


def test_a_backup_is_no_disk(backup: Path) -> None:
    with pytest.raises(ImageError, match="not a disk") as error:
        vmconv.info(backup)
    assert "vmconv machine convert" in str(error.value.hint)


# -- archives that are not as they should be


def _header(at: int, new: bytes, *, seal: bool = True) -> bytes:
    """Returns an archive with other bytes in its header."""
    data = simple().written()
    size = struct.unpack(">I", data[56:60])[0]
    head = data[:at] + new + data[at + len(new) :]
    return (sealed(head[:size], 32) if seal else head[:size]) + data[size:]


def _extents(*extents: bytes, size: int = MIB) -> bytes:
    archive = simple(bytes(size))
    return archive.header() + b"".join(extents)


def _zeros(count: int, device: int = 1, first: int = 0) -> bytes:
    return extent([(0, device, first + number) for number in range(count)], b"")


ONE = b"x" * 4096
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "version": (lambda: _header(4, struct.pack(">I", 2)), "version at 0x4: 2 is not supported"),
    "md5 of the header": (lambda: _header(100, b"x", seal=False), "md5sum at 0x20"),
    "header too small": (lambda: _header(56, struct.pack(">I", 100), seal=False), "header_size at 0x38: 100 is not in"),
    "header too large": (lambda: _header(56, b"\xff" * 4, seal=False), "header_size at 0x38: 4294967295 is not in"),
    "header past the end": (lambda: _header(56, struct.pack(">I", 4 * MIB), seal=False), "header_size at 0x38"),
    "blobs before the header's end": (lambda: _header(48, struct.pack(">I", 60)), "blob_buffer_offset at 0x30"),
    "too many blobs": (lambda: _header(52, struct.pack(">I", MIB)), "blob_buffer_size at 0x34"),
    "config name past the blobs": (lambda: _header(2044, b"\x7f\xff\xff\xff"), r"config_names\[0\] at 0x7fc"),
    "config data past the blobs": (lambda: _header(3068, struct.pack(">I", 1022)), r"config_data\[0\] at 0xbfc"),
    "device too large": (lambda: _header(4096 + 40, b"\x7f" * 8), r"dev_info\[1\] size at 0x1028"),
    "device name in data": (lambda: _header(4096 + 32, struct.pack(">I", 2)), r"dev_info\[1\] name at 0x1020"),
    "no extents": (_extents, "cluster 0 of 16 is missing"),
    "extent cut off": (lambda: simple().written()[:-1], "reach past the end of the file"),
    "extent header cut off": (lambda: simple().written() + bytes(511), "header is cut off after 511 bytes"),
    "extent magic": (lambda: _extents(sealed(b"VMAX" + _zeros(16)[4:], 24)), "extent magic at"),
    "extent uuid": (lambda: _extents(_zeros(16).replace(UUID, bytes(16))), "extent uuid at"),
    "extent md5": (lambda: _extents(_zeros(16)[:24] + b"x" * 16 + _zeros(16)[40:]), "extent md5sum at"),
    "more blocks than entries": (lambda: _extents(extent([(1, 1, 0)], ONE * 2)), "block_count at .*: is 2, .* have 1"),
    "fewer blocks than entries": (lambda: _extents(extent([(3, 1, 0)], ONE)), "block_count at .*: is 1, .* have 2"),
    "most blocks": (lambda: _extents(extent([(1, 1, 0)], ONE, count=0xFFFF)), "reach past the end of the file"),
    "unknown device": (lambda: _extents(_zeros(16), _zeros(1, 2)), "cluster 0 of device 2 is of a device that"),
    "last device": (lambda: _extents(_zeros(16), _zeros(1, 255)), "device 255 is of a device that"),
    "cluster past the end": (lambda: _extents(_zeros(17)), "entry 16 of an extent at .*: cluster 16 .*past the end"),
    "last cluster": (lambda: _extents(_zeros(1, first=0xFFFFFFFF)), "cluster 4294967295 .*past the end"),
    "block past the end": (
        lambda: _extents(extent([(2, 1, 0)], ONE), size=4096),
        "cluster 0 of device 1 has blocks past the end of the device",
    ),
    "cluster twice": (lambda: _extents(_zeros(16), _zeros(1, first=3)), "cluster 3 is in the archive twice"),
    "cluster twice in an extent": (lambda: _extents(extent([(0, 1, 5)] * 2, b"")), "cluster 5 is in the archive twice"),
    "cluster missing": (lambda: _extents(_zeros(7), _zeros(8, first=8)), "cluster 7 of 16 is missing"),
    "last cluster missing": (lambda: _extents(_zeros(15)), "cluster 15 of 16 is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_archive_is_refused_in_one_line(name: str) -> None:
    make, wanted = HOSTILE[name]
    data = make()
    with time_limit(), memory_limit(), pytest.raises(ImageError, match=wanted) as error:
        read(data)
        members(data)
    assert str(error.value).startswith("web.vma: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1 << 46, 1 << 62, (1 << 64) - 1])
def test_a_huge_device_takes_no_memory(size: int) -> None:
    data = _header(4096 + 40, struct.pack(">Q", size))
    with time_limit(), memory_limit(), pytest.raises(ImageError, match=r"is missing|dev_info\[1\] size"):
        members(data)


def test_a_name_twice_is_refused() -> None:
    data = bytearray(simple().written())
    data[2048:2052], data[3072:3076] = data[2044:2048], data[3068:3072]
    size = struct.unpack(">I", data[56:60])[0]
    with pytest.raises(ImageError, match=r"config_names\[1\] at 0x800: 'qemu-server.conf' is there twice"):
        read(sealed(bytes(data[:size]), 32))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/dev/sda", "a,b", "a b", "", "-rf", "a:b", "x" * 200, "\u00fc", "a\n#qmdump#map:"]
)
def test_names_of_devices_are_plain(name: str) -> None:
    with pytest.raises(ImageError, match=r"dev_info\[1\] name at 0x1020: blob 0x[0-9a-f]+ .* is no name"):
        read(Archive({name: bytes(MIB)}, {"qemu-server.conf": CONF.encode()}).written())


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("#qmdump#map:scsi0:../../../etc/passwd:local:raw:", "the archive has no device '../../../etc/passwd'"),
        ("#qmdump#map:scsi0:drive-scsi7:local:raw:", "the archive has no device 'drive-scsi7'"),
        ("scsi0: drive-scsi0,file=/etc/passwd", "property 'file' is given twice"),
        ("scsi99: local:1", "scsi99"),
        ("no setting", 'is not "key: value"'),
        ("rootfs: local:1", "container"),
    ],
)
def test_traps_in_the_configuration_are_refused(line: str, wanted: str) -> None:
    data = Archive({"drive-scsi0": bytes(MIB)}, {"qemu-server.conf": f"{CONF}{line}\n".encode()}).written()
    with pytest.raises(ImageError) as error:
        read(data)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("volume", ["/etc/passwd", "../../etc/passwd", "local:100/../../../etc/passwd", "nbd:host:1"])
def test_no_volume_outside_the_archive_is_opened(volume: str, tmp_path: Path) -> None:
    conf = CONF.replace("local-lvm:vm-100-disk-0", volume).replace("scsi0", "scsi5")
    (tmp_path / "web.vma").write_bytes(
        Archive({"drive-ide0": bytes(MIB)}, {"qemu-server.conf": conf.encode()}).written()
    )
    try:
        result = vmconv.machine_convert(tmp_path / "web.vma", tmp_path / "new", target_format="libvirt")
    except VmconvError as error:
        assert "\n" not in str(error)
    else:
        assert result.plan.disks == ()
        assert result.plan.opened == (str(tmp_path / "web.vma"),)


def test_an_archive_without_a_configuration_is_refused() -> None:
    with pytest.raises(ImageError, match=r"has no qemu-server.conf, its configurations are: lxc.conf"):
        read(Archive({"drive-scsi0": bytes(MIB)}, {"lxc.conf": b""}).written())
