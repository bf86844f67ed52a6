"""Compressed clusters of new qcow2 images: what QEMU reads in them, what is taken over, and how it is verified."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vmconv
from support.disks import MIB, QemuImg
from support.written import disk
from vmconv.conversion import verify
from vmconv.errors import AccessError, ExistsError, PlanError, UsageError, VerifyError
from vmconv.model.layout import Layout, Placement
from vmconv.testing import make_in_memory, random_bytes
from vmconv.testing.disks import content, raw_disk
from vmconv.testing.memory import MemoryFile
from vmconv_qcow2 import Qcow2, packing
from vmconv_qcow2.options import Options
from vmconv_qcow2.writer import write

WORDS = [bytes([65 + number % 26]) * (number % 7 + 1) for number in range(500)]
COMPRESSED = "clusters are compressed (zlib)"


def text(size: int, seed: int = 0) -> bytes:
    rng = random.Random(seed)
    return b" ".join(rng.choice(WORDS) for _ in range(size // 4))[:size].ljust(size, b".")


@pytest.fixture
def raw(ext4_dir: Path) -> Path:
    """A disk of text, zeros that are written, random bytes, holes, and a last cluster that is not whole."""
    path = ext4_dir / "disk.raw"
    with path.open("wb") as file:
        file.write(text(3 * MIB) + bytes(MIB) + random_bytes(2 * MIB))
        file.seek(40 * MIB)
        file.write(text(300 * 512, 1))
    return path


def written(size: int) -> MemoryFile:
    source = MemoryFile("source.raw", size)
    source.write(0, text(size))
    return source


def chosen(given: str) -> dict[str, str]:
    return dict(part.split("=") for part in given.split(",") if part)


VARIANTS = [
    "",
    "compression_type=zstd",
    "cluster_size=512",
    "cluster_size=4K,compression_type=zstd",
    "cluster_size=2M",
    "compat=0.10",
    "refcount_bits=64",
    "extended_l2=on",
    "extended_l2=on,compression_type=zstd",
    "compression_level=9",
    "compression_type=zstd,compression_level=19",
]


@pytest.mark.parametrize("given", VARIANTS)
def test_qemu_reads_what_is_compressed(raw: Path, qemu_img: QemuImg, given: str) -> None:
    image = raw.with_suffix(".qcow2")
    result = vmconv.convert(raw, image, options=chosen(given), compress=True, verify="bytes")
    qemu_img("check", image)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)
    kind = chosen(given).get("compression_type", "zlib")
    assert f"clusters are compressed ({kind})" in [copy.reason for copy in result.copies]
    stated = json.loads(qemu_img("info", "--output=json", image).stdout)["format-specific"]["data"]
    assert stated["compression-type"] == kind
    assert os.stat(image).st_blocks * 512 < 6 * MIB


def test_no_larger_than_by_qemu(raw: Path, qemu_img: QemuImg) -> None:
    for kind in ("zlib", "zstd"):
        ours, theirs = raw.with_name("ours.qcow2"), raw.with_name("theirs.qcow2")
        vmconv.convert(raw, ours, options={"compression_type": kind}, compress=True, force=True)
        qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", "-f", "raw", raw, theirs)
        assert ours.stat().st_size < 1.05 * theirs.stat().st_size


def test_clusters_that_do_not_become_shorter_are_shared(xfs_dir: Path) -> None:
    raw, image = xfs_dir / "disk.raw", xfs_dir / "disk.qcow2"
    raw.write_bytes(text(MIB) + random_bytes(2 * MIB))
    result = vmconv.convert(raw, image, compress=True)
    assert result.totals.shared == 2 * MIB
    assert [copy.reason for copy in result.copies] == [COMPRESSED]


def test_the_same_disk_makes_the_same_file(raw: Path) -> None:
    one, two = raw.with_name("one.qcow2"), raw.with_name("two.qcow2")
    for path in (one, two):
        vmconv.convert(raw, path, compress=True)
    assert one.read_bytes() == two.read_bytes()


def test_as_a_stream(raw: Path, qemu_img: QemuImg) -> None:
    image = raw.with_suffix(".qcow2")
    command = [sys.executable, "-m", "vmconv", "convert", "-q", "-c", "-O", "qcow2", str(raw), "-"]
    with image.open("wb") as file:
        subprocess.run(command, stdout=file, check=True)
    qemu_img("check", image)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)


# -- clusters that are taken over


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("size", ["4K", "64K", "2M"])
def test_clusters_of_qemu_are_taken_over(raw: Path, qemu_img: QemuImg, kind: str, size: str) -> None:
    packed, image = raw.with_name("packed.qcow2"), raw.with_name("image.qcow2")
    options = f"compression_type={kind},cluster_size={size}"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, "-f", "raw", raw, packed)
    result = vmconv.convert(packed, image, options={"compression_type": kind, "refcount_bits": "32"}, compress=True)
    qemu_img("check", image)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)
    # Only the cluster at the end of the disk is compressed again: it is not whole in the source's table.
    again = [copy for copy in result.copies if copy.reason == f"clusters are compressed ({kind})"]
    assert sum(copy.bytes for copy in again) < 64 << 10
    vmconv.convert(packed, image, options={"compression_type": kind}, compress=True, force=True, verify="bytes")


def test_taken_over_clusters_are_shared_and_not_decoded(
    xfs_dir: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, packed, image = (xfs_dir / name for name in ("disk.raw", "packed.qcow2", "image.qcow2"))
    raw.write_bytes(text(8 * MIB))
    qemu_img("convert", "-c", "-O", "qcow2", "-f", "raw", raw, packed)

    def refused(*_: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr("vmconv_qcow2.compression.inflate_zlib", refused)
    result = vmconv.convert(packed, image, compress=True)
    assert sum(copy.bytes for copy in result.copies) < 2 * 4096
    assert result.totals.shared > 100 << 10
    monkeypatch.undo()
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)


def test_a_layer_is_compressed_on_its_base(ext4_dir: Path, qemu_img: QemuImg) -> None:
    base, top, image = (ext4_dir / name for name in ("base.qcow2", "top.qcow2", "image.qcow2"))
    raw = ext4_dir / "disk.raw"
    raw.write_bytes(random_bytes(4 * MIB))
    qemu_img("convert", "-O", "qcow2", "-f", "raw", raw, base)
    qemu_img("create", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 512K", "-c", "write -z 2M 128K", str(top)], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 0 3M 70K", str(top)], check=True)
    for compat in ("1.1", "0.10"):
        options = {"compat": compat}
        vmconv.convert(top, image, options=options, backing_file=base.name, compress=True, force=True, verify="bytes")
        qemu_img("check", image)
        qemu_img("compare", top, image)


# -- verification


def swapped(layout: Layout) -> None:
    """Exchanges the first two clusters in the stream of compressed ones."""
    (stream,) = (source for source in layout.files[-1].table.sources if isinstance(source, packing._Stream))
    number = stream._made.number.copy()
    number[[0, 1]] = number[[1, 0]]
    stream._made = stream._made._replace(number=number)


def test_exchanged_clusters_are_noticed(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Qcow2.write

    def wrong(*given: Any, **more: Any) -> Layout:
        layout = original(*given, **more)
        swapped(layout)
        return layout

    monkeypatch.setattr(Qcow2, "write", wrong)
    # What is at other places is read, and here it reads right: the mistake is in what the stream says of itself.
    seen: list[int] = []
    monkeypatch.setattr(verify, "first_difference", lambda *_: seen.append(1))
    vmconv.convert(raw, raw.with_suffix(".qcow2"), compress=True)
    assert seen


def test_exchanged_entries_are_refused(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = packing.pack

    def wrong(*given: Any, **more: Any) -> packing.Packing:
        found = original(*given, **more)
        at, length = found.at.copy(), found.length.copy()
        at[[0, 1]], length[[0, 1]] = at[[1, 0]], length[[1, 0]]
        return found._replace(at=at, length=length)

    monkeypatch.setattr(packing, "pack", wrong)
    with pytest.raises(VerifyError, match="differs from the source at guest address"):
        vmconv.convert(raw, raw.with_suffix(".qcow2"), compress=True)
    assert not raw.with_suffix(".qcow2").exists()


def test_a_source_that_changes_is_noticed() -> None:
    source = written(MIB)
    image = raw_disk(source)
    layout = write(image, Options(compress=True), Placement())
    source.write(0, random_bytes(60000))
    with pytest.raises(AccessError, match="changed while it was being converted"):
        make_in_memory(layout, image)


def test_without_scratch_the_result_is_the_disk() -> None:
    source = written(MIB)
    image = raw_disk(source)
    _, files = make_in_memory(write(image, Options(compress=True, cluster_size=4096), Placement(512)), image)
    assert content(Qcow2().read(files[0], None).flat) == content(image.flat)  # type: ignore[arg-type]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"compression_level": 6}, "compression_level needs compress=on"),
        ({"compress": True, "compression_level": 10}, "compression_level of zlib is 1 to 9"),
        ({"compress": True, "compression_type": "zstd", "compression_level": 20}, "of zstd is 1 to 19"),
        ({"compression_type": "zstd", "compat": "0.10"}, "compression_type=zstd needs compat=1.1"),
        ({"compress": True, "preallocation": "full"}, "preallocation is for clusters that are not compressed"),
        ({"compress": True, "data_file": "x"}, "data_file keeps payload in SOURCE"),
        ({"compress": True, "subformat": "reference"}, "subformat=reference keeps payload in SOURCE"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Options(**options)


def test_what_cannot_be_compressed_is_refused_by_name(raw: Path) -> None:
    with pytest.raises(UsageError, match="-c: vhdx has no compression") as found:
        vmconv.convert(raw, raw.with_suffix(".vhdx"), compress=True)
    assert found.value.hint == "formats that have: qcow2, vmdk"
    with pytest.raises(UsageError, match="-c is -o subformat=streamOptimized for vmdk, and subformat=vmfs contradicts"):
        vmconv.convert(raw, raw.with_suffix(".vmdk"), compress=True, options={"subformat": "vmfs"})
    with pytest.raises(PlanError, match="in place, payload keeps its bytes"):
        vmconv.convert(raw, raw.with_suffix(".qcow2"), compress=True, in_place=True)
    assert os.listdir(raw.parent) == [raw.name]


def test_a_target_that_exists_is_refused_before_anything_is_compressed(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("compressed")

    monkeypatch.setattr(packing, "pack", refused)
    image = raw.with_suffix(".qcow2")
    image.write_bytes(b"kept")
    with pytest.raises(ExistsError, match="already exists"):
        vmconv.convert(raw, image, compress=True)
    with pytest.raises(PlanError, match="is part of the source"):
        vmconv.convert(raw, raw, target_format="qcow2", compress=True, force=True)
    assert image.read_bytes() == b"kept"


def test_a_vmdk_is_streamoptimized(raw: Path, qemu_img: QemuImg) -> None:
    image = raw.with_suffix(".vmdk")
    vmconv.convert(raw, image, compress=True)
    said = json.loads(qemu_img("info", "--output=json", image).stdout)
    assert said["format-specific"]["data"]["create-type"] == "streamOptimized"


def test_counts_that_do_not_fit_are_refused() -> None:
    source = written(MIB)
    with pytest.raises(PlanError, match="compressed clusters share a cluster of the file, and refcount_bits=1 counts"):
        write(raw_disk(source), Options(compress=True, refcount_bits=1, cluster_size=65536), Placement())


def test_runs_of_ranges_that_touch_or_overlap() -> None:
    at, length = np.array([100, 0, 10, 90, 300]), np.array([50, 10, 20, 20, 1])
    run, begin, end = packing._runs(at, length)
    assert run.tolist() == [1, 0, 0, 1, 2]
    assert (begin.tolist(), end.tolist()) == ([0, 90, 300], [30, 150, 301])


def test_nothing_to_compress() -> None:
    layout = write(disk([], MIB), Options(compress=True), Placement())
    assert layout.files[-1].table.size % 65536 == 0


def test_clusters_are_taken_over_wherever_they_lie(tmp_path: Path, qemu_img: QemuImg) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for start, end in ((2, 5), (9, 10), (13, 16)):
            file.seek(start << 16)
            file.write(b"some text " * ((end - start << 16) // 10))
        file.truncate(1 << 20)
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    vmconv.convert(disk, first, compress=True)
    vmconv.convert(first, second, compress=True)
    for made in (first, second):
        qemu_img("check", made)
        qemu_img("compare", "-f", "raw", disk, made)
    assert second.stat().st_size == first.stat().st_size
