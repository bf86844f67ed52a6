"""Backups that are compressed while they are written: `-O vma` with a name that ends in `.vma.zst` or `.vma.gz`."""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB, QemuImg
from support.requirements import oracle_module, oracle_program
from support.toy_machines import machine
from support.vma_archives import disks_of
from vmconv.backends import compress
from vmconv.errors import AccessError, BackendError, PlanError, UsageError, VerifyError, ZeroCopyError
from vmconv.testing import random_bytes

REASONS = {kind: f"the new archive is compressed ({name})" for kind, name in (("zst", "Zstandard"), ("gz", "gzip"))}


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_dir")
    return found


@pytest.fixture
def config(toys: object, tmp_path: Path) -> Path:
    return toy(tmp_path)


def toy(directory: Path) -> Path:
    """Returns the configuration of a machine with a raw disk of 8 MiB, half of it holes, and one of qcow2."""
    found = machine(directory / "toy", disks=[{"file": "system.raw"}, {"file": "data.qcow2"}])
    with (directory / "toy" / "system.raw").open("r+b") as disk:
        disk.truncate(8 * MIB)
        for at in range(0, 8 * MIB, 2 * MIB):
            disk.seek(at)
            disk.write(random_bytes(MIB, at))
    return found


def unpacked(path: Path) -> bytes:
    """Returns the archive, decompressed as qmrestore does it."""
    program = oracle_program("gzip" if path.suffix == ".gz" else "zstd")
    return subprocess.run([program, "-q", "-d", "-c", path], capture_output=True, check=True).stdout


@pytest.fixture(params=REASONS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_compressed_backup_is_read_by_other_programs(
    toys: object, directory: Path, qemu_img: QemuImg, kind: str
) -> None:
    config, backup = toy(directory), directory / f"web.vma.{kind}"
    result = vmconv.machine_convert(config, backup, verify="bytes")
    assert sorted(os.listdir(directory)) == ["toy", backup.name]
    disks = disks_of(data := unpacked(backup))
    assert disks["drive-scsi0"] == (directory / "toy" / "system.raw").read_bytes()
    other = oracle_module("dissect.archive.vma").VMA(io.BytesIO(data))
    for number, (name, content) in enumerate(disks.items(), start=1):
        assert other.device(number).name == name
        assert other.device(number).open().read(len(content)) == content
    assert [copy.reason for copy in result.plan.copies] == [REASONS[kind]]
    assert (result.plan.totals.shared, result.plan.totals.copied) == (0, result.plan.copies[0].bytes)
    back = vmconv.machine_convert(backup, directory / "back", target_format="libvirt")
    qemu_img("compare", directory / "toy" / "system.raw", directory / "back" / back.plan.disks[0].target)


def test_it_holds_what_the_archive_would_be(config: Path, tmp_path: Path) -> None:
    plain = vmconv.machine_convert(config, tmp_path / "plain.vma", backend="copy")
    packed = vmconv.machine_convert(config, tmp_path / "packed.vma.zst")
    assert unpacked(Path(packed.target)) == Path(plain.target).read_bytes()
    shown = subprocess.run([oracle_program("zstd"), "-lv", packed.target], capture_output=True, text=True, check=True)
    assert f"({Path(plain.target).stat().st_size} B)" in shown.stdout
    assert "Check: XXH64" in shown.stdout


def test_gzip_s_members_are_those_of_any_number_of_threads(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path(vmconv.machine_convert(config, tmp_path / "plain.vma", backend="copy").target).read_bytes()
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("vmconv.system.parallel.WORKERS", threads)
        found.append(Path(vmconv.machine_convert(config, tmp_path / f"{threads}.vma.gz").target).read_bytes())
    assert found[0] == found[1]
    assert gzip.decompress(found[0]) == plain
    # No time and no name, and a member for each MiB.
    assert found[0].count(b"\x1f\x8b\x08\0\0\0\0\0") >= -(-len(plain) // MIB)


def test_the_same_machine_makes_the_same_bytes(config: Path, tmp_path: Path, kind: str) -> None:
    made = [Path(vmconv.machine_convert(config, tmp_path / f"{name}.vma.{kind}").target) for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_copies_are_announced_and_no_other_file_is_written(toys: object, xfs_dir: Path) -> None:
    config = toy(xfs_dir)
    plan = vmconv.machine_plan(config, xfs_dir / "web.vma.zst")
    assert [copy.reason for copy in plan.copies] == [REASONS["zst"]]
    before = used(xfs_dir)
    vmconv.machine_convert(config, xfs_dir / "web.vma.zst")
    assert used(xfs_dir) - before < (xfs_dir / "web.vma.zst").stat().st_size + MIB


def used(directory: Path) -> int:
    os.sync()
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.parametrize(
    ("change", "error"), [({"zero_copy": "require"}, ZeroCopyError), ({"backend": "reflink"}, UsageError)]
)
def test_what_cannot_be_is_refused(change: dict[str, Any], error: type[Exception], toys: object, xfs_dir: Path) -> None:
    with pytest.raises(error):
        vmconv.machine_convert(toy(xfs_dir), xfs_dir / "web.vma.zst", **change)
    assert os.listdir(xfs_dir) == ["toy"]


def test_a_compressed_backup_becomes_another(config: Path, tmp_path: Path) -> None:
    first = vmconv.machine_convert(config, tmp_path / "first.vma.zst")
    warned = vmconv.machine_plan(first.target, tmp_path / "second.vma.zst").warnings
    assert any("the new archive is compressed, so payload will be written twice" in text for text in warned)
    second = vmconv.machine_convert(first.target, tmp_path / "second.vma.zst")
    assert any("payload is written twice" in note for note in second.plan.notes)
    assert disks_of(unpacked(Path(second.target))) == disks_of(unpacked(Path(first.target)))


def test_permissions_are_those_of_the_disks(config: Path, tmp_path: Path) -> None:
    (config.parent / "system.raw").chmod(0o600)
    result = vmconv.machine_convert(config, tmp_path / "web.vma.zst")
    assert stat.S_IMODE(Path(result.target).stat().st_mode) == 0o600


def test_an_existing_file_is_replaced_only_with_force(config: Path, tmp_path: Path) -> None:
    (tmp_path / "web.vma.zst").write_text("mine")
    with pytest.raises(PlanError, match="exists") as error:
        vmconv.machine_convert(config, tmp_path / "web.vma.zst")
    assert str(error.value.hint).endswith("/web-2.vma.zst")
    assert (tmp_path / "web.vma.zst").read_text() == "mine"
    vmconv.machine_convert(config, tmp_path / "web.vma.zst", force=True)
    assert disks_of(unpacked(tmp_path / "web.vma.zst"))


def _full(descriptor: int, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_filesystem_leaves_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "_write", _full)
    with pytest.raises(BackendError, match=r"web.vma.zst: cannot be written: No space left on device"):
        vmconv.machine_convert(config, tmp_path / "web.vma.zst")
    assert os.listdir(tmp_path) == ["toy"]


def test_a_source_that_changes_meanwhile_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compress._write

    def write(descriptor: int, data: bytes) -> None:
        os.utime(config.parent / "system.raw", (1, 1))
        original(descriptor, data)

    monkeypatch.setattr(compress, "_write", write)
    with pytest.raises(AccessError, match="changed"):
        vmconv.machine_convert(config, tmp_path / "web.vma.zst")
    assert os.listdir(tmp_path) == ["toy"]


@pytest.mark.parametrize("mode", ["sample", "bytes"])
@pytest.mark.parametrize("cut", [False, True])
def test_storage_that_loses_bytes_is_noticed(
    cut: bool, mode: Any, kind: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compress._write

    def write(descriptor: int, data: bytes) -> None:
        damaged = bytearray(data)
        if len(damaged) > 100_000:
            damaged[50_000] ^= 1
        original(descriptor, b"" if cut and not damaged[2000:] else bytes(damaged))

    monkeypatch.setattr(compress, "_write", write)
    with pytest.raises(VerifyError, match=r"the result cannot be read back|decompresses to"):
        vmconv.machine_convert(config, tmp_path / f"web.vma.{kind}", verify=mode)
    assert os.listdir(tmp_path) == ["toy"]
