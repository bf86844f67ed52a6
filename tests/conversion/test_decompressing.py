"""--decompress: downloads compressed by other programs, damaged ones, and bombs."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

import vmconv
from support.disks import MIB, QemuImg, make_disk
from support.requirements import oracle_program
from vmconv.cli.main import main
from vmconv.errors import BackendError, ImageError, UsageError

Capture = pytest.CaptureFixture[str]


def by(program: str, suffix: str, *options: str) -> Callable[[Path], Path]:
    def compress(path: Path) -> Path:
        target = path.with_name(path.name + suffix)
        with target.open("wb") as out:
            subprocess.run([oracle_program(program), *options, "-c", path], stdout=out, check=True)
        return target

    return compress


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    target = path.with_name("download.zip")
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.mkdir("folder")
        archive.write(path, f"folder/{path.name}")
    return target


def joined(compress: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Compresses two halves, one behind the other, as parallel compressors do."""

    def both(path: Path) -> Path:
        data, parts = path.read_bytes(), []
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            piece = path.with_name("half" + path.suffix)
            piece.write_bytes(half)
            made = compress(piece)
            parts.append(made.read_bytes())
            suffix = made.name.removeprefix(piece.name)
        target = path.with_name(path.name + suffix)
        target.write_bytes(b"".join(parts))
        return target

    return both


WAYS = {
    "gzip": by("gzip", ".gz"),
    "xz": by("xz", ".xz"),
    "lzma": by("xz", ".lzma", "--format=lzma"),
    "zstd": by("zstd", ".zst", "-q"),
    "zstd, long": by("zstd", ".zst", "-q", "--long=27", "-19", "--no-check"),
    "bzip2": by("bzip2", ".bz2"),
    "zip": zipped,
    "zip, stored": lambda path: zipped(path, zipfile.ZIP_STORED),
    "two gzip members": joined(by("gzip", ".gz")),
    "two xz streams": joined(by("xz", ".xz")),
    "two zstd frames": joined(by("zstd", ".zst", "-q")),
    "two bzip2 streams": joined(by("bzip2", ".bz2")),
}


@pytest.fixture
def disk(xfs_dir: Path) -> Path:
    return make_disk(xfs_dir / "disk.raw", 8 * MIB, pieces=4)


@pytest.mark.parametrize("way", WAYS)
def test_a_compressed_disk_is_decoded_once_and_shared(disk: Path, way: str) -> None:
    packed = WAYS[way](disk)
    target = disk.with_name("new.qcow2")
    before = set(os.listdir(disk.parent))
    result = vmconv.convert(packed, target, decompress=True, zero_copy="require")
    assert result.totals.copied == 0
    assert result.totals.shared > 0
    assert vmconv.compare(disk, target)
    assert set(os.listdir(disk.parent)) == {*before, target.name}


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_payload_that_is_written_twice_is_announced(kind: str, request: pytest.FixtureRequest, capsys: Capture) -> None:
    folder: Path = request.getfixturevalue(f"{kind}_dir")
    (folder / "disk.raw.gz").write_bytes(gzip.compress(b"payload" * 100_000))
    assert main(["plan", "--decompress", str(folder / "disk.raw.gz"), str(folder / "new.qcow2")]) == 0
    result = vmconv.convert(folder / "disk.raw.gz", folder / "new.qcow2", decompress=True)
    twice = ["payload is written twice" in said for said in (capsys.readouterr().out, " ".join(result.warnings))]
    # The end of the last block is copied everywhere.
    assert twice == [kind == "ext4"] * 2


@pytest.mark.parametrize("way", ["gzip", "xz", "zstd", "zip"])
def test_the_format_is_that_of_the_name_inside(disk: Path, qemu_img: QemuImg, way: str) -> None:
    image = disk.with_name("image.qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    packed = WAYS[way](image)
    image.unlink()
    vmconv.convert(packed, disk.with_name("new.vmdk"), decompress=True)
    assert vmconv.compare(disk, disk.with_name("new.vmdk"))


def test_a_header_of_a_guest_is_no_format_inside_either(disk: Path, qemu_img: QemuImg) -> None:
    guest = disk.with_name("guest.raw")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, guest)
    packed = WAYS["gzip"](guest)
    with pytest.raises(ImageError, match="has the signature of qcow2 but its name says raw"):
        vmconv.convert(packed, disk.with_name("new.vmdk"), decompress=True)


def test_a_compressed_file_is_never_taken_for_a_disk_without_the_option(disk: Path) -> None:
    for name, compress in WAYS.items():
        with pytest.raises(ImageError, match="is not a disk") as caught:
            vmconv.convert(compress(disk), disk.with_name("new.qcow2"))
        assert "--decompress" in str(caught.value.hint), name


def test_a_disk_is_not_decompressed(disk: Path) -> None:
    with pytest.raises(ImageError, match=r"disk\.raw: is not compressed: --decompress is for gzip, xz"):
        vmconv.convert(disk, disk.with_name("new.qcow2"), decompress=True)


def test_the_command_line_has_it_too(disk: Path, capsys: Capture) -> None:
    packed, target = WAYS["zstd"](disk), disk.with_name("new.qcow2")
    assert main(["plan", "--decompress", str(packed), str(target)]) == 0
    assert not target.exists()
    assert main(["convert", "--decompress", "--decompress-limit", "8M", str(packed), str(target)]) == 0
    assert vmconv.compare(disk, target)
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--decompress", "--decompress-limit", "some", str(packed), str(target)])
    assert caught.value.code == 2
    assert "'some' is not a size" in capsys.readouterr().err
    assert main(["convert", "--decompress-limit", "1G", str(packed), str(target)]) == 2
    assert "--decompress-limit is for --decompress" in capsys.readouterr().err


def test_it_is_a_stream_as_well(disk: Path, tmp_path: Path) -> None:
    packed = WAYS["xz"](disk)
    with (tmp_path / "stream").open("wb") as out:
        vmconv.stream(packed, out.fileno(), "raw", decompress=True)
    assert (tmp_path / "stream").read_bytes() == disk.read_bytes()


def test_not_in_place(disk: Path) -> None:
    with pytest.raises(UsageError, match="a compressed file cannot become an image"):
        vmconv.convert(WAYS["gzip"](disk), disk.with_name("new.qcow2"), decompress=True, in_place=True)


@pytest.mark.parametrize("way", WAYS)
def test_damage_is_an_error_in_one_line_and_leaves_nothing(disk: Path, way: str) -> None:
    packed = WAYS[way](disk)
    data, target = packed.read_bytes(), disk.with_name("new.qcow2")
    before = set(os.listdir(disk.parent))
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x55
    cut = [data[: len(data) // 2], data[:-9], data[:-1], data[:20]]
    # Without a checksum, nobody can tell a flipped bit, and a member that is stored has its checksum at the end.
    for damaged in [*cut, *([] if way in ("lzma", "zstd, long") else [bytes(flipped)])]:
        packed.write_bytes(damaged)
        with pytest.raises(ImageError) as caught:
            vmconv.convert(packed, target, decompress=True, source_format="raw")
        assert "\n" not in str(caught.value)
        assert "cannot be decompressed" in str(caught.value) or "is not compressed" in str(caught.value)
    assert set(os.listdir(disk.parent)) == before


def test_a_limit_is_kept_to_the_byte(disk: Path) -> None:
    packed, target = WAYS["gzip"](disk), disk.with_name("new.qcow2")
    with pytest.raises(ImageError, match=f"becomes more than {8 * MIB - 1} bytes") as caught:
        vmconv.convert(packed, target, decompress=True, decompress_limit=8 * MIB - 1)
    assert "--decompress-limit" in str(caught.value.hint)
    vmconv.convert(packed, target, decompress=True, decompress_limit=8 * MIB)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2", ".zip"])
def test_a_bomb_of_zeros_takes_no_space_and_stops_at_the_limit(xfs_dir: Path, suffix: str) -> None:
    zeros, path = bytes(200 * MIB), xfs_dir / f"bomb.raw{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.raw", zeros)
    else:
        pack: dict[str, Callable[[bytes], bytes]] = {
            ".gz": gzip.compress,
            ".xz": lzma.compress,
            ".zst": zstandard.ZstdCompressor().compress,
            ".bz2": bz2.compress,
        }
        path.write_bytes(pack[suffix](zeros))
    assert path.stat().st_size < MIB
    with pytest.raises(ImageError, match="becomes more than"):
        vmconv.convert(path, xfs_dir / "new.raw", decompress=True, decompress_limit=100 * MIB)
    vmconv.convert(path, xfs_dir / "new.raw", decompress=True)
    assert (xfs_dir / "new.raw").stat().st_size == len(zeros)
    assert (xfs_dir / "new.raw").stat().st_blocks == 0


def test_a_decoder_that_wants_much_memory_is_refused(xfs_dir: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    # Made with a small dictionary, then the header is changed: making it would take the memory itself.
    small = lzma.compress(bytes(MIB), filters=[{**filters[0], "dict_size": 1 << 20}])
    data = bytearray(small)
    # Block header: size, flags, filter id, size of its properties, the dictionary's size as one byte.
    at = data.index(b"\x21\x01", 12)
    data[at + 2] = 36
    length = (data[12] + 1) * 4
    import zlib

    data[12 + length - 4 : 12 + length] = zlib.crc32(data[12 : 12 + length - 4]).to_bytes(4, "little")
    path = xfs_dir / "disk.raw.xz"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="cannot be decompressed as xz: Memory usage limit exceeded"):
        vmconv.convert(path, xfs_dir / "new.qcow2", decompress=True)
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (xfs_dir / "disk.raw.zst").write_bytes(frame.compress(bytes(1000)) + frame.flush())
    with pytest.raises(ImageError, match="cannot be decompressed as Zstandard"):
        vmconv.convert(xfs_dir / "disk.raw.zst", xfs_dir / "new.qcow2", decompress=True)


def test_an_archive_of_several_files_is_refused(disk: Path) -> None:
    path = disk.with_name("two.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one.raw", b"1")
        archive.writestr("two.raw", b"2")
    with pytest.raises(ImageError, match=r"two\.zip: has 2 files, and a disk is one"):
        vmconv.convert(path, disk.with_name("new.qcow2"), decompress=True)


def test_a_member_without_a_name_is_refused_in_one_line(disk: Path) -> None:
    # zipfile raises IndexError for it, or an error of its own from Python 3.13 on.
    path = disk.with_name("nameless.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"")
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 28 : at + 30] = b"\0\0"
    del data[at + 46]
    end = data.index(b"PK\5\6")
    data[end + 12 : end + 16] = (end - at).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        ImageError, match=r"cannot be decompressed as ZIP archive: (string index out of range|File name in directory)"
    ):
        vmconv.convert(path, disk.with_name("new.qcow2"), decompress=True)


def test_a_member_s_name_leads_nowhere(disk: Path, qemu_img: QemuImg) -> None:
    path, elsewhere = disk.with_name("evil.zip"), disk.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(disk, elsewhere / "base.raw")
    overlay = disk.with_name("overlay.qcow2")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", overlay, str(8 * MIB))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(overlay, "elsewhere/../elsewhere/overlay.qcow2")
    with pytest.raises(vmconv.VmconvError, match=r"base\.raw"):
        vmconv.convert(path, disk.with_name("new.raw"), decompress=True)


def test_no_room_is_said_and_nothing_remains(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], check=True)
    try:
        packed = tmp_path / "disk.raw.gz"
        packed.write_bytes(gzip.compress(os.urandom(4 * MIB), 1))
        with pytest.raises(BackendError, match=r"no room for what disk\.raw\.gz becomes: No space left"):
            vmconv.convert(packed, small / "new.qcow2", decompress=True)
        assert os.listdir(small) == []
        assert os.statvfs(small).f_bfree * 4096 > MIB
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_new_image_is_as_private_as_the_download(disk: Path) -> None:
    packed = WAYS["gzip"](disk)
    packed.chmod(0o600)
    vmconv.convert(packed, disk.with_name("private.qcow2"), decompress=True)
    assert disk.with_name("private.qcow2").stat().st_mode & 0o777 == 0o600
    packed.chmod(0o644)
    vmconv.convert(packed, disk.with_name("open.qcow2"), decompress=True)
    assert disk.with_name("open.qcow2").stat().st_mode & 0o777 == 0o644
