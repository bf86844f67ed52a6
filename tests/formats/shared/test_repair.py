"""`vmconv check -r`: QEMU's own check finds nothing afterwards, and the guest's disk stays as it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

import vmconv
from support.disks import MIB, QemuImg, make_disk, qemu_io
from support.vhdx_images import BAT, CLEAR_3, dirty, entry, sample
from vmconv.cli.main import main
from vmconv.conversion.editing import damage
from vmconv.errors import PlanError, VerifyError
from vmconv.interface.format import CheckReport
from vmconv.io.opener import Opener
from vmconv.io.registry import installed

Damage = Callable[[bytearray], None]
SIZE = 4 * MIB
CLUSTER = 65536


def number(data: bytearray, at: int, length: int = 8) -> int:
    return int.from_bytes(data[at : at + length], "big")


def put(data: bytearray, at: int, value: int, length: int = 8) -> None:
    data[at : at + length] = value.to_bytes(length, "big")


def block_of(data: bytearray) -> int:
    """Returns the offset of the first refcount block."""
    return number(data, number(data, 48))


def set_count(cluster: int, value: int) -> Damage:
    return lambda data: put(data, block_of(data) + cluster * 2, value, 2)


def all_counts_wrong(data: bytearray) -> None:
    rng = random.Random(1)
    block = block_of(data)
    for cluster in range(len(data) // CLUSTER):
        put(data, block + cluster * 2, rng.randrange(4), 2)


def l1_flag(data: bytearray) -> None:
    at = number(data, 40)
    put(data, at, number(data, at) ^ 1 << 63)


def l2_flags(data: bytearray) -> None:
    table = number(data, number(data, 40)) & 0x00FFFFFFFFFFFE00
    for index in range(0, 64, 3):
        value = number(data, table + index * 8)
        put(data, table + index * 8, value ^ 1 << 63 if value & 0x00FFFFFFFFFFFE00 else value)


def put_at(at: int, value: int, length: int = 8) -> Damage:
    return lambda data: put(data, at, value, length)


def no_block(data: bytearray) -> None:
    put(data, number(data, 48), 0)


def block_between_clusters(data: bytearray) -> None:
    put(data, number(data, 48), block_of(data) + 512)


def block_over_payload(data: bytearray) -> None:
    table = number(data, number(data, 40)) & 0x00FFFFFFFFFFFE00
    put(data, number(data, 48), number(data, table + 8 * 5) & 0x00FFFFFFFFFFFE00)


def block_twice(data: bytearray) -> None:
    put(data, number(data, 48) + 8, block_of(data))


DAMAGES: dict[str, Damage] = {
    "a leak": set_count(9, 3),
    "a cluster without count": set_count(9, 0),
    "counts at random": all_counts_wrong,
    "flag of an L1 entry": l1_flag,
    "flags of L2 entries": l2_flags,
    "no refcount block": no_block,
    "a refcount block between clusters": block_between_clusters,
    "a refcount block over payload": block_over_payload,
    "a refcount block twice": block_twice,
    "a refcount table between clusters": put_at(48, 0x10200),
    "a refcount table past the end": put_at(48, 1 << 40),
    "a refcount table over the L1 table": lambda data: put(data, 48, number(data, 40)),
    "no refcount table": put_at(48, 0),
    "marked dirty": put_at(72, 1),
    "marked corrupt": put_at(72, 2),
}


@pytest.fixture
def image(ext4_dir: Path, qemu_img: QemuImg) -> Path:
    disk = make_disk(ext4_dir / "disk.raw", SIZE)
    path = ext4_dir / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, path)
    qemu_io(path, "write -P 1 0 1M", format_name="qcow2")
    qemu_img("snapshot", "-c", "old", path)
    qemu_io(path, "write -P 2 512k 1M", format_name="qcow2")
    return path


def contents(path: Path, qemu_img: QemuImg) -> list[bytes]:
    """Returns the disk and its snapshot, by QEMU without its check of reference counts: it only reads."""
    found = []
    for chosen in ([], ["-l", "snapshot.name=old"]):
        raw = path.with_name("content")
        qemu_img("convert", "-f", "qcow2", *chosen, "-O", "raw", path, raw)
        found.append(raw.read_bytes())
        raw.unlink()
    return found


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_qcow2(damage: Damage, image: Path, qemu_img: QemuImg) -> None:
    expected = contents(image, qemu_img)
    data = bytearray(image.read_bytes())
    damage(data)
    image.write_bytes(data)
    done = vmconv.repair(image, keep_undo=True)
    assert done is not None
    assert (done.after.corruptions, done.after.leaks, done.after.doubts, done.after.errors) == ((), (), (), ())
    assert done.written
    qemu_img("check", "-q", "-f", "qcow2", image)
    assert contents(image, qemu_img) == expected
    vmconv.undo(image)
    assert image.read_bytes() == data


@pytest.mark.parametrize("options", ["refcount_bits=1", "refcount_bits=64,cluster_size=512", "extended_l2=on"])
def test_qcow2_with_any_counts(options: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = ext4_dir / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, make_disk(ext4_dir / "disk.raw", SIZE), path)
    data = bytearray(path.read_bytes())
    put(data, number(data, 48), 0)
    path.write_bytes(data)
    done = vmconv.repair(path)
    assert done is not None
    assert done.before.corruption_count
    qemu_img("check", "-q", "-f", "qcow2", path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", ext4_dir / "disk.raw", path)


def test_leaks_alone(image: Path, qemu_img: QemuImg) -> None:
    """With -r leaks, errors stay: a count that is too low, and with it the flags."""
    data = bytearray(image.read_bytes())
    clusters = len(data) // CLUSTER
    data += bytes(CLUSTER)
    set_count(clusters, 1)(data)
    set_count(9, 0)(data)
    image.write_bytes(data)
    before = vmconv.check(image)
    assert before is not None
    assert before.leak_count == 1
    done = vmconv.repair(image, "leaks")
    assert done is not None
    assert (done.leaks, done.corruptions) == (1, 0)
    assert done.after.corruptions == before.corruptions
    done = vmconv.repair(image)
    assert done is not None
    assert done.after.corruption_count == 0
    qemu_img("check", "-q", "-f", "qcow2", image)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_dropped_leaks_change_no_other_cluster(damage: Damage, image: Path) -> None:
    """A refcount block may lie where payload or a table is: no counts may be written there."""
    data = bytearray(image.read_bytes()) + bytes(CLUSTER * 3)
    blocks = {block_of(data)}
    damage(data)
    image.write_bytes(data)
    vmconv.repair(image, "leaks")
    after = image.read_bytes()
    changed = {at for at in range(0, len(data), CLUSTER) if data[at : at + CLUSTER] != after[at : at + CLUSTER]}
    assert changed <= blocks


def test_what_does_not_follow_from_the_rest_stays_reported(image: Path) -> None:
    data = bytearray(image.read_bytes())
    table = number(data, number(data, 40)) & 0x00FFFFFFFFFFFE00
    put(data, table + 8 * 40, 1 << 63 | 0x123400)
    set_count(9, 0)(data)
    image.write_bytes(data)
    done = vmconv.repair(image)
    assert done is not None
    assert done.corruptions > 0
    assert "is not the offset of a cluster" in "".join(done.after.corruptions)


def snapshot_table(at: int, value: int, length: int) -> Damage:
    """Damages the first entry of the snapshot table."""
    return lambda data: put(data, number(data, 64) + at, value, length)


UNKNOWN: dict[str, Damage] = {
    "snapshot table past the end": put_at(64, 1 << 40),
    "extra data of a snapshot": snapshot_table(36, 1 << 20, 4),
    "L1 table of a snapshot past the end": snapshot_table(0, 1 << 40, 8),
    "L1 table of a snapshot too long": snapshot_table(8, 1 << 27, 4),
    "L1 table of a snapshot longer than the file": snapshot_table(8, 1 << 22, 4),
    "L1 table past the end": put_at(40, 1 << 40),
    "L1 table too short": put_at(36, 0, 4),
    "L1 entry past the end": lambda data: put(data, number(data, 40), 1 << 63 | 1 << 40),
    "L2 table used twice": lambda data: put(data, number(data, 40) + 8, number(data, number(data, 40))),
}


@pytest.mark.parametrize("what", ["leaks", "all"])
@pytest.mark.parametrize("damage", UNKNOWN.values(), ids=UNKNOWN)
def test_what_a_damaged_table_refers_to_is_no_leak(damage: Damage, what: Literal["leaks", "all"], image: Path) -> None:
    """Without their counts, the next guest would overwrite clusters that a repair of the table would bring back."""
    data = bytearray(image.read_bytes())
    damage(data)
    if damage is UNKNOWN["L2 table used twice"]:
        put(data, 36, 2, 4)
    image.write_bytes(data)
    done = vmconv.repair(image, what)
    assert done is not None
    assert done.after.corruption_count > 0
    assert (done.leaks, done.written) == (0, 0)
    assert image.read_bytes() == data


def test_l1_tables_that_overlap_are_not_read_again_and_again(image: Path) -> None:
    """65536 snapshots on one table of 32 MiB took hours."""
    data = bytearray(image.read_bytes())
    place = number(data, 64)
    entry = data[place : place + 36] + bytes(4)
    put(entry, 8, 4096, 4)
    put(entry, 12, 0, 4)
    put(data, 60, 1000, 4)
    put(data, 64, len(data))
    image.write_bytes(data + entry * 1000)
    report = vmconv.check(image)
    assert report is not None
    assert any("L1 table: all L1 tables have" in found for found in report.corruptions)


@pytest.mark.parametrize(
    ("damage", "what", "code", "words"),
    [
        (set_count(9, 0), "all", 0, "The following inconsistencies were found and repaired"),
        (set_count(9, 0), "leaks", 2, "ERROR"),
        (lambda _: None, "all", 0, "No errors were found"),
    ],
    ids=["repaired", "left", "sound"],
)
def test_exit_codes_and_words(
    damage: Damage, what: str, code: int, words: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(image.read_bytes())
    damage(data)
    image.write_bytes(data)
    assert main(["check", "-r", what, str(image)]) == code
    assert words in capsys.readouterr().out


def test_json_has_the_keys_of_qemu(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(image.read_bytes())
    set_count(9, 0)(data)
    image.write_bytes(data)
    assert main(["check", "-r", "all", "--output", "json", str(image)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["corruptions"], printed["leaks"], printed["leaks-fixed"]) == (0, 0, 0)
    assert printed["corruptions-fixed"] >= 1


def test_options_of_a_plain_check_are_refused(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-r", "all", "-U"], ["--keep-undo"]):
        assert main(["check", *arguments, str(image)]) == 1
    assert "-U is for a check that changes nothing" in capsys.readouterr().err


def test_a_corrupt_image_is_not_edited(image: Path) -> None:
    data = bytearray(image.read_bytes())
    set_count(9, 0)(data)
    image.write_bytes(data)
    with pytest.raises(PlanError, match="refcount=0 reference=2") as caught:
        vmconv.snapshot(image, "create", "new")
    assert str(caught.value.hint).startswith("vmconv check -r all")


# Other formats


def of(name: str, directory: Path, qemu_img: QemuImg, *options: str) -> Path:
    disk = make_disk(directory / "disk.raw", SIZE)
    path = directory / f"disk.{name}"
    qemu_img("convert", "-f", "raw", "-O", {"vhd": "vpc", "hdd": "parallels"}.get(name, name), *options, disk, path)
    return path


def assert_repaired(path: Path, before: bytes, qemu_img: QemuImg, name: str) -> None:
    """Repairs, and compares with the disk and with the file before the damage."""
    done = vmconv.repair(path, keep_undo=True)
    assert done is not None
    assert (done.after.corruptions, done.after.leaks, done.after.doubts) == ((), (), ())
    assert done.written
    assert path.read_bytes() == before
    qemu_img("compare", "-f", name, "-F", "raw", path, path.with_name("disk.raw"))


def test_qed(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = of("qed", ext4_dir, qemu_img)
    before = path.read_bytes()
    path.write_bytes(before[:16] + (2).to_bytes(8, "little") + before[24:])
    assert_repaired(path, before, qemu_img, "qed")


def test_vdi(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = of("vdi", ext4_dir, qemu_img)
    before = path.read_bytes()
    path.write_bytes(before[:388] + (99).to_bytes(4, "little") + before[392:])
    assert_repaired(path, before, qemu_img, "vdi")


@pytest.mark.parametrize("what", ["footer", "copy", "cut off"])
def test_vhd(what: str, ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = of("vhd", ext4_dir, qemu_img, "-o", "force_size")
    before = path.read_bytes()
    damaged = {
        "footer": before[:-400] + b"x" + before[-399:],
        "copy": before[:100] + b"x" + before[101:],
        "cut off": before[:-512],
    }
    path.write_bytes(damaged[what])
    assert_repaired(path, before, qemu_img, "vpc")


def test_parallels(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = of("hdd", ext4_dir, qemu_img)
    before = path.read_bytes()
    path.write_bytes(before[:44] + b"vpr1"[::-1] + before[48:] + bytes(3 * MIB))
    found = vmconv.check(path)
    assert found is not None
    assert found.corruption_count + found.leak_count
    done = vmconv.repair(path)
    assert done is not None
    assert (done.after.corruptions, done.after.leaks) == ((), ())
    qemu_img("check", "-q", "-f", "parallels", path)
    qemu_img("compare", "-f", "parallels", "-F", "raw", path, ext4_dir / "disk.raw")


def test_the_log_of_a_vhdx_is_replayed(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = ext4_dir / "disk.vhdx"
    path.write_bytes(dirty(sample(), (0, entry(5, 0, [(BAT, CLEAR_3)]))))
    before = [(row.start, row.length, row.offset) for row in vmconv.map_disk(path)]
    done = vmconv.repair(path, keep_undo=True)
    assert done is not None
    assert (done.corruptions, done.after.corruptions, done.after.doubts) == (1, (), ())
    qemu_img("check", "-q", "-f", "vhdx", path)
    assert [(row.start, row.length, row.offset) for row in vmconv.map_disk(path)] == before
    vmconv.undo(path)
    assert path.read_bytes() == dirty(sample(), (0, entry(5, 0, [(BAT, CLEAR_3)])))


@pytest.mark.parametrize("at", [0x10010, 0x20010, 0x30010, 0x40010])
def test_a_damaged_copy_of_a_vhdx_is_made_again(at: int, ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = of("vhdx", ext4_dir, qemu_img)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    done = vmconv.repair(path)
    assert done is not None
    assert (len(done.before.doubts), done.after.doubts, done.after.corruptions) == (1, (), ())
    qemu_img("check", "-q", "-f", "vhdx", path)
    qemu_img("compare", "-f", "vhdx", "-F", "raw", path, ext4_dir / "disk.raw")


def test_formats_without_repairs_stay_as_they_are(ext4_dir: Path, qemu_img: QemuImg) -> None:
    path = of("vmdk", ext4_dir, qemu_img)
    before = path.read_bytes()
    done = vmconv.repair(path)
    assert done is not None
    assert (done.written, path.read_bytes()) == (0, before)
    assert vmconv.repair(ext4_dir / "disk.raw") is None


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, None),
        (CheckReport(), None),
        (CheckReport(leaks=("a cluster",), leak_count=1, doubts=("a doubt",)), None),
        (CheckReport(corruptions=("the first", "the second"), corruption_count=2), "the first"),
        (CheckReport(corruptions=("the only one",), corruption_count=1), "the only one"),
    ],
)
def test_an_edit_is_refused_for_the_first_corruption_only(
    image: Path, monkeypatch: pytest.MonkeyPatch, report: CheckReport | None, said: str | None
) -> None:
    one = installed().format("qcow2")
    monkeypatch.setattr(type(one), "check", lambda *_: report)
    with Opener(installed()) as opener:
        assert damage(one, opener.image(str(image))) == said


def test_an_edit_that_would_leave_damage_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.read_bytes()
    checks = iter([CheckReport(), CheckReport(corruptions=("two tables at one place",), corruption_count=1)])
    monkeypatch.setattr(type(installed().format("qcow2")), "check", lambda *_: next(checks))
    with pytest.raises(VerifyError, match="after the edit, two tables at one place"):
        vmconv.snapshot(str(image), "create", "new")
    assert image.read_bytes() == before
