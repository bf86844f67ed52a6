"""`-S`: zeros in payload are left out, and nothing else; beside `qemu-img convert -S`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmconv
from support.disks import MIB, QemuImg
from vmconv.cli.main import main
from vmconv.conversion import zeros
from vmconv.model.extents import Extents, Kind
from vmconv.model.sources import Blob

BLOCK = zeros.BLOCK


def filled(path: Path, size: int, *ranges: tuple[int, int]) -> Path:
    """Makes a file without holes: zeros, and other bytes in these ranges."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))
        file.write(bytes(size % MIB))
        for start, length in ranges:
            file.seek(start)
            file.write(b"payload!" * (length // 8) + b"x" * (length % 8))
    return path


@given(
    st.lists(st.tuples(st.sampled_from(["full", "zero", "hole", "one"]), st.integers(1, 5)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(0, BLOCK - 1),
    st.integers(1, 3),
)
def test_runs_of_zeros_are_those_of_a_model_of_blocks(
    runs: list[tuple[str, int]], least: int, cut: int, together: int
) -> None:
    kinds = [kind for kind, count in runs for _ in range(count)]
    one = bytes(BLOCK - 1) + b"x"
    content = b"".join({"full": b"x" * BLOCK, "one": one}.get(kind, bytes(BLOCK)) for kind in kinds)
    size = len(content) - cut
    source = Blob("disk", content)
    rows = [(n * BLOCK, Kind.ZERO if k == "hole" else Kind.DATA, source, n * BLOCK) for n, k in enumerate(kinds)]
    table = Extents.of([row if row[1] == Kind.DATA else (row[0], row[1], None, 0) for row in rows], size)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(zeros, "_TOGETHER", together * BLOCK)
        found = zeros._dropped(table, least * BLOCK)
    # The last block may be cut, and then its bytes decide.
    empty = [
        kind != "hole" and not any(content[n * BLOCK : min(size, (n + 1) * BLOCK)]) for n, kind in enumerate(kinds)
    ]
    wanted = [kind == "hole" for kind in kinds]
    at = 0
    while at < len(kinds):
        end = at
        while end < len(kinds) and empty[end]:
            end += 1
        if end - at >= least:
            wanted[at:end] = [True] * (end - at)
        at = max(end, at + 1)
    assert found.size == size
    assert found.read(0, size) == content[:size]
    assert [found.kind[found.row_at(np.array([n * BLOCK]))[0]] == Kind.ZERO for n in range(len(kinds))] == wanted


@pytest.mark.parametrize("name", ["raw", "qcow2", "vmdk", "vhdx"])
def test_zeros_are_left_out_and_the_rest_is_shared(reflink_dir: Path, qemu_img: QemuImg, name: str) -> None:
    disk = filled(reflink_dir / "disk.raw", 16 * MIB, (0, 4 * MIB), (9 * MIB, 64 << 10))
    made = reflink_dir / f"made.{name}"
    done = vmconv.convert(disk, made, sparse=BLOCK, verify="bytes")
    assert done.totals.shared == 4 * MIB + (64 << 10) and not done.totals.copied
    assert vmconv.convert(disk, reflink_dir / f"whole.{name}").totals.shared == 16 * MIB
    qemu_img("compare", "-f", "raw", disk, made)


def test_short_runs_stay(reflink_dir: Path) -> None:
    disk = filled(reflink_dir / "disk.raw", 4 * MIB, (0, MIB), (MIB + (64 << 10), MIB))
    for least, shared in ((64 << 10, 2 * MIB), ((64 << 10) + 1, 2 * MIB + (64 << 10))):
        assert vmconv.plan(disk, reflink_dir / "made.qcow2", sparse=least).totals.shared == shared


def test_the_result_is_as_small_as_qemus(tmp_path: Path, qemu_img: QemuImg) -> None:
    disk = filled(tmp_path / "disk.raw", 8 * MIB, *((at * MIB, 20 << 10) for at in range(8)))
    assert main(["convert", "-q", "-S", "4k", str(disk), str(tmp_path / "ours.raw")]) == 0
    qemu_img("convert", "-S", "4k", "-f", "raw", "-O", "raw", disk, tmp_path / "theirs.raw")
    # Until then its filesystem has not counted its own blocks for QEMU's.
    subprocess.run(["sync", tmp_path / "theirs.raw"], check=True)
    ours, theirs = (os.stat(tmp_path / f"{whose}.raw").st_blocks for whose in ("ours", "theirs"))
    assert ours <= theirs
    assert (tmp_path / "ours.raw").read_bytes() == disk.read_bytes()


def test_layers_are_read_as_one_disk(tmp_path: Path, qemu_img: QemuImg) -> None:
    base = filled(tmp_path / "base.raw", 4 * MIB, (0, 2 * MIB))
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "top.qcow2")
    zeroed = filled(tmp_path / "zeroed.raw", 4 * MIB, (0, MIB))
    qemu_img("convert", "-S", "0", "-f", "raw", "-O", "qcow2", zeroed, tmp_path / "own.qcow2")
    qemu_img("rebase", "-u", "-b", base, "-F", "raw", tmp_path / "own.qcow2")
    done = vmconv.convert(tmp_path / "own.qcow2", tmp_path / "made.qcow2", sparse=BLOCK)
    assert done.totals.copied + done.totals.shared == MIB
    assert vmconv.compare(tmp_path / "made.qcow2", zeroed)
    assert vmconv.info(tmp_path / "made.qcow2").get("backing-filename") is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-S", "0"], "at least 1 byte"),
        (["-S", "4k", "--in-place"], "--in-place"),
        (["-S", "4k", "--chain"], "--chain"),
        (["-S", "4k", "-B", "b.qcow2"], "-B"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    disk = filled(tmp_path / "disk.raw", MIB)
    assert main(["convert", *options, str(disk), str(tmp_path / "made.qcow2")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made.qcow2").exists()
