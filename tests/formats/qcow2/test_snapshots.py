"""`vmconv snapshot`: what qemu-img takes, deletes and applies, by qemu-img's and qemu-io's own reading."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmconv
from support.disks import QemuImg, qemu_io
from vmconv.cli.main import main
from vmconv.errors import ImageError, PlanError, UsageError

SIZE = 1 << 20
IMAGES = {
    "default": "",
    "v2": "compat=0.10",
    "1-bit-refcounts": "refcount_bits=1",
    "2-bit-refcounts": "refcount_bits=2,cluster_size=4k",
    "8-bit-refcounts": "refcount_bits=8,cluster_size=512",
    "64-bit-refcounts": "refcount_bits=64,cluster_size=512",
    "extended-l2": "extended_l2=on,cluster_size=16k",
    "lazy": "lazy_refcounts=on,cluster_size=4k",
}
OVERFLOWING = {"1-bit-refcounts": 0, "2-bit-refcounts": 2}
"""Snapshots of one state that the reference counts allow."""


def make(directory: Path, options: str, qemu_img: QemuImg) -> Path:
    path = directory / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, str(SIZE))
    return path


def content(path: Path, qemu_img: QemuImg, snapshot: str | None = None) -> bytes:
    raw = path.with_name("content.raw")
    chosen = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    qemu_img("convert", "-f", "qcow2", *chosen, "-O", "raw", path, raw)
    return raw.read_bytes()


def assert_sound(path: Path, qemu_img: QemuImg) -> None:
    # Any finding of qemu-img, leaks too, is a failure.
    qemu_img("check", "-q", "-f", "qcow2", path)
    report = vmconv.check(path)
    assert report is not None
    assert (report.corruptions, report.leaks, report.errors) == ((), (), ())


class Run:
    """An image that vmconv and QEMU change in turn, and its disk and snapshots as they must be."""

    def __init__(self, path: Path, rng: random.Random, qemu_img: QemuImg) -> None:
        self.path, self.rng, self.qemu_img = path, rng, qemu_img
        self.disk = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        self.number = 0

    def write(self) -> None:
        for command in self.rng.choices(["write", "write -c", "write -z"], weights=[4, 1, 1], k=3):
            length = self.rng.choice([4096, 16384, 65536]) if command == "write" else 65536
            start = self.rng.randrange(SIZE // length) * length
            value = 0 if command == "write -z" else self.rng.randrange(1, 255)
            pattern = f"-P {value} " if value else ""
            arguments = ["qemu-io", "-f", "qcow2", "-c", f"{command} {pattern}{start} {length}", str(self.path)]
            done = subprocess.run(arguments, check=False, capture_output=True)
            if done.returncode:
                # QEMU compresses nothing into an allocated cluster, and may have written some of the range.
                assert command == "write -c"
                self.disk[:] = content(self.path, self.qemu_img)
            else:
                self.disk[start : start + length] = bytes([value]) * length

    def change(self) -> None:
        verb: Any = self.rng.choice(["create", "create", "delete", "apply"] if self.snapshots else ["create"])
        if verb == "create":
            self.number += 1
            name = f"s{self.number}"
        else:
            name = self.rng.choice(sorted(self.snapshots))
        if self.rng.random() < 0.4:
            done = subprocess.run(
                ["qemu-img", "snapshot", f"-{verb[0]}", name, str(self.path)], check=False, capture_output=True
            )
            if done.returncode:
                # QEMU leaves leaks when a reference count overflows.
                subprocess.run(["qemu-img", "check", "-q", "-r", "all", str(self.path)], check=False)
                return
        else:
            try:
                vmconv.snapshot(self.path, verb, name)
            except PlanError as error:
                assert "references, refcount_order" in str(error)
                return
        if verb == "create":
            self.snapshots[name] = bytes(self.disk)
        elif verb == "delete":
            del self.snapshots[name]
        else:
            self.disk = bytearray(self.snapshots[name])

    def assert_content(self) -> None:
        assert content(self.path, self.qemu_img) == self.disk
        for name, expected in self.snapshots.items():
            assert content(self.path, self.qemu_img, name) == expected, name


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES)
def test_vmconv_and_qemu_in_turn(options: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    run = Run(make(ext4_dir, options, qemu_img), random.Random(options), qemu_img)
    for step in range(8):
        run.write()
        run.change()
        assert_sound(run.path, qemu_img)
        if step % 4 == 3:
            run.assert_content()
    run.assert_content()


@pytest.mark.parametrize("kind", OVERFLOWING)
def test_an_overflow_is_refused(kind: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, IMAGES[kind], qemu_img)
    qemu_io(path, "write -P 1 0 64k", format_name="qcow2")
    for number in range(OVERFLOWING[kind]):
        vmconv.snapshot(path, "create", f"s{number}")
    before = path.read_bytes()
    with pytest.raises(PlanError, match=r"would have [24] references, refcount_order [01] counts [13] at most"):
        vmconv.snapshot(path, "create", "one too many")
    assert path.read_bytes() == before
    assert_sound(path, qemu_img)


def test_the_refcount_table_grows(ext4_dir: Path, qemu_img: QemuImg) -> None:
    """A table of one cluster of 512 bytes has 64 entries, each for 64 clusters with counts of 64 bits."""
    path = make(ext4_dir, "refcount_bits=64,cluster_size=512", qemu_img)
    qemu_img("resize", "-q", path, "4M")
    qemu_io(path, "write -P 1 0 1980k", format_name="qcow2")
    tables = set()
    for number in range(20):
        vmconv.snapshot(path, "create", f"s{number}")
        tables.add(path.read_bytes()[48:60])
    assert len(tables) > 1
    assert_sound(path, qemu_img)
    for number in range(20):
        vmconv.snapshot(path, "delete", f"s{number}")
    assert_sound(path, qemu_img)


def test_a_deleted_snapshot_returns_its_blocks(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    qemu_io(path, "write -P 1 0 1M", format_name="qcow2")
    vmconv.snapshot(path, "create", "old")
    qemu_io(path, "write -P 2 0 1M", format_name="qcow2")
    before = path.stat().st_blocks
    vmconv.snapshot(path, "delete", "old", keep_undo=True)
    assert before - path.stat().st_blocks >= (1 << 20) // 512
    vmconv.undo(path)
    assert content(path, qemu_img, "old") == b"\1" * SIZE
    assert_sound(path, qemu_img)


def test_sizes_of_snapshots_come_back(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    qemu_io(path, "write -P 1 0 1M", format_name="qcow2")
    vmconv.snapshot(path, "create", "small")
    qemu_img("resize", "-q", path, "4M")
    vmconv.snapshot(path, "create", "large")
    for name, size in (("small", SIZE), ("large", 4 * SIZE)):
        vmconv.snapshot(path, "apply", name)
        assert vmconv.info(path)["virtual-size"] == size
        assert_sound(path, qemu_img)
        assert content(path, qemu_img) == (b"\1" * SIZE).ljust(size, b"\0")


def test_names_and_ids_as_in_qemu(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    qemu_img("snapshot", "-c", "first", path)
    vmconv.snapshot(path, "create", "1")
    assert [(one["id"], one["name"]) for one in vmconv.info(path)["snapshots"]] == [("1", "first"), ("2", "1")]
    vmconv.snapshot(path, "delete", "1")
    assert [one["name"] for one in vmconv.info(path)["snapshots"]] == ["first"]
    with pytest.raises(UsageError, match="no snapshot 'third'"):
        vmconv.snapshot(path, "apply", "third")
    with pytest.raises(UsageError, match="snapshot name of 256 bytes"):
        vmconv.snapshot(path, "create", "x" * 256)


def test_the_list_is_that_of_qemu(ext4_dir: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(ext4_dir, "", qemu_img)
    for name in ("one", "a longer name"):
        vmconv.snapshot(path, "create", name)
    assert main(["snapshot", "-l", str(path)]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed == [line.rstrip() for line in qemu_img("snapshot", "-l", path).stdout.splitlines()]


def test_an_image_with_a_data_file_is_refused(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, f"data_file={ext4_dir}/data", qemu_img)
    with pytest.raises(PlanError, match="an image with a data file has no internal snapshots"):
        vmconv.snapshot(path, "create", "one")


@pytest.mark.parametrize("name", ["qed", "vmdk", "vhdx", "raw"])
def test_other_formats_are_refused(name: str, ext4_dir: Path) -> None:
    vmconv.create(ext4_dir / f"disk.{name}", SIZE)
    with pytest.raises(PlanError, match="has no internal snapshots"):
        vmconv.snapshot(ext4_dir / f"disk.{name}", "create", "one")


def test_applying_below_a_layer_is_refused(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    vmconv.snapshot(path, "create", "one")
    vmconv.create(ext4_dir / "layer.qcow2", backing_file="disk.qcow2", backing_format="qcow2")
    vmconv.snapshot(path, "create", "two")
    with pytest.raises(PlanError, match=r"layer\.qcow2: refers to disk\.qcow2"):
        vmconv.snapshot(path, "apply", "one")


def test_other_snapshots_keep_machine_state_and_unknown_fields(ext4_dir: Path, qemu_img: QemuImg) -> None:
    """The entry of a snapshot is made longer by hand: state of a machine, an instruction count, and unknown bytes."""
    path = make(ext4_dir, "", qemu_img)
    qemu_img("snapshot", "-c", "machine", path)
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[64:72], "big")
    entry = struct.pack(">QIHHIIQII", *struct.unpack_from(">QIHH", data, at), 1, 2, 3 * 10**9, 77, 40)
    entry += struct.pack(">QQQ", 77, SIZE, 4711) + b"unknown to all  " + b"1machine"
    data[at : at + len(entry)] = entry
    path.write_bytes(data)
    described = vmconv.info(path)["snapshots"][0]
    assert (described["vm-state-size"], described["icount"], described["vm-clock-sec"]) == (77, 4711, 3)
    vmconv.snapshot(path, "create", "other")
    vmconv.snapshot(path, "delete", "other")
    assert vmconv.info(path)["snapshots"] == [described]
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[64:72], "big")
    assert data[at : at + len(entry)] == entry
    assert_sound(path, qemu_img)


@pytest.mark.parametrize(
    ("offset", "value", "length"),
    [(60, 65537, 4), (60, 65536, 4), (36, 1 << 22, 4), (36, 0xFFFFFFFF, 4), (56, 0xFFFFFFFF, 4), (64, 1 << 62, 8)],
)
def test_absurd_numbers_are_refused(offset: int, value: int, length: int, ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = make(ext4_dir, "", qemu_img)
    qemu_img("snapshot", "-c", "one", path)
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = value.to_bytes(length, "big")
    path.write_bytes(data)
    with pytest.raises((ImageError, PlanError)):
        vmconv.snapshot(path, "create", "two")
    assert path.read_bytes() == data
