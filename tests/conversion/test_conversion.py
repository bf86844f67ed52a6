"""Conversions on real filesystems: nothing is copied where blocks can be shared, and QEMU sees the same disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, process_io, scribble
from vmconv.errors import PlanError, UsageError

OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {"cluster_size": "512"},
    {"cluster_size": "4K"},
    {"cluster_size": "2M"},
    {"compat": "0.10"},
    {"refcount_bits": "1"},
    {"extended_l2": "on"},
)


def test_a_chain_of_three_is_flattened_without_copying(reflink_dir: Path, qemu_img: QemuImg) -> None:
    base = make_disk(reflink_dir / "base.raw", 20 * MIB)
    top, names = base, ("one.qcow2", "two.qcow2", "three.qcow2")
    for seed, name in enumerate(names):
        image = reflink_dir / name
        qemu_img("create", "-f", "qcow2", "-b", top.name, "-F", "qcow2" if seed else "raw", image)
        scribble(image, 20 * MIB, seed, unit=65536)
        top = image
    flat = reflink_dir / "flat.raw"
    result = vmconv.convert(str(top), str(flat), zero_copy="require")
    assert result.totals.copied == 0
    qemu_img("compare", "-f", "qcow2", "-F", "raw", top, flat)
    assert vmconv.prove(str(top), str(flat))


def test_input_and_output_of_the_process_do_not_grow_with_the_payload(reflink_dir: Path) -> None:
    grown = []
    for size in (16 * MIB, 128 * MIB):
        raw = reflink_dir / f"{size}.raw"
        with raw.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        vmconv.convert(str(raw), str(reflink_dir / "warm.qcow2"), force=True)
        before = process_io()
        vmconv.convert(str(raw), str(reflink_dir / f"{size}.qcow2"))
        after = process_io()
        grown.append({key: after[key] - before[key] for key in ("rchar", "wchar", "read_bytes", "write_bytes")})
    small, large = grown
    # 112 MiB more payload are 1792 more clusters: 14 KiB of L2 entries, in whole tables, and their reading back.
    assert all(large[key] - small[key] < MIB for key in small), grown
    assert large["wchar"] < 2 * MIB
    assert large["rchar"] < 2 * MIB


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_reflink_everything_is_copied_and_announced(
    ext4_dir: Path, qemu_img: QemuImg, options: dict[str, str]
) -> None:
    raw, image, back = (ext4_dir / name for name in ("disk.raw", "disk.qcow2", "back.raw"))
    make_disk(raw, 40 * MIB)
    announced: list[vmconv.Plan] = []
    result = vmconv.convert(str(raw), str(image), options=options, announce=announced.append)
    assert result.backend == "copy"
    assert result.totals.shared == 0
    assert [copy.bytes for copy in announced[0].copies] == [result.totals.copied]
    assert "ext4" in announced[0].copies[0].reason
    qemu_img("check", image)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)
    vmconv.convert(str(image), str(back))
    assert raw.read_bytes() == back.read_bytes()
    # Copies are as sparse as their source.
    assert back.stat().st_blocks <= raw.stat().st_blocks + 64


def test_a_source_on_another_filesystem_is_copied_with_that_reason(xfs_dir: Path, btrfs_dir: Path) -> None:
    raw = make_disk(xfs_dir / "disk.raw", 4 * MIB)
    plan = vmconv.plan(str(raw), str(btrfs_dir / "disk.qcow2"))
    assert plan.backend == "copy"
    assert "another filesystem" in plan.copies[0].reason


def test_the_copy_backend_does_not_share_behind_our_back(xfs_dir: Path) -> None:
    raw, copy = make_disk(xfs_dir / "disk.raw", 8 * MIB), xfs_dir / "copy.raw"
    result = vmconv.convert(str(raw), str(copy), backend="copy")
    assert result.totals.shared == 0
    assert vmconv.prove(str(raw), str(copy)).shared == 0
    assert raw.read_bytes() == copy.read_bytes()


def test_planning_touches_nothing(reflink_dir: Path) -> None:
    raw = make_disk(reflink_dir / "disk.raw", 4 * MIB)
    before = reflink_dir.stat().st_mtime_ns, sorted(os.listdir(reflink_dir))
    plan = vmconv.plan(str(raw), str(reflink_dir / "disk.qcow2"))
    assert plan.totals.shared > 0
    assert (reflink_dir.stat().st_mtime_ns, sorted(os.listdir(reflink_dir))) == before


@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4097, 65536 + 1, 5 * MIB + 1536, 858993664 // 64])
def test_disks_of_odd_sizes(reflink_dir: Path, qemu_img: QemuImg, size: int) -> None:
    raw, image, back = (reflink_dir / name for name in ("disk.raw", "disk.qcow2", "back.raw"))
    raw.write_bytes(os.urandom(size))
    result = vmconv.convert(str(raw), str(image))
    vmconv.convert(str(image), str(back))
    sectors = -(-size // 512) * 512
    assert back.read_bytes() == raw.read_bytes() + bytes(sectors - size)
    assert bool(result.losses) == (size != sectors)
    qemu_img("check", image)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)


def test_an_empty_disk(reflink_dir: Path, qemu_img: QemuImg) -> None:
    raw, image = reflink_dir / "disk.raw", reflink_dir / "disk.qcow2"
    raw.touch()
    vmconv.convert(str(raw), str(image))
    qemu_img("check", image)
    assert vmconv.info(str(image))["virtual-size"] == 0


def test_unwritten_ranges_of_a_source_are_zeros_not_payload(reflink_dir: Path) -> None:
    raw, image = reflink_dir / "disk.raw", reflink_dir / "disk.qcow2"
    with raw.open("wb") as file:
        file.write(os.urandom(MIB))
        file.flush()
        os.posix_fallocate(file.fileno(), MIB, 15 * MIB)
    result = vmconv.convert(str(raw), str(image))
    # XFS counts a page that it has in memory as data, written or not.
    assert MIB <= result.totals.shared < 2 * MIB
    assert vmconv.compare(str(raw), str(image))


def test_data_that_is_not_on_disk_yet_is_not_missed(reflink_dir: Path) -> None:
    raw, image = reflink_dir / "disk.raw", reflink_dir / "disk.qcow2"
    with raw.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)
        file.seek(3 * MIB)
        file.write(os.urandom(MIB))
    vmconv.convert(str(raw), str(image))
    back = reflink_dir / "back.raw"
    vmconv.convert(str(image), str(back))
    assert back.read_bytes() == raw.read_bytes()


def test_btrfs_files_without_copy_on_write_are_shared_with_their_like(btrfs_dir: Path) -> None:
    raw, image = btrfs_dir / "disk.raw", btrfs_dir / "disk.qcow2"
    raw.touch()
    subprocess.run(["chattr", "+C", str(raw)], check=True)
    with raw.open("r+b") as file:
        file.write(os.urandom(MIB))
    result = vmconv.convert(str(raw), str(image), zero_copy="require")
    assert result.totals.shared == MIB
    assert vmconv.prove(str(raw), str(image))


def test_a_block_device_is_a_source(xfs_dir: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    content = make_disk(tmp_path / "device.raw", 8 * MIB)
    attach = ["losetup", "--find", "--show", "--read-only", str(content)]
    device = subprocess.run(attach, capture_output=True, text=True, check=True).stdout.strip()
    try:
        result = vmconv.convert(device, str(xfs_dir / "disk.qcow2"), source_format="raw")
        assert "block device" in result.copies[0].reason
        vmconv.convert(str(xfs_dir / "disk.qcow2"), str(xfs_dir / "back.raw"))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert (xfs_dir / "back.raw").read_bytes() == content.read_bytes()


def test_compressed_clusters_are_copied_with_that_reason(reflink_dir: Path, qemu_img: QemuImg) -> None:
    raw = reflink_dir / "disk.raw"
    raw.write_bytes((b"some text that compresses " * 4096)[: 64 * 1024] * 64)
    for kind in ("zlib", "zstd"):
        image, back = reflink_dir / f"{kind}.qcow2", reflink_dir / f"{kind}.raw"
        qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, image)
        result = vmconv.convert(str(image), str(back))
        assert [copy.reason for copy in result.copies] == [f"compressed clusters have to be decompressed ({kind})"]
        assert back.read_bytes() == raw.read_bytes()


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}, {"cluster_size": "2M"}, {"compat": "0.10"}], ids=str)
def test_a_kept_backing_file_stays_the_parent(reflink_dir: Path, qemu_img: QemuImg, options: dict[str, str]) -> None:
    make_disk(reflink_dir / "base.raw", 8 * MIB)
    middle, top = reflink_dir / "middle.qcow2", reflink_dir / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", middle)
    scribble(middle, 8 * MIB, 1)
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4K", "-b", "middle.qcow2", "-F", "qcow2", top)
    scribble(top, 8 * MIB, 2)
    for backing in ("middle.qcow2", "base.raw"):
        target = reflink_dir / "target.qcow2"
        vmconv.convert(str(top), str(target), backing_file=backing, options=options, force=True)
        assert vmconv.info(str(target))["backing-filename"] == backing
        qemu_img("check", target)
        qemu_img("compare", top, target)
        assert target.stat().st_blocks * 512 <= 9 * MIB


def test_names_of_formats_are_those_of_qemu_in_images_that_qemu_reads(reflink_dir: Path, qemu_img: QemuImg) -> None:
    """QEMU calls a VHD vpc."""
    raw, base, top = make_disk(reflink_dir / "disk.raw", 8 * MIB), reflink_dir / "base.vpc", reflink_dir / "top.qcow2"
    vmconv.convert(str(raw), str(base), target_format="vpc")
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "vpc", top)
    scribble(top, 8 * MIB, 1)
    flat = reflink_dir / "flat.raw"
    vmconv.convert(str(top), str(flat), zero_copy="require")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", top, flat)
    for backing_format in (None, "vhd", "vpc"):
        kept = reflink_dir / "kept.qcow2"
        vmconv.convert(str(top), str(kept), backing_file=base.name, backing_format=backing_format, force=True)
        assert vmconv.info(str(kept))["backing-filename-format"] == "vpc"
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", top, kept)
    # The other way round a name of QEMU's does for a parent that has to be of the format itself.
    target = reflink_dir / "new.vhd"
    vmconv.convert(str(top), str(target), chain=True)
    child = reflink_dir / "child.vhd"
    vmconv.convert(str(target), str(child), backing_file="base.vhd", backing_format="vpc")
    assert vmconv.compare(str(top), str(child))


@pytest.mark.parametrize("stated", ["raw", "vpc", "qcow3"])
@pytest.mark.parametrize("target_format", ["qcow2", "qed"])
def test_a_kept_layer_is_stated_in_the_format_it_was_read_in(
    tmp_path: Path, qemu_img: QemuImg, stated: str, target_format: str
) -> None:
    """In another one it would be another disk, or none."""
    vmconv.convert(make_disk(tmp_path / "disk.raw", MIB), tmp_path / "base.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    target = tmp_path / f"kept.{target_format}"
    words = "not installed" if stated == "qcow3" else f"cannot be declared as {stated}"
    with pytest.raises(UsageError, match=words):
        vmconv.convert(tmp_path / "top.qcow2", target, backing_file="base.qcow2", backing_format=stated)
    assert not target.exists()
    vmconv.convert(tmp_path / "top.qcow2", target, backing_file="base.qcow2", backing_format="qcow2")
    qemu_img("compare", "-f", target_format, "-F", "raw", target, tmp_path / "disk.raw")


def test_a_misspelt_format_is_refused_though_nothing_needs_it(tmp_path: Path) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    with pytest.raises(UsageError, match="'qcow3' is not installed"):
        vmconv.convert(raw, tmp_path / "new.qcow2", source_backing_format="qcow3")
    with pytest.raises(UsageError, match="'qcow3' is not installed"):
        vmconv.info(raw, backing_format="qcow3")
    with pytest.raises(UsageError, match="'' is not installed"):
        vmconv.convert(raw, tmp_path / "new.qcow2", target_format="")
    assert not (tmp_path / "new.qcow2").exists()


def test_only_a_layer_of_the_source_can_be_kept(reflink_dir: Path, qemu_img: QemuImg) -> None:
    make_disk(reflink_dir / "base.raw", MIB)
    make_disk(reflink_dir / "other.raw", MIB, seed=1)
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", reflink_dir / "top.qcow2")
    with pytest.raises(PlanError, match="not a backing file of top"):
        vmconv.convert(str(reflink_dir / "top.qcow2"), str(reflink_dir / "new.qcow2"), backing_file="other.raw")
    with pytest.raises(UsageError, match="raw cannot have a backing file"):
        vmconv.convert(str(reflink_dir / "top.qcow2"), str(reflink_dir / "new.raw"), backing_file="base.raw")


def test_an_internal_snapshot_is_converted_by_name_or_id(reflink_dir: Path, qemu_img: QemuImg) -> None:
    image = reflink_dir / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "8M")
    states = []
    for seed, name in enumerate(("first", "second")):
        scribble(image, 8 * MIB, seed)
        states.append(reflink_dir / f"{name}.raw")
        qemu_img("convert", "-O", "raw", image, states[-1])
        qemu_img("snapshot", "-c", name, image)
    scribble(image, 8 * MIB, 9)
    for wanted, state in (("first", states[0]), ("2", states[1])):
        result = vmconv.convert(str(image), str(reflink_dir / "got.raw"), snapshot=wanted, force=True)
        assert (reflink_dir / "got.raw").read_bytes() == state.read_bytes()
        assert "1 internal snapshot" in result.losses[0]
    with pytest.raises(UsageError, match="no snapshot 'third'"):
        vmconv.convert(str(image), str(reflink_dir / "got.raw"), snapshot="third", force=True)


@pytest.mark.parametrize("raw_external", ["on", "off"])
def test_an_external_data_file_is_read(reflink_dir: Path, qemu_img: QemuImg, raw_external: str) -> None:
    image = reflink_dir / "disk.qcow2"
    options = f"data_file={reflink_dir / 'disk.data'},data_file_raw={raw_external}"
    qemu_img("create", "-f", "qcow2", "-o", options, image, "8M")
    scribble(image, 8 * MIB, 3, unit=65536)
    result = vmconv.convert(str(image), str(reflink_dir / "flat.qcow2"), zero_copy="require")
    assert result.totals.shared > 0
    qemu_img("compare", image, reflink_dir / "flat.qcow2")


def test_bitmaps_are_reported_as_losses(reflink_dir: Path, qemu_img: QemuImg) -> None:
    image = reflink_dir / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", image, "8M")
    qemu_img("bitmap", "--add", image, "daily")
    assert "bitmap" in vmconv.convert(str(image), str(reflink_dir / "disk.raw")).losses[0]


def test_a_disk_too_large_for_its_clusters_is_refused_with_a_hint(xfs_dir: Path) -> None:
    raw = xfs_dir / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PlanError, match="cannot hold") as caught:
        vmconv.plan(str(raw), str(xfs_dir / "disk.qcow2"), options={"cluster_size": "512"})
    assert "cluster_size" in str(caught.value.hint)


_SCALE = """
import json, sys, vmconv
result = vmconv.convert(sys.argv[1], sys.argv[2], options={"cluster_size": sys.argv[3]})
same = vmconv.compare(sys.argv[1], sys.argv[2])
# The peak of this program: what getrusage says includes the one that started it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([result.totals.shared, result.totals.copied, same.identical, same.read, int(peak.split()[1])]))
"""


@pytest.mark.parametrize(("size", "cluster_size"), [(1 << 40, "64K"), (1 << 40, "2M"), (64 << 40, "64K")])
def test_large_disks_take_memory_for_metadata_only(xfs_dir: Path, size: int, cluster_size: str) -> None:
    """A disk of 1 TiB with payload in every cluster, made of one file's blocks; and a sparse one of 64 TiB."""
    raw = xfs_dir / "disk.raw"
    piece = 512 * MIB
    with raw.open("w+b") as file:
        for _ in range(piece // (16 * MIB)):
            file.write(os.urandom(16 * MIB))
        file.flush()
        os.fsync(file.fileno())
        file.truncate(size)
        if size == 1 << 40:
            _repeat(file.fileno(), piece, size)
    arguments = [str(raw), str(xfs_dir / "disk.qcow2"), cluster_size]
    done = subprocess.run([sys.executable, "-c", _SCALE, *arguments], capture_output=True, text=True, check=True)
    shared, copied, identical, read, peak = json.loads(done.stdout)
    assert (shared, copied) == (size if size == 1 << 40 else piece, 0)
    assert (identical, read) == (True, 0)
    assert peak < 250 * 1024


def _repeat(descriptor: int, length: int, size: int) -> None:
    from vmconv.system.linux import clone_range

    while length < size:
        clone_range(descriptor, descriptor, 0, min(length, size - length), length)
        length *= 2
