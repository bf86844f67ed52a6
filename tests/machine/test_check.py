"""Reasons why a machine would not start are found in its disks: partition tables are compared with those of sfdisk."""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.disks import MIB
from support.requirements import oracle_program
from support.toy_machines import machine
from vmconv.cli.main import main
from vmconv.guest.contents import content_of
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.machine.boot import partitions
from vmconv.model.extents import Extents
from vmconv.testing import image_file

pytestmark = pytest.mark.usefixtures("toys")

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def partitioned(path: Path, script: str, *, size: int = 64 * MIB, code: bytes = b"") -> Path:
    """Makes a disk with a partition table by sfdisk, and boot code."""
    with path.open("wb") as file:
        file.truncate(size)
    command = [oracle_program("sfdisk"), "-q", "--no-reread", "--no-tell-kernel", str(path)]
    subprocess.run(command, input=script, text=True, check=True, capture_output=True)
    with path.open("r+b") as file:
        file.write(code)
    return path


def table_of(path: Path) -> partitions.Table:
    with Opener(installed()) as opener:
        return partitions.read(opener.image(str(path), "raw").flat)


def sfdisk(path: Path) -> list[tuple[int, int]]:
    said = subprocess.run([oracle_program("sfdisk"), "-J", str(path)], capture_output=True, check=True).stdout
    found = json.loads(said)["partitiontable"]
    extended = {"5", "f", "85"}
    return sorted((p["start"] * 512, p["size"] * 512) for p in found["partitions"] if p["type"] not in extended)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(["gpt", "dos"]),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=7),
)
def test_partitions_are_those_that_sfdisk_finds(scheme: str, sizes: list[int]) -> None:
    lines = [f"size={size}MiB" for size in sizes]
    if scheme == "dos" and len(sizes) > 3:
        lines[3:] = ["size=40MiB, type=5", *lines[3:]]
    with tempfile.TemporaryDirectory() as directory:
        path = partitioned(Path(directory, "disk.raw"), "\n".join([f"label: {scheme}", *lines]))
        table = table_of(path)
        assert table.scheme == {"gpt": "gpt", "dos": "mbr"}[scheme]
        assert table.problem is None
        assert sorted((p.start, p.length) for p in table.partitions) == sfdisk(path)


def test_logical_partitions_that_loop_end() -> None:
    disk = bytearray(4 * MIB)
    for at in (0, 2048 * 512):
        disk[at + 510 : at + 512] = b"\x55\xaa"
    struct.pack_into("<B3xB3xII", disk, 446, 0, 5, 2048, 4096)
    # The second entry of the extended table leads to itself.
    struct.pack_into("<B3xB3xII", disk, 2048 * 512 + 462, 0, 5, 0, 4096)
    assert partitions.read(Extents.whole(image_file(bytes(disk)))).partitions == ()


@pytest.mark.parametrize(
    ("at", "problem"),
    [(512, "its GPT is missing"), (520, "checksum of its GPT header"), (1024, "checksum of its GPT entries")],
    ids=["signature", "header", "entries"],
)
def test_a_damaged_gpt_is_found(at: int, problem: str, tmp_path: Path) -> None:
    path = partitioned(tmp_path / "disk.raw", f"label: gpt\nsize=4MiB, type={ESP}")
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    assert problem in str(table_of(path).problem)


@given(content=st.binary(max_size=2048))
def test_any_first_sectors_give_a_table(content: bytes) -> None:
    data = bytearray(content.ljust(2048, b"\0"))
    data[510:512] = b"\x55\xaa"
    found = partitions.read(Extents.whole(image_file(bytes(data))))
    assert len(found.partitions) <= partitions.MAX_PARTITIONS * 4


@pytest.mark.parametrize(
    ("make", "kind"),
    [(["mkfs.ext4", "-q"], "ext"), (["mkfs.xfs", "-q"], "xfs"), (["mkfs.btrfs", "-q"], "btrfs")],
    ids=["ext4", "xfs", "btrfs"],
)
def test_filesystems_are_known_by_their_header(make: list[str], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(320 * MIB)
    subprocess.run([oracle_program(make[0]), *make[1:], str(path)], check=True, capture_output=True)
    with Opener(installed()) as opener:
        assert content_of(opener.image(str(path), "raw").flat, 0) == kind


GPT_ESP = f"label: gpt\nsize=4MiB, type={ESP}\nsize=8MiB, type={LINUX}"
GPT_DATA = f"label: gpt\nsize=8MiB, type={LINUX}"
MBR = "label: dos\nsize=8MiB, bootable"


@pytest.mark.parametrize(
    ("firmware", "script", "code", "found"),
    [
        ("uefi", GPT_ESP, b"", []),
        ("uefi", MBR, b"\xeb\x63", ["error: disks[0]: the firmware is UEFI, and the disk has no EFI system partition"]),
        ("uefi", GPT_DATA, b"", ["error: disks[0]: the firmware is UEFI, and the disk has no EFI system partition"]),
        ("bios", MBR, b"\xeb\x63", []),
        ("bios", GPT_ESP, b"", ["error: disks[0]: the firmware is a BIOS, and the disk has no boot code"]),
        (None, GPT_ESP, b"", ["note: firmware: the configuration does not state the firmware; the disk needs UEFI"]),
        (None, MBR, b"\xeb", ["note: firmware: the configuration does not state the firmware; the disk needs a BIOS"]),
    ],
    ids=["uefi", "uefi-mbr", "uefi-no-esp", "bios", "bios-gpt", "silent-uefi", "silent-bios"],
)
def test_the_firmware_is_compared_with_the_first_disk(
    firmware: str | None, script: str, code: bytes, found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = machine(tmp_path, firmware={"kind": firmware}, disks=[{"file": "system.raw"}])
    partitioned(tmp_path / "system.raw", script, code=code)
    code_found = main(["machine", "check", str(config)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines if ": " in line and "drivers" not in line] == found
    assert code_found == (1 if any(line.startswith("error") for line in found) else 0)


def test_encrypted_partitions_and_a_tpm_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path, firmware={"kind": "uefi"}, tpm={"version": "2.0"}, disks=[{"file": "system.raw"}])
    path = partitioned(tmp_path / "system.raw", GPT_ESP)
    with path.open("r+b") as file:
        file.seek(table_of(path).partitions[1].start)
        file.write(b"\xeb\x58\x90-FVE-FS-")
    assert main(["machine", "check", "--output", "json", str(config)]) == 0
    found = {(one["path"], one["level"], one["text"]) for one in json.loads(capsys.readouterr().out)}
    assert ("disks[0]", "warning", "its partition 2 is encrypted by BitLocker") in found
    assert ("tpm", "warning", "the secrets in the TPM are not moved") in found


def test_a_large_disk_with_an_mbr_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = machine(tmp_path, firmware={"kind": "bios"}, disks=[{"file": "system.raw"}])
    partitioned(tmp_path / "system.raw", MBR, size=3 << 40, code=b"\xeb")
    assert main(["machine", "check", str(config)]) == 0
    assert "has an MBR, which reaches 2 TiB" in capsys.readouterr().out
