"""What `prove` says of payload whose place on storage is known, shared in part, compressed, or not told."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import MIB
from support.requirements import missing
from vmconv.cli.main import main
from vmconv.system import linux
from vmconv.testing import random_bytes

EXTENT = 128 << 10
"""Bytes of a compressed extent of Btrfs, decoded."""

Capture = pytest.CaptureFixture[str]


def words(count: int, seed: int) -> bytes:
    """Returns bytes that can be compressed, and that no other seed gives."""
    return b"".join(b"%016d" % (seed * 1_000_003 + i) for i in range(count // 16))


@pytest.fixture
def compressed(btrfs_dir: Path) -> Path:
    """A directory whose files are compressed, as `mount -o compress=zstd` does it for all."""
    done = subprocess.run(
        ["btrfs", "property", "set", btrfs_dir, "compression", "zstd"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        missing("reflink", f"btrfs property: {done.stderr.strip()}")
    return btrfs_dir


def is_encoded(path: Path) -> bool:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return bool(len(linux.encoded_ranges(file.fileno())))


def proved(capsys: Capture, *arguments: str | Path, code: int) -> Any:
    assert main(["prove", "--output", "json", *map(str, arguments)]) == code
    return json.loads(capsys.readouterr().out)


def test_compressed_payload_that_is_shared_is_proved(compressed: Path, capsys: Capture) -> None:
    raw, image = compressed / "disk.raw", compressed / "disk.qcow2"
    raw.write_bytes(words(4 * MIB, 1))
    assert is_encoded(raw)
    vmconv.convert(str(raw), str(image))
    proof = vmconv.prove(str(raw), str(image))
    assert proof
    assert (proof.shared, proof.apart, proof.unknown) == (4 * MIB, 0, 0)
    said = proved(capsys, raw, image, code=0)
    assert said["proved"] is True
    assert all(row["same"] is True and row["encoded"] for row in said["ranges"])


def test_compressed_payload_that_was_copied_is_not_shared(compressed: Path) -> None:
    raw, other = compressed / "disk.raw", compressed / "other.raw"
    for path in (raw, other):
        path.write_bytes(words(MIB, 1))
        assert is_encoded(path)
    proof = vmconv.prove(str(raw), str(other))
    assert (proof.shared, proof.apart, proof.unknown) == (0, MIB, 0)


def test_parts_of_compressed_extents_are_unknown(compressed: Path, capsys: Capture) -> None:
    """Every second 64 KiB of the copy are another half of the extent, and the filesystem does not say which."""
    raw, other = compressed / "disk.raw", compressed / "other.raw"
    raw.write_bytes(words(MIB, 1))
    assert is_encoded(raw)
    with raw.open("rb") as old, other.open("wb") as new:
        for at in range(0, MIB, EXTENT):
            linux.clone_range(old.fileno(), new.fileno(), at + EXTENT // 2, EXTENT // 2, at + EXTENT // 2)
            linux.clone_range(old.fileno(), new.fileno(), at, EXTENT // 2, at)
        new.flush()
    with other.open("r+b") as new:
        # Neighbours of one extent would be told as one.
        new.seek(EXTENT // 2)
        new.write(random_bytes(EXTENT // 2))
    proof = vmconv.prove(str(raw), str(other))
    assert not proof
    assert proof.unknown >= EXTENT // 2
    assert proof.apart == EXTENT // 2
    assert main(["prove", str(raw), str(other)]) == 1
    said = capsys.readouterr().out
    assert "unknown" in said
    assert said.splitlines()[-1].startswith("not all payload is shared: ")


def test_compare_does_not_take_compressed_extents_for_equal(compressed: Path) -> None:
    """Two halves of one extent at one place of the guest: by extent and length they are the same."""
    raw, other = compressed / "disk.raw", compressed / "other.raw"
    whole = compressed / "whole"
    whole.write_bytes(words(EXTENT, 1))
    assert is_encoded(whole)
    for path, half in ((raw, 0), (other, EXTENT // 2)):
        with whole.open("rb") as old, path.open("wb") as new:
            linux.clone_range(old.fileno(), new.fileno(), half, EXTENT // 2, 0)
    assert not vmconv.compare(str(raw), str(other)).identical


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM])
def test_without_information_all_is_unknown(
    xfs_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    raw, image = xfs_dir / "disk.raw", xfs_dir / "disk.qcow2"
    raw.write_bytes(random_bytes(MIB))
    vmconv.convert(str(raw), str(image))
    ioctl = fcntl.ioctl

    def untold(descriptor: int, request: int, *arguments: Any) -> Any:
        if request == 0xC020660B:
            raise OSError(number, os.strerror(number))
        return ioctl(descriptor, request, *arguments)

    monkeypatch.setattr(fcntl, "ioctl", untold)
    said = proved(capsys, raw, image, code=1)
    assert (said["shared"], said["apart"], said["unknown"]) == (0, 0, MIB)
    assert {row["same"] for row in said["ranges"]} == {None}
    assert main(["prove", str(raw), str(image)]) == 1
    out = capsys.readouterr().out
    assert "NOT SHARED" not in out
    assert out.splitlines()[-1] == (
        "not known whether all payload is shared: 0 B at the same physical addresses, 0 B not, 1 MiB unknown: the"
        " filesystem does not report it"
    )


def test_payload_of_one_image_only_is_not_shared(xfs_dir: Path) -> None:
    raw, empty = xfs_dir / "disk.raw", xfs_dir / "empty.raw"
    raw.write_bytes(random_bytes(MIB))
    with empty.open("wb") as file:
        file.truncate(MIB)
    proof = vmconv.prove(str(raw), str(empty))
    assert (proof.shared, proof.apart, proof.unknown) == (0, MIB, 0)
