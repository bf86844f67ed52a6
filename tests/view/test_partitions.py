"""Partitions as files of a mount: compared with sfdisk and blkid, and mounted by the kernel."""

from __future__ import annotations

import binascii
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB
from support.mounting import ERRORS, mounted
from support.requirements import oracle_program
from vmconv.api import volumes
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

GPT = "label: gpt\nsize=40MiB\nsize=320MiB\nsize=8MiB\nsize=4MiB"
MBR = "label: dos\nsize=40MiB\nsize=8MiB\nsize=4MiB\nsize=400MiB, type=5\nsize=320MiB\nsize=16MiB"
MAKE = {40: ["mkfs.ext4", "-q"], 320: ["mkfs.xfs", "-q"], 8: ["mkswap"], 16: ["mkfs.ext2", "-q"]}


def partitioned(path: Path, script: str) -> list[tuple[int, int, int]]:
    """Makes a disk with filesystems; returns number, start and size of its partitions as sfdisk sees them."""
    with path.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([oracle_program("sfdisk"), "-q", str(path)], input=script, text=True, check=True)
    said = subprocess.run(["sfdisk", "--json", str(path)], capture_output=True, text=True, check=True).stdout
    found = [
        (int(one["node"].removeprefix(str(path))), one["start"] * 512, one["size"] * 512)
        for one in json.loads(said)["partitiontable"]["partitions"]
        if one["type"] != "5"
    ]
    for _, start, size in found:
        make = MAKE.get(size // MIB)
        if make:
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                file.truncate(size)
            subprocess.run([*make, str(part)], check=True, capture_output=True)
            copy = ["dd", f"if={part}", f"of={path}", "bs=64K", f"seek={start // 65536}", "conv=notrunc,sparse"]
            subprocess.run(copy, check=True, capture_output=True)
            part.unlink()
    return found


def blkid(path: Path) -> str:
    """Returns the type of a file's content as blkid names it; "raw" if it knows none."""
    done = subprocess.run(
        [oracle_program("blkid"), "-p", "-o", "value", "-s", "TYPE", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "raw"


@pytest.mark.parametrize("script", [GPT, MBR], ids=["gpt", "mbr"])
def test_partitions_are_files_named_as_blkid_says(tmp_path: Path, point: Path, script: str) -> None:
    raw = tmp_path / "disk.raw"
    wanted = partitioned(raw, script)
    images = tmp_path / "images"
    images.mkdir()
    vmconv.convert(str(raw), str(images / "disk.vhdx"))
    with mounted(images, point, "--formats", "partitions"):
        shown = point / "disk.vhdx" / "partitions"
        names = sorted(os.listdir(shown))
        assert names == sorted(f"p{number}.{blkid_of(shown, number)}" for number, _, _ in wanted)
        data = raw.read_bytes()
        for number, start, size in wanted:
            (path,) = shown.glob(f"p{number}.*")
            assert path.stat().st_size == size
            assert path.read_bytes() == data[start : start + size]
        assert {name.partition(".")[2] for name in names} >= {"ext4", "xfs", "swap", "raw"}


def blkid_of(shown: Path, number: int) -> str:
    (path,) = shown.glob(f"p{number}.*")
    return blkid(path)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_the_kernel_mounts_the_file_of_a_partition(tmp_path: Path, point: Path, kind: str) -> None:
    raw = tmp_path / "disk.raw"
    partitioned(raw, GPT)
    with mounted(raw, point, "--formats", "partitions"):
        (path,) = (point / "disk.raw" / "partitions").glob(f"*.{kind}")
        there = tmp_path / "there"
        there.mkdir()
        # norecovery: a loop device of a file that cannot be written.
        flags = "ro,loop,norecovery" if kind == "xfs" else "ro,loop"
        subprocess.run(["mount", "-o", flags, str(path), str(there)], check=True)
        try:
            mounts = Path("/proc/mounts").read_text().splitlines()
            assert any(line.split()[1:3] == [str(there), kind] for line in mounts)
        finally:
            subprocess.run(["umount", str(there)], check=True)


def test_a_disk_without_a_table_has_no_partitions(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    assert names_of(path) == []


def names_of(path: Path) -> list[str]:
    with Opener(installed()) as opener:
        return list(volumes(opener.image(str(path), "raw")))


def with_entries(path: Path, change: dict[int, tuple[int, int]]) -> None:
    """Gives partitions of a GPT other first and last sectors, with right checksums."""
    with path.open("r+b") as file:
        file.seek(512)
        header = bytearray(file.read(92))
        begin, count, size = struct.unpack_from("<QII", header, 72)
        file.seek(begin * 512)
        entries = bytearray(file.read(count * size))
        for number, places in change.items():
            struct.pack_into("<QQ", entries, (number - 1) * size + 32, *places)
        file.seek(begin * 512)
        file.write(entries)
        struct.pack_into("<I", header, 88, binascii.crc32(entries))
        header[16:20] = bytes(4)
        struct.pack_into("<I", header, 16, binascii.crc32(header))
        file.seek(512)
        file.write(header)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({1: (2048, 1 << 40)}, "its partition 1 at 0x100000 with "),
        ({1: (0, 10)}, "its partition 1 at 0x0 with "),
        ({2: (2100, 90000)}, "its partitions 1 and 2 overlap at 0x106800"),
        ({2: (90000, 89999)}, "its partition 2 at 0x2bf2000 with 0 bytes"),
        ({2: ((1 << 64) - 1, (1 << 64) - 1)}, "is not inside the disk"),
    ],
    ids=["end", "begin", "overlap", "empty", "wrapped"],
)
def test_a_hostile_gpt_is_refused_in_one_line(tmp_path: Path, change: dict[int, tuple[int, int]], said: str) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([oracle_program("sfdisk"), "-q", str(path)], input=GPT, text=True, check=True)
    with_entries(path, {})
    assert len(names_of(path)) == 4
    with_entries(path, change)
    with pytest.raises(ImageError) as caught:
        names_of(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def extended(path: Path, links: list[tuple[int, int]]) -> None:
    """Writes an MBR with an extended partition, and in it tables with `(sectors, relative sector of the next)`."""
    disk = bytearray(4 * MIB)
    disk[510:512] = b"\x55\xaa"
    struct.pack_into("<B3xB3xII", disk, 446, 0, 5, 100, 4000)
    for number, (sectors, following) in enumerate(links):
        at = (100 + number * 64) * 512
        disk[at + 510 : at + 512] = b"\x55\xaa"
        struct.pack_into("<B3xB3xII", disk, at + 446, 0, 0x83, 1, sectors)
        struct.pack_into("<B3xB3xII", disk, at + 462, 0, 5 if following else 0, following, 64)
    path.write_bytes(disk)


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ([(10, 64), (10, 64)], "its chain of logical partitions leads back to sector 164"),
        ([(10, 64), (5000, 0)], "its logical partition 6 is not inside the extended one"),
        ([(70, 64), (10, 0)], "its partitions 5 and 6 overlap"),
    ],
    ids=["loop", "outside", "overlap"],
)
def test_a_hostile_chain_of_logical_partitions_is_refused(
    tmp_path: Path, links: list[tuple[int, int]], said: str
) -> None:
    path = tmp_path / "disk.raw"
    extended(path, [(10, 64), (10, 0)])
    assert names_of(path) == ["p5.raw", "p6.raw"]
    extended(path, links)
    with pytest.raises(ImageError, match=said):
        names_of(path)


def test_a_damaged_table_is_shown_as_its_reason(tmp_path: Path, point: Path) -> None:
    path = tmp_path / "disk.raw"
    extended(path, [(10, 64), (5000, 0)])
    with mounted(tmp_path, point, "--formats", "partitions,raw"):
        shown = point / "disk.raw"
        assert os.listdir(shown / "partitions") == [ERRORS]
        assert "logical partition 6" in (shown / "partitions" / ERRORS).read_text()
        assert (shown / "raw" / "disk.raw").stat().st_size == 4 * MIB
