"""Hints are of use: what they name can be asked for in place of what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.disks import MIB, make_disk
from vmconv.cli.main import main

Capture = pytest.CaptureFixture[str]

WAYS = "--in-place"
"""What a hint of a way without copies begins with."""


def without_a_way(tmp_path: Path) -> dict[str, list[str]]:
    (tmp_path / "key").write_text("secret")
    return {
        "compressed": ["-c"],
        "encrypted": ["--target-secret", str(tmp_path / "key")],
        "a part": ["--offset", "1M", "--length", "1M"],
        "zeros left out": ["-S", "4k"],
        "several sources": [str(tmp_path / "disk.raw")],
    }


def test_a_whole_disk_that_is_copied_has_a_way_without(ext4_dir: Path, capsys: Capture) -> None:
    make_disk(ext4_dir / "disk.raw", 4 * MIB)
    assert main(["convert", str(ext4_dir / "disk.raw"), str(ext4_dir / "disk.qcow2")]) == 0
    assert WAYS in capsys.readouterr().err
    assert main(["convert", "--in-place", str(ext4_dir / "disk.raw"), str(ext4_dir / "new.qcow2")]) == 0
    assert WAYS not in capsys.readouterr().err


@pytest.mark.parametrize("case", ["compressed", "encrypted", "a part", "zeros left out", "several sources"])
def test_no_way_is_named_that_would_be_refused(ext4_dir: Path, case: str, capsys: Capture) -> None:
    source, target = make_disk(ext4_dir / "disk.raw", 4 * MIB), ext4_dir / "disk.qcow2"
    flags = without_a_way(ext4_dir)[case]
    assert main(["convert", *flags, str(source), str(target)]) == 0
    printed = capsys.readouterr()
    assert "copied" in printed.out and WAYS not in printed.err
    assert main(["convert", "--in-place", *flags, str(source), str(ext4_dir / "new.qcow2")]) in (1, 2)


def test_a_new_disk_that_does_not_fit_has_no_source_to_leave_payload_in(ext4_dir: Path, capsys: Capture) -> None:
    flags = ["-f", "raw", "-o", "preallocation=full"]
    assert main(["create", *flags, str(ext4_dir / "disk.raw"), "1024T"]) == 1
    printed = capsys.readouterr().err
    assert "bytes would have to be written" in printed and "hint" not in printed


def test_a_disk_that_does_not_fit_has_a_way_if_it_is_copied_for_want_of_sharing(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Full:
        f_bavail, f_frsize, f_blocks = 0, 4096, 1 << 20

    source, target = make_disk(ext4_dir / "disk.raw", 4 * MIB), ext4_dir / "disk.qcow2"
    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    assert main(["convert", str(source), str(target)]) == 1
    assert WAYS in capsys.readouterr().err
    assert main(["convert", "-c", str(source), str(target)]) == 1
    assert WAYS not in capsys.readouterr().err
