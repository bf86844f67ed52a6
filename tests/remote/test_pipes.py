"""Sources that are streams: standard input and pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmconv
from support import qcow2_images
from support.disks import MIB, QemuImg
from support.web import sparse_disk
from vmconv.errors import AccessError, ImageError, UsageError, VmconvError
from vmconv.io.spooling import PipeSpool

VMCONV = [sys.executable, "-m", "vmconv"]


def run(directory: Path, *arguments: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*VMCONV, *arguments], cwd=directory, input=data, capture_output=True, check=False)


def test_standard_input_is_converted(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 8 * MIB, [(0, MIB), (5 * MIB + 512, MIB)])
    done = run(tmp_path, "convert", "-f", "raw", "-", "made.qcow2", data=raw.read_bytes())
    assert done.returncode == 0, done.stderr
    qemu_img("compare", raw, tmp_path / "made.qcow2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw", "made.qcow2"]
    # Blocks of zeros are holes in the file that was spooled.
    assert (tmp_path / "made.qcow2").stat().st_blocks * 512 < 3 * MIB


def test_a_spooled_disk_shares_its_blocks_with_the_target(xfs_dir: Path) -> None:
    raw = sparse_disk(xfs_dir / "disk.raw", 8 * MIB, [(0, 4 * MIB)])
    done = run(xfs_dir, "convert", "-f", "raw", "-", "made.qcow2", data=raw.read_bytes())
    assert b"shared 4 MiB, copied 0 B" in done.stdout, done.stderr


def test_a_compressed_stream_is_decoded(tmp_path: Path) -> None:
    import gzip

    raw = sparse_disk(tmp_path / "disk.raw", MIB, [(0, MIB)])
    packed = gzip.compress(raw.read_bytes())
    done = run(tmp_path, "convert", "--decompress", "-f", "raw", "-", "made.raw", data=packed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.raw").read_bytes() == raw.read_bytes()


def test_a_file_that_the_shell_opened_is_read_where_it_is(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", 4 * MIB, [(0, MIB)])
    with raw.open("rb") as file:
        command = [*VMCONV, "convert", "-f", "raw", "-", str(tmp_path / "made.qcow2")]
        subprocess.run(command, stdin=file, check=True, capture_output=True)
        qemu_img("compare", raw, tmp_path / "made.qcow2")
        # Of a file that was read in part already, the rest is the disk.
        file.seek(MIB)
        command[-1] = str(tmp_path / "rest.raw")
        subprocess.run(command, stdin=file, check=True, capture_output=True)
    assert (tmp_path / "rest.raw").read_bytes() == raw.read_bytes()[MIB:]


def test_the_output_of_a_program_is_read(tmp_path: Path) -> None:
    raw = sparse_disk(tmp_path / "disk.raw", MIB, [(0, MIB)])
    script = f"{' '.join(VMCONV)} convert -f raw <(cat {raw}) {tmp_path}/made.vhdx"
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    vmconv.convert(tmp_path / "made.vhdx", tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes()[:MIB] == raw.read_bytes()


def test_a_streamed_image_names_files_only_where_the_user_allows_it(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"x" * MIB)
    top = qcow2_images.empty_overlay("base.raw")
    refused = run(tmp_path, "convert", "-f", "qcow2", "-", "made.raw", data=top)
    assert refused.returncode == 1
    assert b"lies outside the image's directory" in refused.stderr
    allowed = run(tmp_path, "convert", "-f", "qcow2", "--allow-external", ".", "-", "made.raw", data=top)
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.parametrize(
    ("arguments", "data", "said"),
    [
        (["convert", "-", "made.raw"], qcow2_images.empty_overlay("x"), b"use -f qcow2 or -f raw"),
        (["convert", "-f", "raw", "-", "made.raw"], b"", b"standard input: is empty"),
        (["convert", "-f", "raw", "--in-place", "-", "made.qcow2"], bytes(512), b"standard input"),
        (["convert", "-f", "raw", "--if-needed", "-", "disk.raw"], bytes(512), b"standard input"),
        (["resize", "-f", "raw", "-", "1M"], bytes(512), b"standard input"),
        (["sync", "-f", "raw", "-", "made.raw"], bytes(512), b"standard input"),
    ],
    ids=["content", "empty", "in-place", "if-needed", "resize", "sync"],
)
def test_what_a_stream_cannot_be_is_refused(tmp_path: Path, arguments: list[str], data: bytes, said: bytes) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    done = run(tmp_path, *arguments, data=data)
    assert done.returncode in (1, 2)
    assert said in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


def test_a_stream_has_a_limit(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, bytes(1001))
    os.close(writer)
    with pytest.raises(ImageError, match="is more than 1000 bytes"):
        PipeSpool(str(tmp_path), 1000)(f"/dev/fd/{reader}")
    os.close(reader)
    assert not list(tmp_path.iterdir())


def test_an_image_that_names_a_pipe_does_not_wait_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.raw")
    (tmp_path / "top.qcow2").write_bytes(qcow2_images.empty_overlay("base.raw"))
    with pytest.raises(AccessError, match="is neither a regular file nor a block device"):
        vmconv.convert(tmp_path / "top.qcow2", tmp_path / "made.raw")


def test_qemu_verifies_no_stream(tmp_path: Path) -> None:
    done = run(tmp_path, "convert", "-f", "raw", "--verify=qemu", "-", "made.raw", data=bytes(512))
    assert done.returncode == UsageError.exit_code
    assert VmconvError.exit_code != UsageError.exit_code
