"""kdump files of QEMU and by hand: sound ones of each layout and compression, and hostile ones."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

import vmconv
from support import memory_images as images
from support.disks import MIB
from support.memory_images import PAGE, Kdump
from support.qemu_monitor import LOADED, PLACE, qemu
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.testing import random_bytes

A, B = random_bytes(3 * PAGE, 1) + b"packs well " * 1000 + bytes(PAGE), random_bytes(2 * PAGE, 2)
A = A[: len(A) // PAGE * PAGE]
TWO = [(0, A), (0x100000, B)]
NOTE = b"\5\0\0\0\4\0\0\0\1\0\0\0CORE\0\0\0\0abcd"


def put(folder: Path, data: bytes, name: str = "web.kdump") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def memory(path: Path) -> list[tuple[int, bytes]]:
    """Returns address and bytes of each range of RAM."""
    with Opener(installed()) as opener:
        table = opener.image(str(path)).guest
        found: list[tuple[int, bytes]] = []
        for row in table:
            if row.kind == Kind.HOLE:
                continue
            data = table.read(row.start, row.length)
            if found and found[-1][0] + len(found[-1][1]) == row.start:
                found[-1] = found[-1][0], found[-1][1] + data
            else:
                found.append((row.start, data))
        return found


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("bits", "order"), [(64, "<"), (64, ">"), (32, "<"), (32, ">")])
def test_dumps_of_all_layouts_are_read(tmp_path: Path, bits: int, order: str, flat: bool) -> None:
    path = put(tmp_path, Kdump(bits=bits, order=order, flat=flat).data(TWO))
    assert memory(path) == TWO
    assert vmconv.info(str(path))["format-specific"]["data"]["flattened"] is flat


@pytest.mark.parametrize("compression", ["zlib", "lzo", "snappy", "zstd", "none"])
def test_pages_of_all_compressions_are_read(tmp_path: Path, compression: str) -> None:
    dump = Kdump(compression=compression)
    path = put(tmp_path, dump.data(TWO))
    assert memory(path) == TWO
    kinds = {flags for _, _, flags in dump.descriptors}
    assert kinds == {0, *([dump.flag] if dump.flag else [])}


def test_pages_of_65536_bytes_are_read(tmp_path: Path) -> None:
    ranges = [(0, random_bytes(1 << 17, 4)), (1 << 20, bytes(1 << 16))]
    assert memory(put(tmp_path, Kdump(block=65536, machine="aarch64").data(ranges))) == ranges


@pytest.mark.parametrize("flat", [False, True])
def test_bytes_behind_the_last_page_are_named(tmp_path: Path, flat: bool) -> None:
    data = Kdump(flat=flat).data(TWO)
    for more in (b"", b"rest"):
        report = vmconv.check(str(put(tmp_path, data + more)))
        assert report
        last = "piece" if flat else "page"
        said = f"web.kdump: 4 bytes at {len(data):#x} are behind the last {last}, and are not memory"
        assert report.doubts == ((said,) if more else ())


def test_the_last_page_may_be_that_of_zeros(tmp_path: Path) -> None:
    report = vmconv.check(str(put(tmp_path, Kdump().data([(0, bytes(3 * PAGE))]))))
    assert report
    assert report.doubts == ()


def test_pages_of_zeros_become_zeros(tmp_path: Path) -> None:
    path = put(tmp_path, Kdump().data([(0, bytes(4 * PAGE) + B)]))
    with Opener(installed()) as opener:
        table = opener.image(str(path)).guest
        assert (table.kind[0], int(table.length[0])) == (Kind.ZERO, 4 * PAGE)


def test_what_was_left_out_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, Kdump(level=31, without={1, 2}).data([(0, A)]))
    said = vmconv.info(str(path))
    assert said["format-specific"]["data"]["excluded-pages"] == 2
    assert "left out (level 31): 2 pages of RAM" in said["warnings"][0]
    assert memory(path) == [(0, A[:PAGE]), (3 * PAGE, A[3 * PAGE :])]


def test_registers_become_notes_of_a_core(tmp_path: Path) -> None:
    path = put(tmp_path, Kdump(notes=NOTE).data(TWO))
    result = vmconv.convert(str(path), str(tmp_path / "new.elf"))
    assert result.losses == ()
    assert NOTE in (tmp_path / "new.elf").read_bytes()
    assert vmconv.info(str(tmp_path / "new.elf"))["format-specific"]["data"]["processors-with-registers"] == 1


def test_a_dump_that_is_not_complete_has_a_warning(tmp_path: Path) -> None:
    path = put(tmp_path, Kdump(status=8, unwritten={3}).data([(0, A)]))
    assert memory(path) == [(0, A[: 3 * PAGE]), (4 * PAGE, A[4 * PAGE :])]
    assert "is not complete" in vmconv.info(str(path))["warnings"][0]


def test_later_pieces_of_a_flattened_dump_replace_earlier_ones(tmp_path: Path) -> None:
    plain = Kdump().data(TWO)
    begun = [(0, b"\xee" * PAGE), (PAGE // 2, plain[PAGE // 2 : 5000]), (5000, plain[5000:]), (0, plain[: PAGE // 2])]
    path = put(tmp_path, images.flattened([*begun, (PAGE // 2, plain[PAGE // 2 : PAGE])]))
    assert memory(path) == TWO


def test_what_is_not_compressed_is_shared_where_its_phase_allows(xfs_dir: Path) -> None:
    big = [(0, random_bytes(MIB, 5))]
    path = put(xfs_dir, Kdump(compression="none").data(big))
    assert vmconv.convert(str(path), str(xfs_dir / "new.elf")).totals.shared > MIB // 2
    assert memory(xfs_dir / "new.elf") == big


def test_what_qemu_wrote_is_the_memory_of_its_core(xfs_dir: Path) -> None:
    qemu(xfs_dir, f'dump-guest-memory "{xfs_dir}/web.elf"', f'dump-guest-memory -z "{xfs_dir}/web.kdump"')
    assert vmconv.compare(str(xfs_dir / "web.kdump"), str(xfs_dir / "web.elf"))
    with Opener(installed()) as opener:
        assert opener.image(str(xfs_dir / "web.kdump")).guest.read(PLACE, len(LOADED)) == LOADED
    said = vmconv.info(str(xfs_dir / "web.kdump"))["format-specific"]["data"]
    assert (said["flattened"], said["compression"], said["processors-with-registers"]) == (True, "zlib", 1)
    # All but the 3 MiB of the loader and the firmware are zeros.
    result = vmconv.convert(str(xfs_dir / "web.kdump"), str(xfs_dir / "new.vmss"))
    assert result.totals.copied < 8 * MIB
    assert vmconv.compare(str(xfs_dir / "new.vmss"), str(xfs_dir / "web.elf"))


# -- hostile


def with_page(data: bytes, flags: int, size: int | None = None) -> bytes:
    """Returns a dump of one page, which the descriptor says is this data."""
    dump = Kdump()
    whole = bytearray(dump.data([(0, B[:PAGE])]))
    at = dump.first_descriptor
    offset = int.from_bytes(whole[at : at + 8], "little")
    whole[offset:] = data
    struct.pack_into("<QII", whole, at, offset, len(data) if size is None else size, flags)
    return bytes(whole)


def edited(at: int, layout: str, *values: int, dump: Kdump | None = None) -> bytes:
    data = bytearray((dump or Kdump()).data(TWO))
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


SAMPLE = Kdump()
SIZE = len(SAMPLE.data(TWO))
DESCRIPTOR = SAMPLE.first_descriptor
BITMAP = 2 * PAGE
BOMB = zlib.compress(bytes(1 << 20))
LONG = zlib.compress(bytes(PAGE + 1))
SHORT = zlib.compress(bytes(PAGE - 1))

MALFORMED = [
    pytest.param(edited(8, "<I", 7), r"version at 0x8: 07000000 is none of 1 to 6", id="version"),
    pytest.param(edited(428, "<I", 0), r"header at 0x1\w+: block size", id="no block"),
    pytest.param(edited(428, "<I", 1 << 31), r"header at 0x1\w+: block size", id="large block"),
    pytest.param(edited(432, "<I", 0), r"header at 0x1\w+: ", id="no sub-header"),
    pytest.param(edited(432, "<I", 0xFFFFFFFF), r"header at 0x1\w+: ", id="sub-header past the end"),
    pytest.param(edited(436, "<I", 1), r"header at 0x1\w+: ", id="few bitmaps"),
    pytest.param(edited(436, "<I", 0xFFFFFFFE), r"header at 0x1\w+: ", id="bitmaps past the end"),
    pytest.param(edited(440, "<I", 0xFFFFFFFF), r"header at 0x1\w+: ", id="pages"),
    pytest.param(edited(440, "<I", 0), r"header at 0x1\w+: ", id="no pages"),
    pytest.param(edited(PAGE + 12, "<I", 1), r"is a part of a split dump", id="split"),
    pytest.param(edited(PAGE + 48, "<QQ", 1 << 63, 99), r"notes at 0x8000000000000000: 99 bytes", id="notes past"),
    pytest.param(edited(PAGE + 48, "<QQ", 0, 1 << 62), r"length of the notes at 0x1038", id="notes' length"),
    pytest.param(
        edited(BITMAP + PAGE, "<4096B", *[255] * 4096), r"descriptors at 0x4000: 257 descriptors reach past", id="bits"
    )
    if SIZE < DESCRIPTOR + 257 * 24
    else pytest.param(edited(BITMAP + PAGE, "<32B", *[255] * 32), r"descriptor at 0x\w+ \(guest", id="bits"),
    pytest.param(edited(DESCRIPTOR, "<Q", 0), r"descriptor at 0x4000 \(guest address 0x0\): 4096 bytes at 0x0", id="0"),
    pytest.param(edited(DESCRIPTOR, "<Q", DESCRIPTOR), r"descriptor at 0x4000 .*at 0x4000 with", id="in descriptors"),
    pytest.param(edited(DESCRIPTOR, "<Q", SIZE - 1), r"descriptor at 0x4000 .* are no page between", id="past"),
    pytest.param(edited(DESCRIPTOR, "<Q", (1 << 64) - 1), r"descriptor at 0x4000 .*at 0xf+ with", id="wraps"),
    pytest.param(edited(DESCRIPTOR + 8, "<I", 0), r"descriptor at 0x4000 .*: 0 bytes at", id="empty"),
    pytest.param(edited(DESCRIPTOR + 8, "<I", 0xFFFFFFFF), r"descriptor at 0x4000 .*: 4294967295 bytes", id="length"),
    pytest.param(edited(DESCRIPTOR + 12, "<I", 3), r"descriptor at 0x4000 .*flags 0x3", id="two compressions"),
    pytest.param(edited(DESCRIPTOR + 12, "<I", 0x40), r"descriptor at 0x4000 .*flags 0x40", id="compression"),
    pytest.param(
        edited(DESCRIPTOR + 24, "<Q", SIZE - PAGE), r"descriptor at 0x4030: page at 0x\w+ begins before", id="overlap"
    ),
    pytest.param(with_page(BOMB, 1), r"page at 0x\w+ \(guest address 0x0\): cannot be decompressed", id="bomb"),
    pytest.param(with_page(LONG, 1), r"page at 0x\w+ .*: (cannot|yields 4097)", id="a byte more"),
    pytest.param(with_page(SHORT, 1), r"page at 0x\w+ .*: yields 4095 bytes, not 4096", id="a byte less"),
    pytest.param(with_page(LONG[:-9], 1), r"page at 0x\w+ .*: cannot be decompressed", id="no end"),
    pytest.param(with_page(b"\xff\xff\xff\xff\x0f" + bytes(40), 4), r"page at 0x\w+ .*: cannot be", id="snappy's size"),
    pytest.param(with_page(images.snappy(bytes(PAGE - 1)), 4), r"yields 4095 bytes, not 4096 \(snappy\)", id="snappy"),
    pytest.param(with_page(b"\x11\0\0", 2), r"yields 0 bytes, not 4096 \(lzo\)", id="lzo ends"),
    pytest.param(with_page(b"\x12" + bytes(99), 2), r"page at 0x\w+ .*: cannot be decompressed \(lzo\)", id="lzo"),
    pytest.param(with_page(b"\x28\xb5\x2f\xfd" + b"\xff" * 30, 0x20), r"page at 0x\w+ .*: cannot be", id="zstd"),
    # A frame that says it has 8192 bytes, in a segment of its own.
    pytest.param(
        with_page(b"\x28\xb5\x2f\xfd\x60\x00\x1f" + bytes(9), 0x20), r"yields 8192 bytes, not", id="zstd's size"
    ),
    pytest.param(images.flattened([(0, b"KDUMP   ")])[:-1], r"piece at 0x1018: 16 bytes reach past", id="no end piece"),
    pytest.param(images.flattened([(1 << 62, b"x")]), r"piece at 0x1000: 1 bytes for 0x4000000000000000", id="far"),
    pytest.param(images.flattened([(-5, b"x")]), r"piece at 0x1000: 1 bytes for -0x5 reach", id="negative"),
    pytest.param(images.flattened([(0, b"")]), r"piece at 0x1000: 0 bytes for 0x0", id="empty piece"),
    pytest.param(images.flattened([]), r"magic at 0x0: no signature of a kdump file", id="no pieces"),
    pytest.param(images.flattened([], version=2), r"header at 0x0: type 1, version 2", id="flattened's version"),
]


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), MALFORMED)
def test_a_malformed_dump_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    target = tmp_path / "new.ram"
    with pytest.raises(ImageError, match=message) as caught:
        vmconv.convert(str(put(tmp_path, data)), str(target))
    assert str(caught.value).startswith("web.kdump: ")
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_random_reads_are_those_of_the_memory(tmp_path: Path) -> None:
    rng = random.Random(3)
    with Opener(installed()) as opener:
        table = opener.image(str(put(tmp_path, Kdump(flat=True).data(TWO)))).guest
        for _ in range(200):
            at = rng.randrange(len(A) - 1)
            length = rng.randrange(1, len(A) - at)
            assert table.read(at, length) == A[at : at + length]
