"""Compressed backups are decoded once, into files without a name, and planned without decoding them."""

from __future__ import annotations

import errno
import gzip
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import vmconv
from support.disks import MIB, QemuImg
from support.requirements import oracle_program
from support.vma_archives import CONF, Archive, conf_of, extent
from vmconv.errors import BackendError, ImageError, PlanError, VmconvError, ZeroCopyError
from vmconv.machine import nvram
from vmconv.plugin import Beginning, Decoded, Decompressed, File
from vmconv.testing import image_file, random_bytes
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_vma import Vma

VMA = Vma()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKED: dict[str, Callable[[bytes], bytes]] = {"zst": zst, "gz": gzip.compress}


def disk(seed: int, size: int = 4 * MIB) -> bytes:
    """Returns a disk, half of it holes."""
    rng, found = random.Random(seed), bytearray(size)
    for at in range(0, size, 128 * 1024):
        found[at : at + 64 * 1024 - 100] = rng.randbytes(64 * 1024 - 100)
    return bytes(found)


def archive(*disks: bytes) -> Archive:
    keys = [f"scsi{number}" for number in range(len(disks))]
    conf = CONF.replace("scsi0: local-lvm:vm-100-disk-0,size=1M\n", "")
    conf += "".join(f"{key}: local-lvm:vm-100-disk-{key},size=4M\n" for key in keys)
    named = dict(zip((f"drive-{key}" for key in keys), disks, strict=True))
    return Archive(named, {"qemu-server.conf": conf_of(conf, *keys)})


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_dir")
    return found


@pytest.mark.parametrize("kind", PACKED)
def test_all_disks_of_a_compressed_backup_are_made(kind: str, directory: Path, qemu_img: QemuImg) -> None:
    disks = [disk(1), disk(2, 3 * MIB - 512)]
    path = directory / f"web.vma.{kind}"
    path.write_bytes(PACKED[kind](archive(*disks).written()))
    result = vmconv.machine_convert(path, directory / "new", target_format="libvirt")
    for number, content in enumerate(disks):
        (directory / "disk.raw").write_bytes(content)
        qemu_img("compare", directory / "disk.raw", directory / "new" / result.plan.disks[number].target)
    assert sorted(os.listdir(directory / "new")) == ["web-disk1.qcow2", "web-disk2.qcow2", "web.xml"]
    assert result.plan.totals.shared == 0
    assert result.plan.totals.copied >= sum(content.count(b"\0") < len(content) for content in disks) * MIB


def test_payload_is_written_once_where_blocks_can_be_shared(xfs_dir: Path) -> None:
    (xfs_dir / "web.vma.zst").write_bytes(zst(archive(disk(1, 32 * MIB)).written()))
    plan = vmconv.machine_plan(xfs_dir / "web.vma.zst", xfs_dir / "new", target_format="libvirt")
    assert not any("twice" in warning for warning in plan.warnings)
    before = used(xfs_dir)
    result = vmconv.machine_convert(xfs_dir / "web.vma.zst", xfs_dir / "new", target_format="libvirt")
    payload = 16 * MIB
    assert used(xfs_dir) - before < payload + 2 * MIB
    (reason,) = result.plan.copies
    assert reason.reason == "the archive is compressed (Zstandard)"
    assert result.plan.notes == ()


def used(directory: Path) -> int:
    os.sync()
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_the_plan_says_that_payload_is_written_twice(ext4_dir: Path) -> None:
    (ext4_dir / "web.vma.gz").write_bytes(gzip.compress(archive(disk(1)).written()))
    plan = vmconv.machine_plan(ext4_dir / "web.vma.gz", ext4_dir / "new", target_format="libvirt")
    assert any("cannot share blocks, so payload will be written twice" in warning for warning in plan.warnings)
    result = vmconv.machine_convert(ext4_dir / "web.vma.gz", ext4_dir / "new", target_format="libvirt")
    assert any("written twice" in note for note in result.plan.notes)


def test_a_plan_decodes_no_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "web.vma.zst"
    path.write_bytes(zst(archive(disk(1, 40 * MIB)).written()))
    read = 0
    original = Decompressed.read

    def counted(stream: Decompressed, length: int) -> bytes:
        nonlocal read
        read += length
        return original(stream, length)

    monkeypatch.setattr(Decompressed, "read", counted)
    plan = vmconv.machine_plan(path, tmp_path / "new", target_format="libvirt")
    assert read < 200_000
    assert plan.totals.copied == 40 * MIB
    assert [copy.reason for copy in plan.copies] == ["the archive is compressed (Zstandard)"]
    assert any("will be decoded once" in warning for warning in plan.warnings)
    assert not (tmp_path / "new").exists()
    assert vmconv.machine_info(path).name == "web"


def test_what_is_announced_is_announced_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmconv.machine.pipeline import run
    from vmconv.machine.request import MachinePlan, MachineRequest

    path = tmp_path / "web.vma.zst"
    path.write_bytes(zst(archive(disk(1)).written()))
    events: list[str] = []
    original = Vma.decode

    def decode(*arguments: Any) -> Any:
        events.append("decoded")
        return original(*arguments)

    def announce(plan: MachinePlan) -> None:
        events.append("announced")

    monkeypatch.setattr(Vma, "decode", decode)
    run(MachineRequest(str(path), str(tmp_path / "new"), target_format="libvirt"), announce=announce)
    assert events == ["announced", "decoded"]


@pytest.mark.parametrize("change", [{"zero_copy": "require"}, {"strict": True}], ids=["zero-copy", "strict"])
def test_what_is_refused_is_refused_before_decoding(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "web.vma.zst"
    path.write_bytes(zst(archive(disk(1)).written()))
    monkeypatch.setattr(Vma, "decode", None)
    with pytest.raises((ZeroCopyError, PlanError)):
        vmconv.machine_convert(path, tmp_path / "new", target_format="libvirt", **change)
    assert os.listdir(tmp_path) == ["web.vma.zst"]


def test_existing_files_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "web.vma.zst"
    path.write_bytes(zst(archive(disk(1)).written()))
    (tmp_path / "web.xml").write_text("mine")
    monkeypatch.setattr(Vma, "decode", None)
    with pytest.raises(VmconvError, match="exists"):
        vmconv.machine_convert(path, tmp_path, target_format="libvirt")


def test_the_variables_of_the_firmware_are_carried(tmp_path: Path) -> None:
    store, _ = nvram.converted(nvram.Store("ovmf", ()), "ovmf")
    # As on LVM, whose volumes are of 4 MiB.
    made = Archive(
        {"drive-efidisk0": store.ljust(4 * MIB, b"\0"), "drive-scsi0": disk(1)},
        {
            "qemu-server.conf": conf_of(
                CONF + "bios: ovmf\nefidisk0: local-lvm:vm-100-disk-1,efitype=4m,size=4M\n", "efidisk0", "scsi0"
            )
        },
    )
    for name, content in (("web.vma", made.written()), ("web.vma.zst", zst(made.written()))):
        (tmp_path / name).write_bytes(content)
        result = vmconv.machine_convert(tmp_path / name, tmp_path / f"{name}-new", target_format="libvirt")
        assert not [loss for loss in result.plan.losses if loss.path.startswith("firmware")]
        assert (tmp_path / f"{name}-new" / "web_VARS.fd").stat().st_size == 540672


def test_check_reads_the_beginning_of_the_disks(tmp_path: Path) -> None:
    content = bytearray(disk(1))
    # An MBR whose one partition is of type 0xee, as on a disk with a GPT, which the disk does not have.
    content[446:512] = bytes(4) + b"\xee" + bytes(59) + b"\x55\xaa"
    (tmp_path / "web.vma").write_bytes(archive(bytes(content)).written())
    (tmp_path / "web.vma.zst").write_bytes(zst(archive(bytes(content)).written()))
    said = []
    for name in ("web.vma", "web.vma.zst"):
        command = [oracle_program("vmconv"), "machine", "check", "-O", "libvirt", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said.append((done.returncode, done.stdout.replace(".zst", ""), done.stderr))
    assert "disks[0]" in said[0][1]
    assert said[0] == said[1]


def test_check_says_which_disks_lie_behind_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmconv.machine.check import check
    from vmconv.machine.source import opened

    monkeypatch.setattr(Beginning, "limit", MIB)
    (tmp_path / "web.vma.zst").write_bytes(zst(archive(disk(1), disk(2)).written()))
    with opened(str(tmp_path / "web.vma.zst")) as source:
        found = check(source, source.machine, None, inside=False)
    (second,) = (one for one in found if one.path == "disks[1]")
    assert second.text.startswith("was not looked at: web.vma.zst: drive-scsi1 at 0x0: is not in the first 1 MiB")
    assert (second.level, second.hint) == ("warning", "decompress the archive first, or convert the machine")
    assert not [one for one in found if one.path == "disks[0]" and "looked at" in one.text]


def test_blocks_behind_the_beginning_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beginning, "limit", MIB)
    content = disk(1, 16 * MIB)
    file = image_file(zst(archive(content).written()), "web.vma.zst")
    table = VMA.members(file)[-1].table
    assert isinstance(table.sources[0], Decoded)
    assert table.read(100, MIB) == content[100 : 100 + MIB]
    with pytest.raises(ImageError, match=r"drive-scsi0 at 0xfff000: is not in the first 1 MiB of the archive"):
        table.read(16 * MIB - 1, 1)


def test_lzop_is_named_with_the_hint(tmp_path: Path) -> None:
    (tmp_path / "web.vma").write_bytes(archive(disk(1)).written())
    subprocess.run([oracle_program("lzop"), "-q", tmp_path / "web.vma"], check=True)
    with pytest.raises(ImageError, match="is compressed by lzop") as error:
        vmconv.machine_info(tmp_path / "web.vma.lzo")
    assert error.value.hint == "lzop -d web.vma.lzo, then convert the .vma"


@pytest.mark.parametrize("kind", PACKED)
def test_a_compressed_backup_is_no_disk(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"web.vma.{kind}").write_bytes(PACKED[kind](archive(disk(1)).written()))
    with pytest.raises(ImageError, match="not a disk") as error:
        vmconv.info(tmp_path / f"web.vma.{kind}")
    assert "vmconv machine convert" in str(error.value.hint)


@pytest.mark.parametrize("kind", PACKED)
def test_other_compressed_files_are_not_claimed(kind: str) -> None:
    for content in (b"", b"VMA", b"VMA\0\0\0\0\2", bytes(5000), b"text" * 1000):
        assert not VMA.probe(image_file(PACKED[kind](content), "web.vma.zst"))
    assert not VMA.probe(image_file(PACKED[kind](archive(disk(1)).written())[:10], "web.vma.zst"))


# -- archives that are not as they should be


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("length", [12, 100])
def test_an_archive_that_is_cut_in_its_first_block_is_said_to_end(kind: str, length: int, tmp_path: Path) -> None:
    path = tmp_path / f"web.vma.{kind}"
    path.write_bytes(PACKED[kind](archive(disk(1)).written())[:length])
    with pytest.raises(ImageError, match=rf"web.vma.{kind}: cannot be decompressed as \w+: .*end") as error:
        vmconv.machine_info(path)
    assert "\n" not in str(error.value)


class _Sink(File):
    """A new file in memory, without limits on what is written."""

    def __init__(self, size: int) -> None:
        self.size, self.name, self.path, self.descriptor = size, "sink", "sink", -1

    def write(self, offset: int, data: bytes | memoryview) -> None:
        assert 0 <= offset <= offset + len(data) <= self.size


def decode(data: bytes, name: str = "web.vma.zst") -> None:
    with time_limit(), memory_limit():
        VMA.decode(image_file(data, name), lambda _, size: _Sink(size), None)  # type: ignore[arg-type,return-value]


ZEROS = [(0, 1, number) for number in range(16)]
BLOCK = random_bytes(4096, 3)


@pytest.mark.parametrize(
    ("extents", "wanted"),
    [
        ([extent(ZEROS, b"")] * 3, "more clusters than the devices have"),
        ([extent(ZEROS[:1], b"")] * 2 + [extent(ZEROS[2:], b"")], "cluster 0 is in the archive twice"),
        ([extent([], b"")] * 5000 + [extent(ZEROS, b"")], "more than 1024 extents are empty"),
        ([extent(ZEROS[:7], b"")], "cluster 7 of 16 is missing"),
        ([extent([(1, 1, 0)], BLOCK, count=2)], "is cut off after 4096 of 8192 bytes"),
        ([extent([(3, 1, 0)], BLOCK)], "is 1, and the extent's entries have 2 blocks"),
        ([extent([(1, 9, 0)], BLOCK)], "device 9 is of a device that"),
        ([extent([(1, 1, 16)], BLOCK)], "cluster 16 of device 1 is past the end"),
        ([extent(ZEROS, b""), b"trailing"], "header is cut off after 8 bytes"),
    ],
)
@pytest.mark.parametrize("kind", PACKED)
def test_a_damaged_archive_is_refused_in_one_line(extents: list[bytes], wanted: str, kind: str) -> None:
    header = archive(bytes(MIB)).header()
    with pytest.raises(ImageError) as error:
        decode(PACKED[kind](header + b"".join(extents)))
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("at", [0.2, 0.5, 0.99])
def test_a_cut_archive_is_refused(at: float, kind: str) -> None:
    data = PACKED[kind](archive(random_bytes(MIB, 1)).written())
    with pytest.raises(ImageError) as error:
        decode(data[: int(len(data) * at)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", PACKED)
def test_changed_bytes_are_noticed_or_make_no_error_of_python(kind: str) -> None:
    data = PACKED[kind](archive(disk(1, MIB)).written())
    rng = random.Random(kind)
    for _ in range(100):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            decode(bytes(changed))
        except ImageError as error:
            assert "\n" not in str(error)


def test_a_bomb_of_windows_is_refused() -> None:
    # A frame that asks for a window of 3.75 TB: magic, descriptor, window descriptor.
    frame = b"\x28\xb5\x2f\xfd\x00\xff" + bytes(10)
    assert not VMA.probe(image_file(frame, "web.vma.zst"))


def test_a_full_filesystem_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web.vma.zst").write_bytes(zst(archive(disk(1)).written()))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vmconv.machine.decoding.os.pwrite", full)
    with pytest.raises(BackendError, match="drive-scsi0 at 0x0: cannot be written: No space left on device"):
        vmconv.machine_convert(tmp_path / "web.vma.zst", tmp_path / "new", target_format="libvirt")
    assert os.listdir(tmp_path) == ["web.vma.zst"]
