"""OVA packages: the conformance kit, tar headers of strangers, and the layout of new packages."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from support.ovf_packages import FILE, package, with_disk
from support.requirements import oracle_program
from vmconv.errors import ImageError, PlanError
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine import Disk, Firmware, Machine, Nvram, Removable
from vmconv.plugin import Blob, Extents, Kind
from vmconv.testing import MachineTests, image_file, random_bytes
from vmconv.testing.memory import MemoryFile
from vmconv_ovf import Ova, Ovf
from vmconv_ovf.options import PackageOptions
from vmconv_ovf.tar import MAX_MEMBERS, headers

OVA = Ova()
OPENER = Opener(Registry())


def bytes_of(table: Extents) -> bytes:
    return table.read(0, table.size)


class TestOva(MachineTests):
    format = Ova()

    def config(self, machine: Machine) -> bytes:
        return bytes_of(package(machine, {}))


def archive(*members: tuple[str, bytes], kind: int = tarfile.USTAR_FORMAT, **values: object) -> bytes:
    """Returns an archive by Python's tarfile; `values` are those of the last member's header."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as tar:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in values.items() if number == len(members) - 1 else ():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return target.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    return {each.name: bytes_of(each.table) for each in OVA.members(image_file(content, "web.ova"))}


def read(content: bytes) -> Machine:
    return OVA.read(image_file(content, "web.ova"), OPENER)


# -- reading


LONG = "d" * 90 + "/" + "n" * 90
ODD = "n" * 300 + "/\u00fc.vmdk"


@pytest.mark.parametrize(
    "kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_members_are_ranges_of_the_archive(kind: int) -> None:
    names = ["web.ovf", "./sub/a.vmdk", LONG] + ([ODD] if kind != tarfile.USTAR_FORMAT else [])
    content = archive(*((name, name.encode() * 50) for name in names), kind=kind)
    file = image_file(content, "web.ova")
    found = OVA.members(file)
    assert [each.name for each in found] == [name.removeprefix("./") for name in names]
    for each, name in zip(found, names, strict=True):
        assert bytes_of(each.table) == name.encode() * 50
        assert [row.source for row in each.table] == [file]


def test_directories_are_no_members() -> None:
    content = bytearray(archive(("sub", b""), ("sub/a.ovf", b"x")))
    content[156:157] = b"5"
    content[148:156] = _checksum(content)
    assert members(bytes(content)) == {"sub/a.ovf": b"x"}


def _checksum(content: bytearray) -> bytes:
    """Returns the checksum field of the first header."""
    return b"%06o\0 " % (sum(content[:148]) + 8 * ord(" ") + sum(content[156:512]))


def test_large_sizes_are_in_base_256() -> None:
    size = 9 << 30
    info = tarfile.TarInfo("a.ovf")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    sparse = MemoryFile("web.ova", 512 + size)
    sparse.write(0, header)
    assert [each.table.size for each in OVA.members(sparse)] == [size]


def _changed(at: int, new: bytes, *, sum_up: bool = True) -> bytes:
    """Returns an archive of one member with other bytes in its header."""
    content = bytearray(archive(("a.ovf", b"x")))
    content[at : at + len(new)] = new
    if sum_up:
        content[148:156] = _checksum(content)
    return bytes(content)


def _pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """Returns an archive whose one member has a pax header of these records."""
    body = b"".join(records)
    info = tarfile.TarInfo("pax")
    info.size, info.type = len(body), kind
    return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0") + archive(("a.ovf", b"x"))


BAD = {
    "above": (archive(("a.ovf", b""), ("../../x", b"")), "tar header at 0x200: member '../../x' is not a file name"),
    "inside-above": (archive(("a/../../x", b"")), "at 0x0: member 'a/../../x' is not a file name"),
    "absolute": (archive(("/etc/x", b"")), "at 0x0: member '/etc/x' is not a file name"),
    "control": (archive(("a\nb", b"")), r"at 0x0: member 'a\\nb' is not a file name"),
    "empty": (archive(("./", b"")), "at 0x0: member './' is not a file name"),
    "symlink": (archive(("a", b""), type=tarfile.SYMTYPE, linkname="/etc/shadow"), "member 'a' is a symbolic link"),
    "link": (archive(("a", b""), type=tarfile.LNKTYPE, linkname="b"), "member 'a' is a hard link"),
    "device": (archive(("a", b""), type=tarfile.BLKTYPE), "member 'a' is a block device"),
    "fifo": (archive(("a", b""), type=tarfile.FIFOTYPE), "member 'a' is a FIFO"),
    "sparse": (archive(("a", b""), type=tarfile.GNUTYPE_SPARSE), "member 'a' is a sparse file"),
    "type": (archive(("a", b""), type=b"V"), "member 'a' is of type b'V'"),
    "twice": (archive(("a", b""), ("b", b""), ("./a", b"")), "at 0x400: two members are called 'a'"),
    "size": (_changed(124, b"77777777777\0"), "member of 8589934591 bytes from 0x200 is past the end of the file"),
    "base-256": (_changed(124, b"\x80" + b"\xff" * 11), "bytes from 0x200 is past the end of the file"),
    "negative": (_changed(124, b"\xff" * 12), "is no number"),
    "digits": (_changed(124, b"0000000009x\0"), "at 0x0: size b'0000000009x.*' is no number"),
    "checksum": (_changed(0, b"b", sum_up=False), "at 0x0: checksum is b'.*', and the header's is"),
    "name": (_changed(0, b"\xff"), "at 0x0: name b'.*' is not UTF-8"),
    "cut": (archive(("a.ovf", b"x"))[:512], "member of 1 bytes from 0x200 is past the end of the file .0x200."),
    "cut-header": (archive(("a.ovf", b"x" * 512))[:1500][:1300], "tar header at 0x400: is cut off at 0x514"),
    "pax-length": (_pax(b"999 path=a\n"), "pax record at 0x0 of the header is damaged"),
    "pax-short": (_pax(b"3 path=a\n"), "pax record at 0x0 of the header is damaged"),
    "pax-name": (_pax(b"16 path=../../a\n"), "member '../../a' is not a file name"),
    "pax-size": (_pax(b"11 size=-1\n"), "pax size '-1' is no number"),
    "pax-large": (_pax(b"20 size=99999999999\n"), "member of 99999999999 bytes"),
    "pax-sparse": (_pax(b"22 GNU.sparse.major=1\n"), "member is a sparse file"),
    "pax-global": (_pax(b"11 path=ab\n", kind=b"g"), "global pax header has path for all members"),
    "pax-huge": (_pax(b"x" * 65537), "extended header has 65537 bytes, the limit is 65536"),
}


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD)
def test_bad_archives_are_refused_with_the_offset(content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as caught:
        members(content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("web.ova: tar header at 0x")


def test_too_many_members_are_refused() -> None:
    content = archive(*((f"{number}", b"") for number in range(MAX_MEMBERS + 1)))
    with pytest.raises(ImageError, match=f"has more than {MAX_MEMBERS} members"):
        members(content)


def test_a_package_is_known_by_its_first_member() -> None:
    assert OVA.probe(image_file(archive(("sub/web.OVF", b"x")), "x"))
    assert not OVA.probe(image_file(archive(("a.mf", b""), ("web.ovf", b"x")), "x"))
    assert not OVA.probe(image_file(with_disk(), "x"))
    assert Ovf().probe(image_file(with_disk(), "x"))
    assert not Ovf().probe(image_file(archive(("web.ovf", with_disk())), "x"))


def test_references_are_members_beside_the_descriptor() -> None:
    found = read(archive(("sub/web.ovf", with_disk()), ("sub/disk1.vmdk", b"x")))
    assert found.disks[0].file == "sub/disk1.vmdk"
    # VirtualBox writes names without encoding.
    raw = with_disk(files=FILE.replace("disk1", "a%20b"))
    assert read(archive(("web.ovf", raw), ("a%20b.vmdk", b"x"))).disks[0].file == "a%20b.vmdk"
    assert read(archive(("web.ovf", raw), ("a b.vmdk", b"x"))).disks[0].file == "a b.vmdk"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (archive(("web.ovf", with_disk())), "the descriptor refers to 'disk1.vmdk', which is not in the package"),
        (archive(("disk1.vmdk", b"x")), "has one member that ends in .ovf, this one has none"),
        (archive(("a.ovf", b""), ("b.ovf", b"")), "this one has 'a.ovf', 'b.ovf'"),
        (
            archive(("a.ovf", with_disk(files=FILE.replace("/>", ' ovf:size="2"/>'))), ("disk1.vmdk", b"x")),
            "the descriptor has 2 bytes for 'disk1.vmdk', and the member has 1",
        ),
        (archive(("a.ovf", bytes(9 << 20))), "a.ovf at 0x200 has 9437184 bytes, the limit is 8388608"),
    ],
    ids=["missing", "no-descriptor", "two-descriptors", "size", "large"],
)
def test_packages_that_contradict_themselves_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        read(content)


# -- writing

WEB = Machine(
    name="web",
    firmware=Firmware(kind="uefi", nvram=Nvram(file="web.nvram", kind="vmware")),
    disks=tuple(Disk(file=f"web-disk{number}.vmdk", format="vmdk", capacity=1 << 20) for number in (1, 2, 3)),
    removables=(Removable(kind="cdrom", file="media.iso"),),
)


def contents() -> dict[str, bytes]:
    sizes = {"web.nvram": 8684, "web-disk1.vmdk": 70001, "web-disk2.vmdk": 512, "web-disk3.vmdk": 4096}
    sizes["media.iso"] = 2048
    return {name: random_bytes(size, seed) for seed, (name, size) in enumerate(sizes.items())}


def made(modulus: int = 4096, **options: str) -> Extents:
    tables = {name: Extents.whole(Blob(name, content)) for name, content in contents().items()}
    adapted = OVA.adapt(WEB, PackageOptions()).machine
    return package(adapted, tables, modulus, **options)


@pytest.mark.parametrize("modulus", [1, 4096, 65536])
def test_disks_begin_at_multiples_and_keep_their_bytes(modulus: int) -> None:
    content = bytes_of(made(modulus))
    found = list(headers(image_file(content, "web.ova")))
    assert [each.name for each in found] == [
        "machine.ovf",
        "web.nvram",
        "web-disk1.vmdk",
        "web-disk2.vmdk",
        "web-disk3.vmdk",
        "media.iso",
    ]
    for each in found[2:]:
        assert each.start % max(modulus, 4096) == 0
    inside = members(content)
    assert inside["web.nvram"] == contents()["web.nvram"]
    for name, wanted in contents().items():
        assert inside[name][: len(wanted)] == wanted
        assert not any(inside[name][len(wanted) :])
    assert read(content) == OVA.adapt(WEB, PackageOptions()).machine


def test_disks_of_another_kind_than_the_descriptor_states_are_refused() -> None:
    machine = OVA.adapt(Machine(disks=(Disk(file="a.vmdk"),)), PackageOptions()).machine
    for flags, option, kind in ((0x30001, "sparse", "streamOptimized"), (3, "streamOptimized", "sparse")):
        header = b"KDMV" + (1).to_bytes(4, "little") + flags.to_bytes(4, "little")
        table = Extents.whole(Blob("a", header.ljust(512, b"\0")))
        with pytest.raises(PlanError, match=f"a.vmdk: is {kind}, and the package is for {option} disks"):
            package(machine, {"a.vmdk": table}, disk_format=option)


def test_stream_optimized_disks_end_where_they_end() -> None:
    inside = members(bytes_of(made(disk_format="streamOptimized")))
    assert {name: inside[name] for name in contents()} == contents()


def test_the_manifest_has_the_digest_of_each_member() -> None:
    table = made(manifest="sha256")
    inside = members(bytes_of(table))
    manifest = inside.pop("machine.mf").decode()
    assert manifest.splitlines() == [
        f"SHA256({name})= {hashlib.sha256(each).hexdigest()}" for name, each in inside.items()
    ]
    assert list(members(bytes_of(table)))[-1] == "machine.mf"


def test_digests_are_computed_when_the_manifest_is_read() -> None:
    lengths: list[int] = []

    def content(offset: int, length: int) -> bytes:
        lengths.append(length)
        return bytes(length)

    machine = OVA.adapt(Machine(disks=(Disk(file="a.vmdk"),)), PackageOptions()).machine
    table = package(machine, {"a.vmdk": Extents.whole(Blob("a", content, 10 << 20))}, manifest="sha256")
    # The header of the disk.
    assert sum(lengths) <= 512
    lengths.clear()
    manifest = next(row for row in table if row.source and row.source.name == "machine.mf")
    for _ in range(2):
        assert manifest.source is not None
        manifest.source.read(0, 10)
    assert sum(lengths) == 10 << 20


def test_names_of_two_files_differ_and_fit_a_header() -> None:
    machine = OVA.adapt(Machine(disks=(Disk(file="\u00fc" * 51),)), PackageOptions()).machine
    with pytest.raises(PlanError, match="is too long for a package, whose names have at most 100 bytes"):
        package(machine, {})
    machine = OVA.adapt(Machine(disks=(Disk(file="machine.ovf"),)), PackageOptions()).machine
    with pytest.raises(PlanError, match=r"two files of the package would be called 'machine.ovf'"):
        package(machine, {})


def test_members_from_8_gib_on_have_sizes_in_base_256(tmp_path: Path) -> None:
    machine = OVA.adapt(Machine(disks=(Disk(file="a.vmdk"),)), PackageOptions()).machine
    size = (8 << 30) + 512
    table = package(machine, {"a.vmdk": Extents.filled(size, Kind.ZERO)})
    path = tmp_path / "web.ova"
    with path.open("wb") as file:
        for row in table:
            if row.source is not None:
                file.seek(row.start)
                file.write(row.source.read(row.offset, row.length))
        file.truncate(table.size)
    for program in ("tar", "bsdtar"):
        listed = subprocess.run([oracle_program(program), "-tvf", path], capture_output=True, text=True, check=True)
        assert str(size) in listed.stdout


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
@pytest.mark.parametrize("manifest", ["none", "sha256"])
def test_other_programs_extract_the_same_members(program: str, manifest: str, tmp_path: Path) -> None:
    content = bytes_of(made(manifest=manifest))
    (tmp_path / "web.ova").write_bytes(content)
    command = [oracle_program(program), "-xf", "web.ova"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "web.ova").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == members(content)
