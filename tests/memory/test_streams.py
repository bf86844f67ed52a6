"""Migration streams and saved machines by hand: sound ones of each layout, and hostile ones."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

import vmconv
from support.memory_images import PAGE, libvirt_header, mapped_ram, migration
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.testing import random_bytes

MEMORY = random_bytes(5 * PAGE, 1) + bytes(3 * PAGE) + random_bytes(PAGE, 2)


def read(path: Path) -> bytes:
    with Opener(installed()) as opener:
        table = opener.image(str(path)).guest
        return table.read(0, table.size)


def put(folder: Path, data: bytes, name: str = "web.mig") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_the_last_bytes_of_a_page_count(tmp_path: Path) -> None:
    """A page that the guest writes while it is sent comes again."""
    assert read(put(tmp_path, migration(MEMORY, again=[0, 3 * PAGE, 6 * PAGE]))) == MEMORY


def test_a_machine_s_name_may_have_255_bytes(tmp_path: Path) -> None:
    assert read(put(tmp_path, migration(MEMORY, machine="pc-".ljust(255, "x")))) == MEMORY
    with pytest.raises(ImageError, match="length of the machine's name at 0x9: 256 is more than 255"):
        read(put(tmp_path, migration(MEMORY, machine="pc-".ljust(256, "x"))))


def test_mapped_ram_shares_its_pages(xfs_dir: Path) -> None:
    path = mapped_ram(xfs_dir / "web.mig", MEMORY)
    assert read(path) == MEMORY
    for target in ("new.elf", "new.vmss", "new.ram"):
        vmconv.convert(str(path), str(xfs_dir / target), zero_copy="require")
        assert read(xfs_dir / target) == MEMORY
    assert vmconv.info(str(path))["format-specific"]["data"]["mapped-ram"] is True


def test_what_the_bitmap_omits_is_zero_even_if_the_file_has_bytes(tmp_path: Path) -> None:
    path = mapped_ram(tmp_path / "web.mig", MEMORY)
    data = bytearray(path.read_bytes())
    at = (1 << 20) + 6 * PAGE
    data[at : at + PAGE] = b"\xee" * PAGE
    assert read(put(tmp_path, bytes(data))) == MEMORY


def test_arm_has_its_ram_at_1_gib(tmp_path: Path) -> None:
    path = put(tmp_path, migration(MEMORY, machine="virt-7.2", block="mach-virt.ram"))
    with Opener(installed()) as opener:
        table = opener.image(str(path)).guest
        assert table.kind[0] == Kind.HOLE
        assert table.read(1 << 30, len(MEMORY)) == MEMORY


@pytest.mark.parametrize("mapped", [False, True])
def test_libvirt_saves_both(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "web.save"
    if mapped:
        mapped_ram(path, MEMORY, front=libvirt_header(6, 3))
    else:
        path.write_bytes(libvirt_header() + migration(MEMORY))
    assert read(path) == MEMORY


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (libvirt_header(1) + migration(MEMORY), r"compression at 0x1c: gzip is not read"),
        (libvirt_header(99) + migration(MEMORY), r"compression at 0x1c: 99 is not read"),
        (libvirt_header(0, 9) + migration(MEMORY), r"version at 0x10: 9 is not one of"),
        (b"LibvirtQemudSave" + struct.pack("<5I", 2, 1 << 31, 0, 0, 0) + bytes(99), r"length of the XML at 0x14"),
        (libvirt_header() + b"QEVN" + migration(MEMORY), r"magic at 0x444: no signature of a migration stream"),
    ],
)
def test_a_malformed_saved_machine_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    refused(put(tmp_path, data, "web.save"), message)


SOUND = migration(MEMORY)
AT_RAM = SOUND.index(b"\3ram")
AT_SIZE = AT_RAM + 12
AT_PAGES = SOUND.index(struct.pack(">QBI", 0x10, 0x7E, 2)) + 18


def changed(at: int, value: bytes) -> bytes:
    return SOUND[:at] + value + SOUND[at + len(value) :]


STREAMS = [
    pytest.param(changed(4, b"\0\0\0\2"), "signature of QEMU migration of another version", id="version"),
    pytest.param(
        changed(AT_RAM, bytes([255]) + b"i~\x8f" * 85),
        r"section name at 0x\w+: b'i~.{,70} is no name of QEMU's$",
        id="no name",
    ),
    pytest.param(changed(9, b"\xff" * 4), "length of the machine's name at 0x9: 4294967295 is more", id="name"),
    pytest.param(changed(AT_RAM + 1, b"rom"), "section name at 0x.*'rom' precedes the RAM", id="other section"),
    pytest.param(changed(AT_SIZE, b"\xff" * 8), "size of all blocks at 0x.*: 0xffffffffffffffff is not", id="total"),
    pytest.param(
        changed(AT_SIZE + 15, b"\xff" * 8), "length of block 'pc.ram' at 0x.* is not whole pages", id="length"
    ),
    pytest.param(changed(AT_PAGES, struct.pack(">Q", 0x108)), r"flags 0x108 \(compression\) are not read", id="flags"),
    pytest.param(changed(AT_PAGES, struct.pack(">Q", (1 << 40) | 8)), "0x10000000000 of block 'pc.ram'", id="address"),
    pytest.param(changed(AT_PAGES, struct.pack(">Q", 0x28)), "address 0x0 of block '' is in no block", id="no block"),
    pytest.param(SOUND[: AT_PAGES + 20], "page at 0x.*: 4096 bytes reach past the end", id="half a page"),
    pytest.param(SOUND[: AT_PAGES + 15 + PAGE], "page at 0x.*: 8 bytes reach past the end", id="end of pages"),
    pytest.param(SOUND.replace(b"pc.ram", b"pc.rum"), "no RAM block is pc.ram or mach-virt.ram", id="no main block"),
    pytest.param(
        SOUND.replace(b"pc-i440fx-7.2", b"microvm-7.2.1"), "machine 'microvm-7.2.1': where it has", id="machine"
    ),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), STREAMS)
def test_a_malformed_stream_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    refused(put(tmp_path, data), message)


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("skip", "value", "message"),
    [
        (0, struct.pack(">I", 2), "version 2 with pages of 4096 bytes is not 1 with 4096"),
        (4, struct.pack(">Q", 65536), "version 1 with pages of 65536 bytes"),
        (12, struct.pack(">Q", 0), "offset of the bitmap at 0x.*: 8 bytes at 0x0 are not"),
        (12, struct.pack(">Q", (1 << 64) - 1), "offset of the bitmap at 0x"),
        (20, struct.pack(">Q", 1 << 63), "offset of the pages at 0x"),
        (20, struct.pack(">Q", 0x90), "offset of the pages at 0x.*: 0x90 lies in the bitmap|offset of the pages"),
    ],
)
def test_malformed_mapped_ram_is_refused(tmp_path: Path, skip: int, value: bytes, message: str) -> None:
    path = mapped_ram(tmp_path / "web.mig", MEMORY)
    data = path.read_bytes()
    at = data.index(b"\6pc.ram") + 15 + skip
    refused(put(tmp_path, data[:at] + value + data[at + len(value) :]), message)


def test_pages_that_were_never_sent_are_named(tmp_path: Path) -> None:
    at = SOUND.index(struct.pack(">Q", 4 * PAGE | 0x28))
    path = put(tmp_path, SOUND[:at] + SOUND[at + 8 + PAGE :])
    assert read(path) == MEMORY[: 4 * PAGE] + bytes(PAGE) + MEMORY[5 * PAGE :]
    result = vmconv.convert(str(path), str(tmp_path / "new.ram"))
    assert result.warnings == ("web.mig: 1 page of RAM not in the stream, read as zeros",)


# -- the end


ENDING = SOUND[SOUND.index(b"\4\0\0\0\3\5timer") :]
CUTS = [
    pytest.param(0, r"without an EOF section: state of devices and processors is cut off", id="behind the RAM"),
    pytest.param(30, r"without an EOF section: state of devices and processors is cut off", id="in a device"),
    pytest.param(ENDING.index(b"\x7e") + 5, r"without an EOF section: state", id="before EOF"),
    pytest.param(ENDING.index(b"\x7e") + 6, r"behind the EOF section: the description .* is missing", id="behind EOF"),
    pytest.param(-20, r"within the description of the devices, which is cut off", id="in the description"),
    pytest.param(-1, r"within the description of the devices, which is cut off", id="last byte"),
]


@pytest.mark.parametrize("kind", ["stream", "mapped", "saved"])
@pytest.mark.parametrize(("cut", "said"), CUTS)
def test_what_is_cut_off_behind_the_ram_is_named(tmp_path: Path, kind: str, cut: int, said: str) -> None:
    path = tmp_path / ("web.save" if kind == "saved" else "web.mig")
    if kind == "mapped":
        mapped_ram(path, MEMORY)
    else:
        path.write_bytes((libvirt_header() if kind == "saved" else b"") + SOUND)
    assert vmconv.info(str(path))["warnings"] == []
    sound = vmconv.check(str(path))
    assert sound
    assert sound.doubts == ()
    size = path.stat().st_size - (len(ENDING) - cut if cut >= 0 else -cut)
    os.truncate(path, size)
    result = vmconv.convert(str(path), str(tmp_path / "new.ram"))
    (warning,) = result.warnings
    assert re.fullmatch(rf"{path.name}: the stream ends at {size:#x}, .*{said}.*", warning)
    report = vmconv.check(str(path))
    assert report
    assert report.doubts == (warning,)
    assert (tmp_path / "new.ram").read_bytes() == MEMORY


def test_bytes_behind_the_stream_are_named(tmp_path: Path) -> None:
    path = put(tmp_path, SOUND + b"\0{}more")
    said = f"web.mig: 7 bytes at {len(SOUND):#x} are behind the end of the stream"
    assert vmconv.info(str(path))["warnings"] == [said]


@pytest.mark.malformed
def test_mapped_ram_that_ends_within_its_pages_is_refused(tmp_path: Path) -> None:
    path = mapped_ram(tmp_path / "web.mig", MEMORY, block="pc.rem")
    # The main block is the last one.
    path.write_bytes(path.read_bytes().replace(b"pc.rom", b"pc.ram"))
    assert len(read(path)) == 2 * PAGE
    os.truncate(path, (2 << 20) + 2 * PAGE - 1)
    refused(path, r"page at 0x201000 \(guest address 0x1000\): ends past the end of the file")


def refused(path: Path, message: str) -> None:
    target = path.with_name("new.ram")
    with pytest.raises(ImageError, match=message) as caught:
        vmconv.convert(str(path), str(target))
    assert str(caught.value).startswith(f"{path.name}: ")
    assert "\n" not in str(caught.value)
    assert not target.exists()
