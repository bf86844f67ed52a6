"""AVML images by hand, sound and hostile, and volatility3's opinion of them."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import vmconv
from support import memory_images as images
from support.memory_images import PAGE, avml, snappy_chunk
from support.volatility import volatility
from vmconv.errors import ImageError
from vmconv.io.opener import Opener
from vmconv.io.registry import installed
from vmconv.model.extents import Kind
from vmconv.testing import random_bytes

A, B = random_bytes(2 * PAGE, 1) + bytes(3 * PAGE), random_bytes(3 * PAGE, 2)
TWO = [(0, A), (0x100000, B)]
IDENTIFIER = b"\xff\x06\0\0sNaPpY"


def put(folder: Path, data: bytes, name: str = "web.avml") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("chunk", [65536, 4096, 1000])
def test_ranges_and_bytes_are_those_of_the_image(tmp_path: Path, chunk: int) -> None:
    with Opener(installed()) as opener:
        table = opener.image(str(put(tmp_path, avml(TWO, chunk=chunk)))).guest
        assert [(row.start, row.length) for row in table if row.kind != Kind.HOLE] == [
            (at, len(data)) for at, data in TWO
        ]
        for at, data in TWO:
            assert table.read(at, len(data)) == data
            for start, length in ((1, 1), (PAGE - 1, 2), (999, 2002), (len(data) - 1, 1)):
                assert table.read(at + start, length) == data[start : start + length]


def test_all_of_it_is_copied_with_the_reason(tmp_path: Path) -> None:
    plan = vmconv.plan(str(put(tmp_path, avml(TWO))), str(tmp_path / "new.elf"))
    assert [copy.reason for copy in plan.copies] == ["AVML compresses memory, or puts headers into it"]
    assert sum(copy.bytes for copy in plan.copies) == len(A) + len(B)


def test_chunks_that_a_reader_skips_are_skipped(tmp_path: Path) -> None:
    padded = IDENTIFIER + b"\xfe\3\0\0abc" + snappy_chunk(B) + IDENTIFIER
    last = b"\xfe\3\0\0abc" + snappy_chunk(B[:PAGE], packed=False)
    stream = padded + last
    data = struct.pack("<IIQQQ", 0x4C4D5641, 2, 0, len(B) + PAGE - 1, 0) + stream + struct.pack("<Q", len(stream))
    with Opener(installed()) as opener:
        table = opener.image(str(put(tmp_path, data))).guest
        assert table.read(0, table.size) == B + B[:PAGE]


def test_volatility_reads_the_same_bytes(tmp_path: Path) -> None:
    # volatility3 2.28 never ends for a range whose stream is longer than its RAM.
    memory = bytearray(images.ram())
    for at in range(0, len(memory), PAGE):
        memory[at + 64 : at + PAGE // 2] = bytes(PAGE // 2 - 64)
    path = put(tmp_path, avml(images.ranges(bytes(memory))))
    wanted = images.physical(bytes(memory))
    rng = random.Random(6)
    asked = [0, images.LOW - 16, images.GAP, *(rng.randrange(images.LOW // 16) * 16 for _ in range(1000))]
    _, theirs = volatility(path, "avml", "AVMLLayer", asked)
    assert theirs == [wanted[at : at + 16].hex() for at in asked]
    vmconv.convert(str(path), str(tmp_path / "new.lime"))
    _, ours = volatility(tmp_path / "new.lime", "lime", "LimeLayer", asked)
    assert ours == theirs


# -- hostile

SOUND = avml(TWO)
CHUNK = 32 + len(IDENTIFIER)
FIRST = int.from_bytes(SOUND[CHUNK + 1 : CHUNK + 4], "little")
LENGTH = CHUNK + 4 + FIRST


def changed(at: int, value: bytes) -> bytes:
    return SOUND[:at] + value + SOUND[at + len(value) :]


def streamed(chunks: bytes, length: int = PAGE) -> bytes:
    stream = IDENTIFIER + chunks
    return struct.pack("<IIQQQ", 0x4C4D5641, 2, 0, length - 1, 0) + stream + struct.pack("<Q", len(stream))


MALFORMED = [
    pytest.param(SOUND + b"\1" * 32, r"range 2 at 0x\w+: magic number 0x1010101, version 16843009", id="bytes behind"),
    pytest.param(SOUND + SOUND[:31], r"range 2 at 0x\w+: 32 bytes reach past the end", id="half a header"),
    pytest.param(SOUND[:-3], r"length of the stream at 0x\w+: 8 bytes reach past the end", id="half a length"),
    pytest.param(changed(LENGTH + 12, b"\1"), r"range 1 at 0x\w+: magic number 0x4c4d5641, version 1", id="version"),
    pytest.param(changed(16, bytes(8)), r"chunk at 0x2a: has 20480 bytes of RAM, from 1 to 1 are possible", id="short"),
    pytest.param(changed(8, b"\xff" * 8), r"range 0 at 0x0: last address 0x4fff is less than the first", id="last"),
    pytest.param(changed(16, b"\xff" * 8), r"chunk at 0x\w+: type 0x\w+ is not known|chunk at", id="all addresses"),
    pytest.param(SOUND[:40], r"stream at 0x20: 10 bytes reach past the end", id="half an identifier"),
    pytest.param(changed(36, b"x"), r"stream at 0x20: no signature of a Snappy stream", id="identifier"),
    pytest.param(changed(CHUNK, b"\2"), r"chunk at 0x2a: type 0x2 is not known", id="type"),
    pytest.param(changed(CHUNK + 1, b"\xff\xff\xff"), r"chunk at 0x2a: 16777215 bytes reach past", id="chunk's length"),
    pytest.param(changed(CHUNK + 8, b"\xff" * 5), r"chunk at 0x2a: has 0 bytes of RAM", id="varint"),
    pytest.param(
        changed(CHUNK + 8, b"\xff\xff\xff\x7f"), r"chunk at 0x2a: has 268435455 bytes of RAM, from 1 to", id="bomb"
    ),
    pytest.param(streamed(b"\1\4\0\0abcd"), r"chunk at 0x2a: has 0 bytes of RAM", id="empty chunk"),
    pytest.param(streamed(b"\0\0\0\0" + b"\1\0\0\0"), r"chunk at 0x2a: has 0 bytes of RAM", id="no checksum"),
    pytest.param(streamed(b"\xfe\0\0\0" * 1000), r"chunk at 0x66: type 0xfe is not known, or there after 16", id="pad"),
    pytest.param(streamed(snappy_chunk(bytes(65537)), 1 << 20), r"has 65537 bytes of RAM, from 1 to 65536", id="large"),
    pytest.param(SOUND[:LENGTH], r"length of the stream at 0x\w+: 8 bytes reach past the end", id="no length"),
    pytest.param(changed(LENGTH, b"\0"), r"length of the stream at 0x\w+: \d+ is not \d+, which", id="length"),
    pytest.param(avml([(0, A), (PAGE, B)]), r"range at 0x1000 begins before 0x5000", id="overlap"),
    pytest.param(
        avml([((1 << 64) - len(B) - 1, B)]), r"range 0 at 0x0: range of 0x3000 bytes at 0x\w+ ends past", id="wraps"
    ),
    pytest.param(changed(CHUNK + 4, b"\0"), r"chunk at 0x2a: cannot be decompressed: .*checksum", id="checksum"),
    pytest.param(changed(CHUNK + 11, b"\xff" * 4), r"chunk at 0x2a: cannot be decompressed", id="packed bytes"),
]


@pytest.mark.parametrize("more", [bytes(32), bytes(70_000), b"\1\2\3", b"\1" * 31], ids=len)
def test_bytes_behind_the_last_range_are_named(tmp_path: Path, more: bytes) -> None:
    (tmp_path / "web.avml").write_bytes(SOUND + more)
    report = vmconv.check(str(tmp_path / "web.avml"))
    assert report
    said = f"web.avml: {len(more)} bytes at {len(SOUND):#x} are behind the last range, and are not memory"
    assert report.doubts == (said,)


@pytest.mark.malformed
@pytest.mark.parametrize(("data", "message"), MALFORMED)
def test_a_malformed_image_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    target = tmp_path / "new.ram"
    with pytest.raises(ImageError, match=message) as caught:
        vmconv.convert(str(put(tmp_path, data)), str(target))
    assert str(caught.value).startswith("web.avml: ")
    assert "\n" not in str(caught.value)
    assert not target.exists()
