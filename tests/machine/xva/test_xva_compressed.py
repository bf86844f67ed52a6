"""Compressed exports are decoded once, into files without a name, and planned without decoding their disks."""

from __future__ import annotations

import gzip
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import vmconv
from support.disks import QemuImg
from support.xva_archives import MIB, archive, config, export, piece_of, pieces, records, xxh64
from vmconv.errors import ImageError
from vmconv.plugin import Beginning, Decompressed, File
from vmconv.testing import image_file, random_bytes
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_xva import Xva

XVA = Xva()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "zst": zst,
    "gz": gzip.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}


def disk(seed: int, size: int = 8 * MIB) -> bytes:
    """Returns a disk with pieces that are zero, full, or zero in part."""
    rng, found = random.Random(seed), bytearray(size)
    for at in range(0, size, MIB):
        kind = rng.randrange(3)
        length = (0, MIB, 3 * 4096 + 5)[kind]
        begin = at + (0, 0, 4096 * 7 - 9)[kind]
        end = min(begin + length, size)
        found[begin:end] = rng.randbytes(max(0, end - begin))
    return bytes(found)


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_dir")
    return found


@pytest.mark.parametrize("kind", PACKED)
def test_all_disks_of_a_compressed_export_are_made(kind: str, directory: Path, qemu_img: QemuImg) -> None:
    disks = {"Ref:12": disk(1), "Ref:15": disk(2, 5 * MIB - 512)}
    # `xe vm-export compress=zstd filename=web.xva` adds no suffix.
    path = directory / ("web.xva" if kind == "zst" else f"web.xva.{kind}")
    path.write_bytes(PACKED[kind](export(disks, keep_alive=3, digest=xxh64)))
    result = vmconv.machine_convert(path, directory / "new", target_format="libvirt", verify="bytes")
    for number, content in enumerate(disks.values()):
        (directory / "disk.raw").write_bytes(content)
        qemu_img("compare", directory / "disk.raw", directory / "new" / result.plan.disks[number].target)
    assert sorted(os.listdir(directory / "new")) == ["web-disk1.qcow2", "web-disk2.qcow2", "web.xml"]
    assert result.plan.totals.shared == 0


def test_zeros_inside_of_pieces_are_not_written(xfs_dir: Path) -> None:
    content = bytearray(4 * MIB)
    for at in range(0, 4 * MIB, MIB):
        content[at : at + 4096] = random_bytes(4096, at)
    (xfs_dir / "web.xva.zst").write_bytes(zst(export({"Ref:12": bytes(content)})))
    result = vmconv.machine_convert(
        xfs_dir / "web.xva.zst", xfs_dir / "new", target_format="libvirt", disk_format="raw"
    )
    assert (xfs_dir / "new" / result.plan.disks[0].target).stat().st_blocks * 512 == 4 * 4096


def test_a_plan_decodes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "web.xva.zst"
    path.write_bytes(zst(export({"Ref:12": random_bytes(40 * MIB, 1)})))
    read = 0
    original = Decompressed.read

    def counted(stream: Decompressed, length: int) -> bytes:
        nonlocal read
        read += length
        return original(stream, length)

    monkeypatch.setattr(Decompressed, "read", counted)
    plan = vmconv.machine_plan(path, tmp_path / "new", target_format="libvirt")
    assert read < 100_000
    assert plan.totals.copied == 40 * MIB
    assert [copy.reason for copy in plan.copies] == ["the archive is compressed (Zstandard)"]
    assert any("will be decoded once" in warning for warning in plan.warnings)
    assert vmconv.machine_info(path).name == "web"


def test_blocks_in_the_beginning_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beginning, "limit", 2 * MIB)
    content = bytes(5 * MIB) + random_bytes(11 * MIB, 4)
    file = image_file(zst(export({"Ref:12": content})), "web.xva.zst")
    table = XVA.members(file)[1].table
    assert table.read(100, 6 * MIB - 100) == content[100 : 6 * MIB]
    with pytest.raises(ImageError, match=r"Ref:12 at 0xfff000: is not in the first 2 MiB of the archive"):
        table.read(16 * MIB - 1, 1)


@pytest.mark.parametrize("kind", PACKED)
def test_other_compressed_files_are_not_claimed(kind: str) -> None:
    for content in (b"", b"ova.xml\0", bytes(5000), b"text" * 1000, archive([("disk.vmdk", b"x")])):
        assert not XVA.probe(image_file(PACKED[kind](content), "web.xva.zst"))
    assert not XVA.probe(image_file(PACKED[kind](export({"Ref:12": disk(1)}))[:10], "web.xva.zst"))


# -- exports that are not as they should be


class _Sink(File):
    """A new file in memory, without limits on what is written."""

    def __init__(self, size: int) -> None:
        self.size, self.name, self.path, self.descriptor = size, "sink", "sink", -1

    def write(self, offset: int, data: bytes | memoryview) -> None:
        assert 0 <= offset <= offset + len(data) <= self.size


def decode(data: bytes, name: str = "web.xva.zst") -> None:
    with time_limit(), memory_limit():
        XVA.decode(image_file(data, name), lambda _, size: _Sink(size), None)  # type: ignore[arg-type,return-value]


ONE = {"Ref:12": bytes(MIB) + b"x" * MIB + bytes(MIB)}
XML = ("ova.xml", config(records(ONE)))
FULL = pieces(ONE)


def _empty_pieces(count: int) -> list[tuple[str, bytes]]:
    return [each for number in range(1, count) for each in piece_of("Ref:12", number, b"")]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no records": (lambda: archive(FULL), "an export begins with ova.xml"),
    "a path outside": (lambda: archive([XML, ("../../etc/passwd", b"x")]), "'../../etc/passwd' is no piece of a disk"),
    "no first piece": (lambda: archive([XML, *FULL[2:]]), "Ref:12 begins with piece 1"),
    "pieces twice": (lambda: archive([XML, *FULL, *FULL[:2]]), "piece 0 of Ref:12 comes behind 2"),
    "past the end": (lambda: archive([XML, *FULL, *piece_of("Ref:12", 3, bytes(512))]), "piece 3 of Ref:12 has 512"),
    "cut off": (lambda: archive([XML, *FULL[:4]], end=False), "ends at 0x200000 of 0x300000, and the archive has no"),
    "cut in a header": (lambda: archive([XML, *FULL])[: -20 * 512 - 600 - 2 * MIB], "cut off after"),
    "cut in a piece": (lambda: archive([XML, FULL[0]], end=False)[: -MIB // 2], "is cut off after 524288 of 1048576"),
    "a large piece": (lambda: archive([XML, ("Ref:12/00000000", bytes(MIB + 1))]), "piece has 1048577 bytes"),
    "many pieces without bytes": (
        lambda: archive([XML, *FULL[:2], *_empty_pieces(14_000)]),
        "the machine's disks are smaller than what follows",
    ),
    "many disks": (
        lambda: archive([XML, *(each for disk in range(100, 125) for each in piece_of(f"Ref:{disk}", 0, bytes(MIB)))]),
        "the machine's disks are smaller than what follows",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_export_is_refused_in_one_line(name: str) -> None:
    make, wanted = HOSTILE[name]
    with pytest.raises(ImageError) as error:
        decode(zst(make()))
    assert wanted in str(error.value)
    assert str(error.value).startswith("web.xva.zst: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("at", [0.2, 0.5, 0.99])
def test_a_cut_export_is_refused(at: float, kind: str) -> None:
    data = PACKED[kind](export({"Ref:12": random_bytes(2 * MIB, 1)}))
    with pytest.raises(ImageError) as error:
        decode(data[: int(len(data) * at)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", PACKED)
def test_changed_bytes_are_noticed_or_make_no_error_of_python(kind: str) -> None:
    data = PACKED[kind](export({"Ref:12": disk(1, MIB)}))
    rng = random.Random(kind)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            decode(bytes(damaged))
        except ImageError as error:
            assert "\n" not in str(error)


def test_changed_payload_is_noticed(tmp_path: Path) -> None:
    # Damage before the compression: the frame is sound, the digest is another one.
    data = bytearray(export({"Ref:12": random_bytes(2 * MIB, 1)}))
    data[MIB] ^= 1
    (tmp_path / "web.xva.zst").write_bytes(zst(bytes(data)))
    for change in ({}, {"verify": False}):
        options: dict[str, Any] = change
        with pytest.raises(ImageError, match=r"SHA-1 of Ref:12/0000000. at 0x") as error:
            vmconv.machine_convert(tmp_path / "web.xva.zst", tmp_path / "new", target_format="libvirt", **options)
        assert "decompress it first" in str(error.value.hint)
    assert os.listdir(tmp_path) == ["web.xva.zst"]
