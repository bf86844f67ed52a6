"""Compressed memory of Hyper-V: XPRESS against the published examples and dissect, and records by hand."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmconv
from support.hyperv_packing import END, packed, piece, record, xpress
from support.memory_images import MIB, PAGE, saved_by_hyperv
from support.requirements import oracle_module
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.testing import random_bytes
from vmconv.testing.malformed import memory_limit, time_limit
from vmconv_vmrs import packed as own

TEXT = (b"the memory of a machine has text, pointers and zeros " * 100)[:PAGE]


def mixed(seed: int) -> bytes:
    """Returns 1 MiB with pages of zeros, of a pattern, of text, of pointers, and of random bytes."""
    rng = random.Random(seed)
    kinds = [
        lambda: bytes(PAGE),
        lambda: bytes(PAGE),
        lambda: rng.randbytes(8) * (PAGE // 8),
        lambda: TEXT[rng.randrange(50) :].ljust(PAGE, b"\0"),
        lambda: b"".join(struct.pack("<Q", 0xFFFF888000000000 + 64 * rng.randrange(999)) for _ in range(PAGE // 8)),
        lambda: rng.randbytes(PAGE),
    ]
    return b"".join(rng.choice(kinds)() for _ in range(MIB // PAGE))


# -- XPRESS


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        # [MS-XCA] 3.1, examples of plain LZ77.
        ("3f000000" + b"abcdefghijklmnopqrstuvwxyz".hex(), b"abcdefghijklmnopqrstuvwxyz"),
        ("ffffff1f61626317000fff2601", b"abc" * 100),
    ],
)
def test_the_published_examples_are_read(data: str, wanted: bytes) -> None:
    assert own.xpress(bytes.fromhex(data), len(wanted)) == wanted


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(min_size=1, max_size=300), st.text("ab", min_size=1, max_size=PAGE).map(str.encode)))
def test_what_is_compressed_is_read_as_dissect_reads_it(data: bytes) -> None:
    small = xpress(data)
    assert own.xpress(small, len(data)) == data
    assert oracle_module("dissect.util.compression.lzxpress").decompress(small) == data


@pytest.mark.parametrize("size", [PAGE, 300, 40_000, 70_000, 200_000])
def test_long_matches_are_read(size: int) -> None:
    for data in (b"x" * size, b"ab" * (size // 2), random_bytes(50, 1) * (size // 50)):
        assert own.xpress(xpress(data), len(data)) == data


# -- blocks


@pytest.mark.parametrize("end", [True, False])
def test_records_make_the_block(end: bool) -> None:
    for seed in range(3):
        data = mixed(seed)
        assert own.unpack(packed(data, end=end)) == data
    assert len(packed(bytes(MIB))) == 20


def test_pieces_make_a_page() -> None:
    rest = b"\1" * (MIB - PAGE)
    parts = piece(TEXT[:100]) + piece(random_bytes(50, 1)) + piece(TEXT[150:])
    whole = TEXT[:100] + random_bytes(50, 1) + TEXT[150:] + rest
    filled = packed(bytes(PAGE) + rest)
    # Behind the record of the first page, which is one of a pattern.
    assert own.unpack(parts + filled[12:]) == whole


def put(folder: Path, *blocks: bytes) -> Path:
    """Returns a state whose memory is these blocks, of 1 MiB as they are or compressed."""
    more = {f"RamBlock{number}": data for number, data in enumerate(blocks)}
    path = folder / "web.vmrs"
    path.write_bytes(saved_by_hyperv([(0, bytes(len(blocks) * MIB))], more=more))
    return path


def test_a_state_is_read_block_by_block(xfs_dir: Path) -> None:
    wanted = [mixed(1), bytes(MIB), random_bytes(MIB, 2), mixed(3)]
    path = put(xfs_dir, packed(wanted[0]), packed(wanted[1]), wanted[2], packed(wanted[3]))
    with Opener(installed()) as opener:
        table = opener.image(str(path)).guest
        assert [row.kind for row in table] == [Kind.DATA, Kind.ZERO, Kind.DATA, Kind.DATA]
        assert table.read(0, 4 * MIB) == b"".join(wanted)
        assert table.read(MIB - 100, 200) == wanted[0][-100:] + bytes(100)
    result = vmconv.convert(str(path), str(xfs_dir / "new.elf"), verify="bytes")
    assert (result.totals.shared, result.totals.copied) == (MIB, 2 * MIB)
    assert [copy.reason for copy in result.copies] == ["Hyper-V compresses memory"]
    assert vmconv.compare(str(path), str(xfs_dir / "new.elf"))
    assert vmconv.info(str(path))["format-specific"]["data"]["compressed-blocks"] == 2


PATTERN = struct.pack("<IQ", 0xFFFFFFFE, 7)
SOUND = record(TEXT)
FILL = struct.pack("<IQI", 0xFFFFFFFD, 0, 255)
HOSTILE = {
    "empty": (END, "record at 0 ends it after 0 of 1048576 bytes"),
    "too little": (SOUND + END, f"record at {len(SOUND)} ends it after 4096"),
    "no end": (SOUND, f"ends at {len(SOUND)} in a record, after 4096"),
    "behind it": (FILL + PATTERN + b"x", "has 1 bytes behind its last record"),
    "two ends": (FILL + PATTERN + END + END, "has 8 bytes behind its last record"),
    "no pages": (struct.pack("<IQI", 0xFFFFFFFD, 0, 0), "record at 0 is of 0 pages, there is room for 256"),
    "many pages": (struct.pack("<IQI", 0xFFFFFFFD, 0, 257), "record at 0 is of 257 pages"),
    "most pages": (struct.pack("<IQI", 0xFFFFFFFD, 0, 0xFFFFFFFF), "record at 0 is of 4294967295 pages"),
    "one page too many": (FILL + PATTERN + PATTERN, "has 12 bytes behind its last record"),
    "a cut pattern": (struct.pack("<II", 0xFFFFFFFE, 7), "ends at 8 in a record"),
    "a cut page": (SOUND[:-1], "in a record, after 0"),
    "no bytes": (struct.pack("<I", 0), "record at 0 makes 4096 bytes of 0"),
    "too many bytes": (struct.pack("<I", 4097) + bytes(5000), "record at 0 makes 4096 bytes of 4097"),
    "a large piece": (struct.pack("<III", 0xFFFFFFFC, 4097, 10) + bytes(10), "record at 0 makes 4097 bytes of 10"),
    "a piece that grows": (struct.pack("<III", 0xFFFFFFFC, 10, 11) + bytes(11), "makes 10 bytes of 11"),
    "an empty piece": (struct.pack("<III", 0xFFFFFFFC, 0, 0), "makes 0 bytes of 0"),
    "a match before the page": (
        struct.pack("<II", 10, 0x80000000) + struct.pack("<H", 8) + bytes(4),
        "no page that XPRESS compressed",
    ),
    "a match past the page": (
        struct.pack("<II", 13, 0x7FFFFFFF) + b"a" + struct.pack("<HBBH", 7, 15, 255, 60000) + b"xx",
        "no page that XPRESS compressed",
    ),
    "a length below its form": (
        struct.pack("<II", 11, 0x7FFFFFFF) + b"a" + struct.pack("<HBBH", 7, 15, 255, 21),
        "no page that XPRESS compressed",
    ),
}


@pytest.mark.malformed
@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_block_is_refused(name: str, tmp_path: Path) -> None:
    data, wanted = HOSTILE[name]
    path = put(tmp_path, packed(mixed(1)), data)
    with time_limit(), memory_limit(), pytest.raises(ImageError) as error:
        vmconv.convert(str(path), str(tmp_path / "new.ram"))
    assert wanted in str(error.value)
    assert str(error.value).startswith("web.vmrs: compressed block at 0x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new.ram").exists()


def test_changed_bytes_are_noticed_or_change_memory_only() -> None:
    data = packed(mixed(2))
    rng = random.Random(1)
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert len(own.unpack(bytes(changed))) == MIB
        except own.PackedError as error:
            assert "\n" not in str(error)
