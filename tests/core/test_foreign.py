"""Files that are no disks: refused by name and by content, with what to do, wherever an image can be named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import vmconv
from support import qcow2_images
from support.disks import MIB, QemuImg, make_disk
from support.requirements import oracle_program
from vmconv.cli import main as cli
from vmconv.errors import AccessError, ImageError, VmconvError
from vmconv.io.foreign import AS_RAW, FOREIGN
from vmconv.io.known import KNOWN

Capture = pytest.CaptureFixture[str]

SIGNATURES = [
    pytest.param(kind.title, offset, magic, id=f"{kind.title}-{number}")
    for kind in FOREIGN
    for number, (offset, magic) in enumerate(kind.magic)
]
SUFFIXES = [(kind.title, suffix) for kind in FOREIGN for suffix in kind.suffixes]
PLAIN = b"\x11" * 4096


def with_magic(path: Path, offset: int, magic: bytes) -> Path:
    path.write_bytes((PLAIN[:offset] + magic + PLAIN)[: len(PLAIN)])
    return path


def refused(path: Path) -> VmconvError:
    target = path.with_name("target.qcow2")
    with pytest.raises(ImageError) as caught:
        vmconv.convert(str(path), str(target))
    assert not target.exists()
    assert path.name in str(caught.value)
    assert caught.value.hint
    return caught.value


# By content


@pytest.mark.parametrize("name", ["disk", "disk.img", "disk.qcow2", "disk.xyz"])
@pytest.mark.parametrize(("title", "offset", "magic"), SIGNATURES)
def test_content_that_is_no_disk_is_refused_whatever_its_name(
    tmp_path: Path, title: str, offset: int, magic: bytes, name: str
) -> None:
    error = refused(with_magic(tmp_path / name, offset, magic))
    assert f"signature of {title}" in str(error)
    assert "-f raw" in (error.hint or "")


@pytest.mark.parametrize(("title", "offset", "magic"), SIGNATURES)
def test_a_guest_may_have_written_it_and_the_user_can_say_so(
    tmp_path: Path, title: str, offset: int, magic: bytes
) -> None:
    disk = with_magic(tmp_path / "disk.img", offset, magic)
    vmconv.convert(str(disk), str(tmp_path / "target.qcow2"), source_format="raw")
    assert vmconv.compare(str(disk), str(tmp_path / "target.qcow2"), left_format="raw")


def zipped(data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("disk.raw", data)
    return made.getvalue()


def archived(data: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("disk.raw")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "ZIP archive": zipped,
    "tar archive": archived,
}


@pytest.mark.parametrize("title", PACKED)
def test_files_of_real_packers_are_recognised(tmp_path: Path, title: str) -> None:
    packed = tmp_path / "disk.img"
    packed.write_bytes(PACKED[title](PLAIN))
    assert f"signature of {title}" in str(refused(packed))


@pytest.mark.parametrize(("program", "title"), [("zstd", "Zstandard"), ("lz4", "LZ4"), ("lzop", "lzop")])
def test_files_of_other_packers_are_recognised(tmp_path: Path, program: str, title: str) -> None:
    packed = tmp_path / "disk.img"
    done = subprocess.run([oracle_program(program), "-c"], input=PLAIN, capture_output=True, check=True, timeout=600)
    packed.write_bytes(done.stdout)
    assert f"signature of {title}" in str(refused(packed))


def test_a_fixed_vhd_whose_guest_wrote_an_archive_is_a_vhd(tmp_path: Path) -> None:
    disk = with_magic(tmp_path / "disk.raw", 0, b"PK\3\4")
    vhd = tmp_path / "disk.vhd"
    vmconv.convert(str(disk), str(vhd), source_format="raw", options={"subformat": "fixed"})
    vmconv.convert(str(vhd), str(tmp_path / "back.raw"))
    assert (tmp_path / "back.raw").read_bytes() == disk.read_bytes()


# By suffix


@pytest.mark.parametrize(("title", "suffix"), SUFFIXES)
def test_a_suffix_that_is_no_disk_s_is_refused_by_name(tmp_path: Path, title: str, suffix: str) -> None:
    path = make_disk(tmp_path / f"disk{suffix}", MIB, pieces=1)
    error = refused(path)
    assert f"its name says {title}" in str(error)
    assert "-f raw" in (error.hint or "")


@pytest.mark.parametrize("name", ["disk.L01", "DISK.ISO.GZ", "disk.qcow2.xz", "vm.VMX", "vm.vbox-prev", "disk.raw.zip"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    assert "its name says" in str(refused(make_disk(tmp_path / name, MIB, pieces=1)))


@pytest.mark.parametrize("suffix", [".xyz", ".bak", ".orig", ".img2x", ".snap1"])
def test_an_unknown_suffix_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    error = refused(make_disk(tmp_path / f"disk{suffix}", MIB, pieces=1))
    assert f"no format has the suffix {suffix}" in str(error)
    assert error.hint == "if it is a raw disk, use -f raw"


@pytest.mark.parametrize(
    "name",
    [
        "disk",
        "disk.raw",
        "disk.IMG",
        "disk.dd",
        "vm-100-disk-0",
        "ubuntu-24.04",
        "debian-12.5-amd64",
        "disk.1719922000",
        ".hidden",
        "tmp.aB3dE6gH9j",
        "a b.c d",
        *(f"disk.{suffix}" for suffix in sorted(AS_RAW)),
    ],
)
def test_raw_disks_have_many_names(tmp_path: Path, name: str) -> None:
    disk = make_disk(tmp_path / name, MIB, pieces=1)
    vmconv.convert(str(disk), str(tmp_path / "target.qcow2"))
    assert vmconv.compare(str(disk), str(tmp_path / "target.qcow2"))


def test_no_suffix_is_a_format_s_and_no_disk_s() -> None:
    known = {suffix for one in KNOWN for suffix in one.suffixes}
    foreign = [suffix for kind in FOREIGN for suffix in kind.suffixes]
    assert len(foreign) == len(set(foreign))
    assert not known & set(foreign)
    assert not AS_RAW & {suffix.lstrip(".") for suffix in (*known, *foreign)}


def test_an_isohybrid_is_a_raw_disk(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "live.iso", MIB, pieces=1)
    with disk.open("r+b") as file:
        file.write(b"\x33\xed" + b"\x90" * 30)
        file.seek(510)
        file.write(b"\x55\xaa")
        file.seek(32768)
        file.write(b"\1CD001\1\0")
    vmconv.convert(str(disk), str(tmp_path / "target.qcow2"))


# Wherever an image can be named


WAYS = {
    "convert": ["convert", "{file}", "{target}"],
    "plan": ["plan", "{file}", "{target}"],
    "convert to a pipe": ["convert", "{file}", "-", "-O", "qcow2"],
    "fanout": ["fanout", "{file}", "--to", "qcow2", "--directory", "{directory}/made"],
    "compare": ["compare", "{file}", "{good}"],
    "compare the other": ["compare", "{good}", "{file}"],
    "prove": ["prove", "{good}", "{file}"],
    "info": ["info", "{file}"],
    "map": ["map", "{file}"],
    "check": ["check", "{file}"],
    "serve": ["serve", "{file}", "--socket", "{directory}/socket"],
    "a backing file": ["convert", "{overlay}", "{target}"],
    "what stays below": ["convert", "{overlay}", "{target}", "-B", "{name}"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["disk.qcow2.xz", "disk.img.gz", "image.L01", "backup.vma", "vm.vmx", "disk.xyz", "img"]
)
def test_content_that_is_no_disk_is_refused_by_every_command(
    tmp_path: Path, capfd: Capture, way: str, name: str
) -> None:
    (tmp_path / "made").mkdir()
    file = tmp_path / name
    file.write_bytes(gzip.compress(PLAIN * 64) if name == "img" else PLAIN * 64)
    good = make_disk(tmp_path / "good.raw", MIB)
    overlay = tmp_path / "overlay.qcow2"
    overlay.write_bytes(qcow2_images.empty_overlay(name, None))
    places = {
        "file": file,
        "good": good,
        "overlay": overlay,
        "target": tmp_path / "target.qcow2",
        "directory": tmp_path,
        "name": name,
    }
    code = cli.main([argument.format(**places) for argument in WAYS[way]])
    assert code in (1, 2)
    shown = capfd.readouterr().err.splitlines()
    assert name in shown[0]
    assert shown[1].startswith("  hint: ")
    assert not (tmp_path / "target.qcow2").exists()
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize(
    ("way", "option"),
    [
        ("convert", "-f raw"),
        ("fanout", "-f raw"),
        ("compare", "-f raw"),
        ("compare the other", "-F raw"),
        ("prove", "-F raw"),
        ("map", "-f raw"),
        ("a backing file", "--backing-format raw"),
    ],
)
def test_the_hint_can_be_followed(tmp_path: Path, capfd: Capture, way: str, option: str) -> None:
    (tmp_path / "made").mkdir()
    file = make_disk(tmp_path / "disk.snap1", MIB)
    overlay = tmp_path / "overlay.qcow2"
    overlay.write_bytes(qcow2_images.empty_overlay("disk.snap1", None))
    good = tmp_path / "good.raw"
    good.write_bytes(file.read_bytes())
    places = {
        "file": file,
        "good": good,
        "overlay": overlay,
        "target": tmp_path / "target.qcow2",
        "directory": tmp_path,
        "name": "disk.snap1",
    }
    command = [argument.format(**places) for argument in WAYS[way]]
    assert cli.main(command) != 0
    assert option in capfd.readouterr().err.splitlines()[1]
    if way != "prove":
        assert cli.main([*command, *option.split()]) == 0


# One part of a VMDK


def test_the_descriptor_is_named_for_its_flat_extent(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, tmp_path / "disk.vmdk")
    error = refused(tmp_path / "disk-flat.vmdk")
    assert error.hint == "it is an extent of the disk disk.vmdk: use that file"
    (tmp_path / "disk.vmdk").unlink()
    assert refused(tmp_path / "disk-flat.vmdk").hint == "if it is a raw disk, use -f raw"


@pytest.mark.parametrize("part", ["flat", "f001", "rdm", "rdmp"])
def test_a_guest_does_not_choose_the_format_of_its_flat_extent(tmp_path: Path, qemu_img: QemuImg, part: str) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    qemu_img("convert", "-O", "vmdk", raw, tmp_path / "disk.vmdk")
    file = tmp_path / f"disk-{part}.vmdk"
    file.write_bytes((tmp_path / "disk.vmdk").read_bytes())
    error = refused(file)
    assert "flat extent, whose content is a guest's" in str(error)
    assert error.hint == "it is an extent of the disk disk.vmdk: use that file"
    (tmp_path / "disk.vmdk").unlink()
    assert "use -f vmdk or -f raw" in (refused(file).hint or "")
    assert cli.main(["convert", "-f", "vmdk", str(file), str(tmp_path / "new.qcow2")]) == 0


def test_the_descriptor_is_named_for_a_part_of_a_split_disk(tmp_path: Path, qemu_img: QemuImg) -> None:
    raw = make_disk(tmp_path / "disk.raw", MIB)
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", raw, tmp_path / "disk.vmdk")
    assert "disk disk.vmdk" in (refused(tmp_path / "disk-s001.vmdk").hint or "")
    (tmp_path / "disk.vmdk").unlink()
    assert "name the disk's descriptor" in (refused(tmp_path / "disk-s001.vmdk").hint or "")


# Directories, and standard input


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A Parallels disk as a Mac keeps it: a directory with a descriptor and an image."""
    disk = make_disk(tmp_path / "disk.raw", MIB)
    made = tmp_path / "vm.pvm" / "harddisk.hdd"
    made.mkdir(parents=True)
    part = "harddisk.hdd.0.{5fbaabe3-6958-40ff-92a7-860e329aab41}.hds"
    vmconv.convert(disk, made / part)
    (made / "DiskDescriptor.xml").write_text(f"""<?xml version='1.0' encoding='UTF-8'?>
<Parallels_disk_image Version="1.0">
  <Disk_Parameters><Disk_size>{MIB // 512}</Disk_size></Disk_Parameters>
  <StorageData><Storage>
    <Start>0</Start><End>{MIB // 512}</End><Blocksize>2048</Blocksize>
    <Image><GUID>{{5fbaabe3-6958-40ff-92a7-860e329aab41}}</GUID><Type>Compressed</Type><File>{part}</File></Image>
  </Storage></StorageData>
</Parallels_disk_image>
""")
    return made


@pytest.mark.parametrize("named", ["", "/", "/DiskDescriptor.xml"])
def test_a_parallels_bundle_is_read_by_the_name_of_its_directory(tmp_path: Path, bundle: Path, named: str) -> None:
    source, target = f"{bundle}{named}", tmp_path / "target.raw"
    vmconv.convert(source, target)
    assert target.read_bytes() == (tmp_path / "disk.raw").read_bytes()
    assert vmconv.info(source)["format"] == "parallels"
    assert vmconv.compare(source, target)
    assert vmconv.map_disk(source)


def test_images_of_a_bundle_are_named_after_it(tmp_path: Path, bundle: Path) -> None:
    (made,) = vmconv.fanout(f"{bundle}/", ["qcow2"], directory=tmp_path)
    assert made.target == str(tmp_path / "harddisk.qcow2")


def test_a_bundle_is_not_converted_in_place(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(vmconv.UsageError, match="a bundle"):
        vmconv.convert(bundle, tmp_path / "target.qcow2", in_place=True)


def test_another_directory_is_refused_with_the_disks_in_it(tmp_path: Path, bundle: Path) -> None:
    for directory, found in ((bundle.parent, str(bundle)), (tmp_path, str(tmp_path / "disk.raw"))):
        with pytest.raises(AccessError, match="is neither a regular file") as caught:
            vmconv.info(directory)
        assert found in (caught.value.hint or "")
    (tmp_path / "empty.utm").mkdir()
    with pytest.raises(AccessError) as caught:
        vmconv.info(tmp_path / "empty.utm")
    assert caught.value.hint == "name a disk in this directory"


def test_standard_input_is_no_file_to_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AccessError, match="standard input") as caught:
        vmconv.resize("-", MIB, source_format="raw")
    assert "write it to a file" in (caught.value.hint or "")
