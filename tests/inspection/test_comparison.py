"""compare and prove: equal without reading where storage is shared, different where it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, process_io
from vmconv.cli.main import main


def pair(directory: Path) -> tuple[Path, Path]:
    raw, image = make_disk(directory / "disk.raw", 32 * MIB), directory / "disk.qcow2"
    vmconv.convert(str(raw), str(image))
    return raw, image


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_shared_payload_is_equal_without_being_read(reflink_dir: Path) -> None:
    raw, image = pair(reflink_dir)
    before = process_io()["rchar"]
    found = vmconv.compare(str(raw), str(image))
    assert found
    assert found.read == 0
    assert process_io()["rchar"] - before < MIB


def test_copied_payload_is_read_and_equal(ext4_dir: Path) -> None:
    found = vmconv.compare(*map(str, pair(ext4_dir)))
    assert found
    assert found.read > 0


@pytest.mark.parametrize("offset", [0, 4095, 32 * MIB - 1])
def test_a_byte_that_differs_is_found_at_its_offset(reflink_dir: Path, qemu_img: QemuImg, offset: int) -> None:
    raw, image = pair(reflink_dir)
    flip(raw, offset)
    found = vmconv.compare(str(raw), str(image))
    assert not found
    assert found.first_difference == offset
    qemu_img("compare", raw, image, ok=(1,))


def test_only_ranges_no_longer_shared_are_read(reflink_dir: Path) -> None:
    raw, image = pair(reflink_dir)
    flip(raw, 0)
    flip(raw, 0)
    os.sync()
    found = vmconv.compare(str(raw), str(image))
    assert found
    assert 0 < found.read < 2 * MIB


def test_a_longer_disk_is_equal_when_the_rest_is_zero_unless_strict(
    reflink_dir: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, image = pair(reflink_dir)
    os.truncate(raw, 40 * MIB)
    for arguments, code, words in (
        ([], 0, "Warning: Image size mismatch!\nImages are identical."),
        (["-s"], 1, "Image size mismatch!"),
    ):
        assert main(["compare", str(raw), str(image), *arguments]) == code
        assert capsys.readouterr().out.startswith(words)
        theirs = qemu_img("compare", "-f", "raw", *arguments, raw, image, ok=(code,))
        assert words in theirs.stdout
    flip(raw, 39 * MIB)
    assert vmconv.compare(str(raw), str(image)).first_difference == 39 * MIB


def test_exit_codes_of_compare_are_those_of_qemu_img(
    reflink_dir: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, image = pair(reflink_dir)
    assert main(["compare", str(raw), str(image)]) == 0
    assert main(["compare", str(raw), str(reflink_dir / "none.qcow2")]) == 2
    assert "none.qcow2" in capsys.readouterr().err
    flip(raw, 8)
    assert main(["compare", "-q", str(raw), str(image)]) == 1
    assert capsys.readouterr().out == ""
    qemu_img("compare", raw, image, ok=(1,))


def test_prove_shows_equal_physical_addresses(reflink_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, image = pair(reflink_dir)
    assert main(["prove", "--output", "json", str(raw), str(image)]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["proved"]
    assert proof["apart"] == 0
    assert sum(row["length"] for row in proof["ranges"]) == proof["shared"] > 0
    assert all(row["same"] and row["left"] == row["right"] > 0 for row in proof["ranges"])


def test_prove_fails_for_a_copy(reflink_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(reflink_dir / "disk.raw", 4 * MIB)
    copy = reflink_dir / "copy.raw"
    copy.write_bytes(raw.read_bytes())
    assert main(["prove", str(raw), str(copy)]) == 1
    output = capsys.readouterr().out
    assert "NOT SHARED" in output
    assert "not all payload is shared" in output


def test_prove_names_what_was_changed_since(reflink_dir: Path) -> None:
    raw, image = pair(reflink_dir)
    flip(raw, 0)
    proof = vmconv.prove(str(raw), str(image))
    assert not proof
    assert [row.start for row in proof.rows() if not row.same] == [0]


def test_files_of_different_filesystems_share_nothing(xfs_dir: Path, btrfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    shutil.copy(raw, btrfs_dir / "disk.raw")
    assert vmconv.prove(str(raw), str(btrfs_dir / "disk.raw")).shared == 0
    assert vmconv.compare(str(raw), str(btrfs_dir / "disk.raw"))


def test_inline_and_compressed_files_of_btrfs_prove_nothing_but_compare(btrfs_dir: Path) -> None:
    small, again = btrfs_dir / "small.raw", btrfs_dir / "again.raw"
    for path in (small, again):
        path.write_bytes(b"tiny" * 128)
    assert vmconv.prove(str(small), str(again)).shared == 0
    assert vmconv.compare(str(small), str(again))
