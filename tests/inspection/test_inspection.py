"""info, map and check say what qemu-img says."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io, scribble
from support.kits import kit
from support.qcow2_images import image as qcow2
from vmconv.cli.main import main
from vmconv.io.registry import installed

CREATE = {
    "plain": [],
    "small clusters": ["-o", "cluster_size=512"],
    "large clusters": ["-o", "cluster_size=2M"],
    "version 2": ["-o", "compat=0.10"],
    "subclusters": ["-o", "extended_l2=on"],
    "small subclusters": ["-o", "extended_l2=on,cluster_size=16K"],
    "preallocated metadata": ["-o", "preallocation=metadata"],
    "preallocated": ["-o", "preallocation=falloc"],
    "written": ["-o", "preallocation=full"],
    "narrow refcounts": ["-o", "refcount_bits=2"],
    "wide refcounts": ["-o", "refcount_bits=64"],
}


@pytest.fixture(params=CREATE)
def image(request: pytest.FixtureRequest, tmp_path: Path, qemu_img: QemuImg) -> Path:
    """An image made and written to by QEMU."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", *CREATE[request.param], path, "16M")
    scribble(path, 16 * MIB, len(request.param))
    return path


@pytest.fixture
def chain(tmp_path: Path, qemu_img: QemuImg) -> Iterator[Path]:
    """The top of a chain of four, whose sizes and clusters differ."""
    make_disk(tmp_path / "base.raw", 8 * MIB)
    below, kind = "base.raw", "raw"
    for number, (size, options) in enumerate(
        [("20M", "cluster_size=64K"), ("20M", "extended_l2=on"), ("12M", "compat=0.10")]
    ):
        path = tmp_path / f"layer{number}.qcow2"
        qemu_img("create", "-f", "qcow2", "-o", options, "-b", below, "-F", kind, path, size)
        scribble(path, 12 * MIB, number)
        below, kind = path.name, "qcow2"
    yield path


def our_map(capsys: pytest.CaptureFixture[str], path: Path, *more: str) -> str:
    assert main(["map", "--output", "json", str(path), *more]) == 0
    return capsys.readouterr().out


def test_map_equals_that_of_qemu_img(image: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]) -> None:
    assert our_map(capsys, image) == qemu_img("map", "--output=json", image).stdout


def test_map_of_a_chain_equals_that_of_qemu_img(
    chain: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (chain, chain.parent / "layer1.qcow2", chain.parent / "layer0.qcow2"):
        assert our_map(capsys, path) == qemu_img("map", "--output=json", path).stdout


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (1, 20 * MIB), (5 * MIB - 512, None), (11 * MIB, 9 * MIB), (19 * MIB, 99 * MIB)]
)
def test_map_of_a_part_equals_that_of_qemu_img(
    chain: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str], start: int, length: int | None
) -> None:
    part = [f"--start-offset={start}", *([] if length is None else [f"--max-length={length}"])]
    for path in (chain, chain.parent / "layer1.qcow2", chain.parent / "layer0.qcow2"):
        if path.stat().st_size > start:
            assert our_map(capsys, path, *part) == qemu_img("map", "--output=json", *part, path).stdout


def test_map_of_nothing_is_empty(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (["--start-offset", "1P"], ["--max-length", "0"]):
        assert our_map(capsys, image, *part) == "[]\n"
    with pytest.raises(vmconv.UsageError, match="no part of a disk"):
        vmconv.map_disk(image, start_offset=-1)
    with pytest.raises(vmconv.UsageError, match="no part of a disk"):
        vmconv.map_disk(image, max_length=-1)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_map_of_compressed_clusters_equals_that_of_qemu_img(
    tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    raw, path = make_disk(tmp_path / "disk.raw", 4 * MIB), tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, path)
    assert our_map(capsys, path) == qemu_img("map", "--output=json", path).stdout


@pytest.mark.parametrize("size", [4 * MIB, 4 * MIB + 512, 4 * MIB + 1])
def test_map_of_a_raw_disk_equals_that_of_qemu_img(
    reflink_dir: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    raw = make_disk(reflink_dir / "disk.raw", size)
    assert our_map(capsys, raw) == qemu_img("map", "-f", "raw", "--output=json", raw).stdout


def test_map_for_people_lists_the_payload(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(image)]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["Offset", "Length", "Mapped", "to", "File"]
    listed = sum(int(row.split()[1], 16) for row in rows)
    assert listed == sum(row.length for row in vmconv.map_disk(str(image)) if row.data and not row.zero)


def test_info_has_the_values_of_qemu_img(image: Path, qemu_img: QemuImg) -> None:
    theirs = json.loads(qemu_img("info", "--output=json", image).stdout)
    ours = vmconv.info(str(image))
    for key in ("format", "virtual-size", "actual-size", "cluster-size", "dirty-flag", "filename"):
        assert ours[key] == theirs[key], key
    assert ours["format-specific"]["data"] == theirs["format-specific"]["data"]


def test_info_does_not_open_the_parent(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", path, "1M")
    facts = vmconv.info(str(path))
    assert facts["backing-filename"] == "gone.raw"
    assert facts["backing-filename-format"] == "raw"


def test_info_describes_a_whole_chain(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backing-chain", "--output", "json", str(chain)]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert [layer["format"] for layer in layers] == ["qcow2", "qcow2", "qcow2", "raw"]


def test_info_lists_snapshots(tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    qemu_img("snapshot", "-c", "before", path)
    theirs = json.loads(qemu_img("info", "--output=json", path).stdout)["snapshots"][0]
    ours = vmconv.info(str(path))["snapshots"][0]
    assert theirs.items() <= ours.items()
    assert main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("snapshot list:")
    listed = qemu_img("snapshot", "-l", path).stdout.splitlines()[2].split()
    # What it calls 0 B, and the number of instructions, which is of no interest to people.
    assert lines[at + 2].split() == listed[:-1]


def test_bitmaps_are_listed_as_qemu_img_lists_them(
    tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "one")
    qemu_img("bitmap", "--add", "-g", "128k", "--disable", path, "two")
    theirs = json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]["bitmaps"]
    assert vmconv.info(str(path))["format-specific"]["data"]["bitmaps"] == theirs
    assert main(["info", str(path)]) == 0
    assert "        [1]:\n            name: two\n            granularity: 131072\n" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_the_disk_size_is_that_of_all_files(tmp_path: Path, qemu_img: QemuImg, options: str) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={options}", path, "8M")
    qemu_io(path, "write -P 1 0 3M")
    theirs = json.loads(qemu_img("info", "--output=json", path).stdout)["actual-size"]
    assert vmconv.info(str(path))["actual-size"] == theirs > 3 * MIB


def test_the_disk_size_counts_a_data_file_and_no_parent(tmp_path: Path, qemu_img: QemuImg) -> None:
    path, base = tmp_path / "disk.qcow2", make_disk(tmp_path / "base.raw", 8 * MIB)
    data = tmp_path / "data.raw"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data}", "-b", base, "-F", "raw", path)
    qemu_io(path, "write -P 1 0 3M")
    # QEMU 7.2 leaves the data file out, though it sums up the extents of a VMDK.
    assert vmconv.info(str(path))["actual-size"] == sum(one.stat().st_blocks * 512 for one in (path, data)) > 3 * MIB


def test_no_value_is_printed_as_python_has_it(
    tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_disk(tmp_path / "disk.raw", 8 * MIB)
    for name, one in installed().formats.items():
        path = tmp_path / f"disk{one.suffixes[0]}"
        if not one.can_write:
            path.write_bytes(kit(name).sample({}))
        elif name != "raw":
            vmconv.convert(str(raw), str(path), force=True)
        assert main(["info", str(path)]) == 0
        # Without its passphrase there is no plan.
        code = 2 if kit(name).passphrases else 0
        assert main(["plan", "-O", "raw", str(path), str(tmp_path / "target.raw")]) == code
        said = capsys.readouterr().out
        assert not re.search(r"[{}\[(]'|None|True|False|[a-z]=", said), said
        assert not re.search(r" (?=:|$)", said, re.MULTILINE), said


def test_a_creator_has_no_padding(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    vmconv.convert(str(make_disk(tmp_path / "disk.raw", MIB)), str(path))
    assert path.read_bytes()[-512 + 28 : -512 + 32] == b"win "
    assert vmconv.info(str(path))["disk"]["creator"] == "win"


def test_a_long_name_of_a_parent_that_is_no_text_is_described(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2(backing=b"\xff" * 1023))
    assert vmconv.info(str(path))["backing-filename"] == "\udcff" * 1023


def test_check_finds_nothing_in_good_images_and_counts_as_qemu_img_does(image: Path, qemu_img: QemuImg) -> None:
    theirs = json.loads(qemu_img("check", "--output=json", image).stdout)
    ours = vmconv.check(str(image))
    assert ours is not None
    assert (ours.corruption_count, ours.leak_count) == (0, 0)
    assert (ours.allocated_clusters, ours.total_clusters) == (theirs["allocated-clusters"], theirs["total-clusters"])


def test_check_follows_snapshots_and_bitmaps(tmp_path: Path, qemu_img: QemuImg) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "16M")
    for seed in range(3):
        scribble(path, 16 * MIB, seed)
        qemu_img("snapshot", "-c", f"state{seed}", path)
    qemu_img("bitmap", "--add", path, "changes")
    scribble(path, 16 * MIB, 9)
    report = vmconv.check(str(path))
    assert report is not None
    assert (report.corruptions, report.leaks) == ((), ())


def test_check_says_of_damaged_images_what_qemu_img_says(tmp_path: Path, qemu_img: QemuImg) -> None:
    """Flips bits of refcounts and of L1 and L2 entries: the verdict (corrupt, leaked) is the same each time."""
    path, broken = tmp_path / "disk.qcow2", tmp_path / "broken.qcow2"
    qemu_img("create", "-f", "qcow2", path, "16M")
    scribble(path, 16 * MIB, 4)
    qemu_img("snapshot", "-c", "state", path)
    scribble(path, 16 * MIB, 5)
    good = path.read_bytes()
    tables = [at for at in range(0x20000, 0x50000, 8) if good[at : at + 8] != bytes(8)]
    rng = random.Random(1)
    verdicts = set()
    for _ in range(40):
        data = bytearray(good)
        bit = rng.randrange(9, 48)
        data[rng.choice(tables) + 7 - bit // 8] ^= 1 << bit % 8
        broken.write_bytes(data)
        theirs = json.loads(qemu_img("check", "--output=json", broken, ok=(0, 2, 3)).stdout)
        ours = vmconv.check(str(broken))
        assert ours is not None
        verdict = bool(theirs.get("corruptions")), bool(theirs.get("leaks"))
        assert (bool(ours.corruption_count), bool(ours.leak_count)) == verdict, (theirs, ours)
        verdicts.add(verdict)
    assert len(verdicts) >= 3


@pytest.mark.parametrize(
    ("place", "value", "code", "words"),
    [
        (0x20000 + 2 * 3, 2, 3, "Leaked cluster 3 refcount=2 reference=1"),
        (0x20000 + 2 * 5, 0, 2, "ERROR cluster 5 refcount=0 reference=1"),
        (0x20000 + 2 * 9, 1, 0, "No errors"),
    ],
)
def test_check_exit_codes_are_those_of_qemu_img(
    tmp_path: Path, qemu_img: QemuImg, capsys: pytest.CaptureFixture[str], place: int, value: int, code: int, words: str
) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"x" * (4 * 65536))
    vmconv.convert(str(raw), str(image))
    with image.open("r+b") as file:
        file.seek(place)
        file.write(value.to_bytes(2, "big"))
    assert main(["check", str(image)]) == code
    assert words in capsys.readouterr().out
    qemu_img("check", image, ok=(code,))


def test_check_of_a_format_without_structure_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    assert main(["check", str(raw)]) == 63
    assert "no structure" in capsys.readouterr().err
    assert vmconv.check(str(raw)) is None
