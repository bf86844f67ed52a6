"""Bad qcow2 images: each is refused in one line that says what is wrong and where, soon, and in little memory."""

from __future__ import annotations

import contextlib
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support import qcow2_images
from support.cost import cost
from support.disks import QemuImg
from support.qcow2_images import (
    BACKING_FORMAT,
    BITMAPS,
    CLUSTER,
    COMPRESSED,
    COPIED,
    DATA_FILE,
    ENCRYPTION,
    EXTENDED_L2,
    EXTERNAL_DATA,
    FEATURE_NAMES,
    L1_TABLE,
    L2_TABLE,
    PAYLOAD,
    ZSTD,
    compressed_entry,
    extension,
    feature_name,
    field_place,
    image,
)
from vmconv import api
from vmconv.cli.main import main
from vmconv.errors import ImageError, VmconvError
from vmconv.testing.malformed import MUCH_MEMORY, SOON, time_limit

DESCRIBE = """
import sys
from vmconv.cli.main import main
for path in sys.argv[1:]:
    for output in ("human", "json"):
        assert main(["info", path, "--output", output]) == 0, (path, output)
"""


def convert(path: str) -> object:
    target = f"{path}.target"
    try:
        return api.convert(path, target, source_format="qcow2", target_format="raw", force=True)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)


OPERATIONS: dict[str, Callable[[str], object]] = {
    "info": lambda path: api.info(path, format_name="qcow2"),
    "map": lambda path: api.map_disk(path, format_name="qcow2"),
    "check": lambda path: api.check(path, format_name="qcow2"),
    "convert": convert,
}


EDITS: dict[str, Callable[[str], object]] = {
    "snapshot": lambda path: api.snapshot(path, "create", "new", source_format="qcow2"),
    "bitmap": lambda path: api.bitmap(path, "new", ["add"], source_format="qcow2"),
    "rebase": lambda path: api.rebase(path, "", unsafe=True, source_format="qcow2"),
    "repair": lambda path: api.repair(path, source_format="qcow2"),
}


def outcome(operation: str, path: Path) -> VmconvError | None:
    """Runs an operation under the time limit and returns the error it refused the image with, if it did."""
    with time_limit():
        try:
            {**OPERATIONS, **EDITS}[operation](str(path))
        except VmconvError as exc:
            assert len(str(exc).splitlines()) == 1, str(exc)
            return exc
    return None


def all_outcomes(path: Path) -> None:
    """Runs all operations under the time limit; each reads the image, or refuses it with an error of ours."""
    for operation in OPERATIONS:
        outcome(operation, path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes an image and returns its path; a file that it may name as its backing or data file lies beside it."""
    (tmp_path / "base.raw").write_bytes(b"\x42" * CLUSTER)

    def make(data: bytes) -> Path:
        path = tmp_path / "disk.qcow2"
        path.write_bytes(data)
        return path

    return make


def test_the_image_that_all_others_differ_from_is_sound(write: Callable[[bytes], Path], qemu_img: QemuImg) -> None:
    path = write(image())
    assert outcome("convert", path) is None
    qemu_img("check", "-f", "qcow2", path)


# Headers: what each field must not say, and the words that tell the user

HUGE = 2**64 - 1
Case = tuple[bytes, str]


def fields(name: str, *values: int, said: str = "", **others: Any) -> Iterator[tuple[str, Case]]:
    """Yields a case for each bad value of a header field: the message names field, offset and value."""
    place, _ = field_place(name)
    for value in values:
        words = said or rf"{name} at {place:#x}: .*({value}|{value:#x})"
        yield f"{name}={value:#x}", (image(**dict[str, Any]({name: value}, **others)), words)


def truncated(name: str, length: int, words: str, data: bytes | None = None) -> tuple[str, Case]:
    return f"{name} cut off at {length:#x}", ((image() if data is None else data)[:length], words)


OVERLAY = image(backing="base.raw", extensions=extension(BACKING_FORMAT, b"raw"))
NAMES = extension(FEATURE_NAMES, feature_name(60, b"time travel"))


def headers() -> Iterator[tuple[str, Case]]:
    for length in (0, 1, 4, 8, 71):
        yield truncated("basic header", length, "header at 0x0: .*past the end")
    for length in (72, 103):
        yield truncated("version 3 header", length, "header at 0x48: .*past the end")
    for length in (104, 111):
        yield truncated("additional fields", length, "header at 0x68: .*past the end")
    yield truncated("backing file name", 112 + 16 + 8 + 4, "backing file name at 0x88: .*past the end", OVERLAY)
    yield "another magic", (image(magic=b"QFI\xfa"), "header at 0x0: no qcow2 signature")
    yield from fields("version", 0, 1, 4, 2**32 - 1)
    yield from fields("cluster_bits", 0, 8, 22, 63, 64, 2**32 - 1)
    yield from fields("size", 2**62 + 512, 2**63 - 1, 2**63, HUGE)
    yield from fields("backing_file_offset", 1, 71, CLUSTER, 2**63, HUGE, backing="base.raw")
    yield from fields("backing_file_size", 0, 1024, 2**31, 2**32 - 1, backing="base.raw")
    yield from fields("header_length", 0, 72, 103, CLUSTER + 8, 2**32 - 1)
    yield from fields("refcount_order", 7, 64, 2**32 - 1)
    yield from fields("nb_snapshots", 65537, 2**32 - 1)
    yield from fields("compression_type", 2, 9, 255, incompatible_features=ZSTD)
    for method, name in ((1, "AES"), (2, "LUKS"), (77, "77")):
        yield f"crypt_method={method}", (image(crypt_method=method), f"crypt_method at 0x20: .*{name}")
    words = "crypt_method at 0x20: .*encryption"
    yield "encryption header", (image(extensions=extension(ENCRYPTION, bytes(16))), words)
    for offset, length in ((0, 592), (CLUSTER + 1, 592), (CLUSTER, 2**40), (2**40, 592), (2**64 - CLUSTER, CLUSTER)):
        place = extension(ENCRYPTION, struct.pack(">QQ", offset, length))
        words = rf"crypt_method at 0x20: .*header of LUKS.*{offset:#x}"
        yield f"header of LUKS at {offset:#x}, {length}", (image(crypt_method=2, extensions=place), words)
    words = "header at 0x10000: has not the signature"
    place = extension(ENCRYPTION, struct.pack(">QQ", CLUSTER, 592))
    yield "header of LUKS that is none", (image(crypt_method=2, extensions=place), words)
    for bit in (5, 31, 63):
        words = rf"incompatible_features at 0x48: unknown bit {bit}$"
        yield f"unknown feature {bit}", (image(incompatible_features=1 << bit), words)
    words = r"incompatible_features at 0x48: unknown bit 60 \(time travel\)"
    yield "unknown feature with a name", (image(incompatible_features=1 << 60, extensions=NAMES), words)
    words = "incompatible_features at 0x48: .*data file"
    yield "data file without a name", (image(incompatible_features=EXTERNAL_DATA), words)
    words = "cluster_bits at 0x14: 12 .*extended"
    yield "extended L2 in small clusters", (image(cluster_bits=12, incompatible_features=EXTENDED_L2), words)


def extensions() -> Iterator[tuple[str, Case]]:
    place = 112
    for length in (CLUSTER, 2**31, 2**32 - 1):
        words = f"header extension 0x12345678 at {place:#x}: {length} bytes"
        yield f"extension of {length:#x} bytes", (image(extensions=extension(0x12345678, length=length)), words)
    many = extension(0x12345678) * 4000
    yield "thousands of extensions", (image(extensions=many), r"header extensions at 0x[0-9a-f]+: more than \d+")
    yield (
        "bitmaps extension too short",
        (
            image(extensions=extension(BITMAPS, bytes(8)), autoclear_features=1),
            "bitmaps extension.*8 bytes, 24 expected",
        ),
    )
    for count, size in ((2**32 - 1, 24), (1, HUGE)):
        data = struct.pack(">IIQQ", count, 0, size, PAYLOAD * CLUSTER)
        yield (
            f"{count} bitmaps in {size} bytes",
            (
                image(extensions=extension(BITMAPS, data), autoclear_features=1),
                f"bitmaps extension.*{count} bitmaps in {size} bytes",
            ),
        )
    for name in (b"\0", b"a\0b"):
        yield (
            f"data file {name!r}",
            (
                image(extensions=extension(DATA_FILE, name), incompatible_features=EXTERNAL_DATA),
                "data file",
            ),
        )


HEADERS = dict([*headers(), *extensions()])


@pytest.mark.malformed
@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_refused_with_field_offset_and_value(write: Callable[[bytes], Path], case: str) -> None:
    data, words = HEADERS[case]
    path = write(data)
    for operation in ("info", "convert"):
        error = outcome(operation, path)
        assert error is not None, operation
        assert re.search(rf"^disk\.qcow2: .*{words}", str(error)), (operation, str(error))


# Tables: what they must not say, found when the tables are read


def l2_image(*entries: int, **more: Any) -> bytes:
    return image(l2=entries, **more)


def extended(entry: int, bitmap: int) -> bytes:
    return l2_image(entry, bitmap, incompatible_features=EXTENDED_L2)


def two_tables(first: int, second: int) -> bytes:
    return image(l1=[first, second], l1_size=2, size=2 * CLUSTER * (CLUSTER // 8))


def packed(data: bytes, *, entry: int = compressed_entry(PAYLOAD * CLUSTER, 128), **more: Any) -> bytes:
    return l2_image(entry, payload=data.ljust(CLUSTER, b"\0"), **more)


def zstd(data: bytes) -> bytes:
    return packed(data, incompatible_features=ZSTD, compression_type=1)


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-12)
    return compressor.compress(data) + compressor.flush()


def zstd_frame(window_log: int) -> bytes:
    """Returns the head of a frame that wants this window, and a block of one repeated byte."""
    block = struct.pack("<I", CLUSTER << 3 | 1 << 1 | 1)[:3]
    return b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + block + b"\x5a"


L1_PLACE = L1_TABLE * CLUSTER
END = (PAYLOAD + 1) * CLUSTER
CLUSTER_DATA = bytes(range(256)) * (CLUSTER // 256)
NOISE = random.Random(0).randbytes(CLUSTER)


def l1_tables() -> Iterator[tuple[str, Case]]:
    for length in (L1_PLACE, L1_PLACE + 7):
        yield truncated("L1 table", length, f"l1_table_offset at 0x28: {L1_PLACE:#x} .*{length:#x}")
    for length in (L2_TABLE * CLUSTER, L2_TABLE * CLUSTER + CLUSTER - 1):
        words = f"L1 entry 0 at {L1_PLACE:#x}: L2 table at {L2_TABLE * CLUSTER:#x} .*{length:#x}"
        yield truncated("L2 table", length, words)
    for size in (2**40, 2**61, 2**62):
        yield f"size {size:#x}", (image(size=size), "(size at 0x18|l1_size at 0x24): ")
    yield from fields("l1_size", 0)
    yield from fields("l1_size", 1, size=2 * CLUSTER * (CLUSTER // 8))
    yield from fields("l1_size", 2**22 + 1, 2**31, 2**32 - 1)
    yield from fields("l1_table_offset", 512, L1_PLACE + 8, END, 2**63, HUGE)
    for entry, name in ((512, "misaligned"), (L2_TABLE * CLUSTER + 512, "misaligned"), (END, "past the end")):
        words = f"L1 entry 0 at {L1_PLACE:#x}: L2 table at {entry:#x} "
        yield f"L1 entry {entry:#x} {name}", (image(l1=[COPIED | entry]), words)
    far = 0x00FFFFFFFFFF0000
    yield "L1 entry at the largest offset", (image(l1=[far]), f"L1 entry 0 at {L1_PLACE:#x}: L2 table at {far:#x}")
    again = f"L1 entry 1 at {L1_PLACE + 8:#x}: L2 table at {L2_TABLE * CLUSTER:#x} is used twice"
    yield "L2 table used twice", (two_tables(L2_TABLE * CLUSTER, L2_TABLE * CLUSTER), again)
    yield "L1 table as L2 table", (image(l1=[L1_PLACE]), f"L1 entry 0 at {L1_PLACE:#x}: L2 table at {L1_PLACE:#x}")


def l2_tables() -> Iterator[tuple[str, Case]]:
    yield truncated("payload", PAYLOAD * CLUSTER, rf"L2 entry 0 of table 0 .*{PAYLOAD * CLUSTER:#x} lies past the end")
    for entry in (END, 0x00FFFFFFFFFF0000):
        words = rf"L2 entry 0 of table 0 .*{entry:#x} lies past the end of disk.qcow2 \({END:#x}\)"
        yield f"L2 entry {entry:#x} past the end", (l2_image(COPIED | entry), words)
    for entry in (512, PAYLOAD * CLUSTER + 512):
        words = f"L2 entry 0 of table 0 .*{entry:#x} is not aligned"
        yield f"L2 entry {entry:#x} misaligned", (l2_image(entry), words)
    words = rf"L2 entry 3 of table 0 \(guest address {3 * CLUSTER:#x}\): .*{END:#x}"
    yield "fourth L2 entry past the end", (l2_image(0, 0, 1, END), words)
    yield (
        "one cluster used many times",
        (
            l2_image(*[PAYLOAD * CLUSTER] * 16),
            "L2 tables: .*room for 6",
        ),
    )
    words = "L2 entry 1 of table 0 .*zero flag in a version 2 image"
    yield "zero flag in version 2", (l2_image(0, 1, version=2), words)
    for name, flags in (("compressed", COMPRESSED), ("compressed and zero", COMPRESSED | 1)):
        words = r"L2 entry 0 of table 0 .*compressed data.* lies past the end of the file"
        yield f"{name} past the end", (l2_image(flags | END), words)
    words = "L2 entry 0 of table 0 .*compressed cluster in an image with a data file"
    data_file = extension(DATA_FILE, b"base.raw")
    more = {"extensions": data_file, "incompatible_features": EXTERNAL_DATA}
    yield "compressed with a data file", (l2_image(compressed_entry(PAYLOAD * CLUSTER), **more), words)
    words = "L2 entry 0 of table 0 .*lies past the end of base.raw"
    yield "past the end of the data file", (l2_image(PAYLOAD * CLUSTER, **more), words)


def extended_l2_tables() -> Iterator[tuple[str, Case]]:
    here = PAYLOAD * CLUSTER
    contradiction = "L2 entry 0 of table 0 .*bitmap"
    yield "subcluster allocated and zero", (extended(here, 1 << 32 | 1), contradiction)
    yield "subcluster allocated nowhere", (extended(0, 1), contradiction)
    yield "compressed cluster with a bitmap", (extended(compressed_entry(here), 1), contradiction)
    yield "extended entry past the end", (extended(END, 1), f"L2 entry 0 of table 0 .*{END:#x} lies past the end")
    words = f"L2 entry 0 of table 0 .*{here + 512:#x} is not aligned"
    yield "extended entry misaligned", (extended(here + 512, 1), words)


def streams() -> Iterator[tuple[str, Case]]:
    words = f"compressed cluster at {PAYLOAD * CLUSTER:#x}: "
    yield "deflate stream of nonsense", (packed(b"\xff" * CLUSTER), words)
    one_sector = compressed_entry(PAYLOAD * CLUSTER, 1)
    yield "deflate stream cut off", (packed(deflated(NOISE)[:512], entry=one_sector), words)
    short = f"{words}yields {CLUSTER - 1} bytes, not {CLUSTER}"
    yield "deflate stream of too few bytes", (packed(deflated(CLUSTER_DATA[1:])), short)
    yield "zstd stream of nonsense", (zstd(b"\xff" * CLUSTER), words)
    yield "zstd stream cut off", (zstd(zstandard.compress(NOISE)[:100]), words)
    yield "zstd stream of too few bytes", (zstd(zstandard.compress(CLUSTER_DATA[1:])), short)
    for log in (31, 41):
        yield f"zstd stream with a window of 2**{log}", (zstd(zstd_frame(log)), words)


TABLES = dict([*l1_tables(), *l2_tables(), *extended_l2_tables(), *streams()])


@pytest.mark.malformed
@pytest.mark.parametrize("case", TABLES)
def test_a_bad_table_is_refused_with_entry_offset_and_value(write: Callable[[bytes], Path], case: str) -> None:
    data, words = TABLES[case]
    error = outcome("convert", write(data))
    assert isinstance(error, ImageError), error
    assert re.search(rf"^disk\.qcow2: {words}", str(error)), str(error)


def snapshot_entry(*, l1_offset: int = L1_PLACE, l1_size: int = 1, name: bytes = b"one", extra: int = 0) -> bytes:
    return struct.pack(">QIHHIIQII", l1_offset, l1_size, 1, len(name), 0, 0, 0, 0, extra) + b"1" + name


def snapshots(table: bytes, count: int = 1, offset: int = PAYLOAD * CLUSTER) -> bytes:
    return image(payload=table.ljust(CLUSTER, b"\0"), nb_snapshots=count, snapshots_offset=offset)


SNAPSHOTS: dict[str, Case] = {
    "past the end": (snapshots(b"", offset=END), f"snapshot 0 at {END:#x}: .*past the end"),
    "at the largest offset": (snapshots(b"", offset=HUGE), f"snapshot 0 at {HUGE:#x}: .*past the end"),
    "longer than the file": (snapshots(b"", 65536), r"snapshot \d+ at 0x[0-9a-f]+: .*past the end"),
    "too much extra data": (
        snapshots(snapshot_entry(extra=2**32 - 1)),
        f"snapshot 0 at {PAYLOAD * CLUSTER:#x}: {2**32 - 1} bytes of extra data",
    ),
    "name past the end": (
        snapshots(struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 0)),
        r"snapshot 0 at 0x[0-9a-f]+: .*past the end",
    ),
}


@pytest.mark.malformed
@pytest.mark.parametrize("case", SNAPSHOTS)
def test_a_bad_snapshot_table_is_found_by_the_check_and_hinders_nothing_else(
    write: Callable[[bytes], Path], case: str
) -> None:
    data, words = SNAPSHOTS[case]
    path = write(data)
    with time_limit():
        said = " ".join(api.info(str(path))["warnings"])
        assert re.search(rf"disk\.qcow2: {words}", said), said
        report = api.check(str(path))
        assert report is not None
        assert any(re.search(words, text) for text in report.corruptions), report
        assert api.convert(str(path), f"{path}.raw").target


@pytest.mark.malformed
@pytest.mark.parametrize(
    "table", [{"l1_offset": END}, {"l1_offset": 512}, {"l1_size": 0}, {"l1_size": 1 << 28}, {"l1_offset": HUGE}]
)
def test_a_snapshot_with_a_bad_l1_table_cannot_be_converted(
    write: Callable[[bytes], Path], table: dict[str, Any]
) -> None:
    path = write(snapshots(snapshot_entry(**table)))
    with time_limit(), pytest.raises(ImageError, match=r"^disk\.qcow2: .*(L1|l1_)"):
        api.convert(str(path), f"{path}.raw", snapshot="one")


@pytest.mark.malformed
@pytest.mark.parametrize("size", [2**62 + 512, 2**63, HUGE, 2**61])
def test_a_snapshot_of_an_absurd_disk_size_cannot_be_converted(write: Callable[[bytes], Path], size: int) -> None:
    entry = struct.pack(">QIHHIIQII", L1_PLACE, 1, 1, 3, 0, 0, 0, 0, 16) + struct.pack(">QQ", 0, size) + b"1one"
    path = write(snapshots(entry))
    with time_limit(), pytest.raises(ImageError, match=r"^disk\.qcow2: .*size"):
        api.convert(str(path), f"{path}.raw", snapshot="one")


# Whatever is wrong, no operation fails in another way

BAD = {name: data for cases in (HEADERS, TABLES, SNAPSHOTS) for name, (data, _) in cases.items()}
BAD |= {
    "compression type without its feature": image(compression_type=1),
    "compression feature without its type": image(incompatible_features=ZSTD),
    "payload in the header": l2_image(COPIED | 1 << 9),
    "payload in the L1 table": l2_image(COPIED | L1_PLACE),
    "refcount table past the end": image(refcount_table_offset=END),
    "refcount table misaligned": image(refcount_table_offset=CLUSTER + 8),
    "refcount table at the largest offset": image(refcount_table_offset=HUGE),
    "refcount table of absurd length": image(refcount_table_clusters=2**32 - 1),
    "no refcount table": image(refcount_table_offset=0, refcount_table_clusters=0),
    "backing file name that is not text": image(l2=[0], backing=b"\xff\xfe.raw"),
    "backing file name of two lines": image(l2=[0], backing=b"a\nb.raw"),
    "backing format that is not text": image(backing="base.raw", extensions=extension(BACKING_FORMAT, b"\xff\xfe")),
    "backing format of two lines": image(backing="base.raw", extensions=extension(BACKING_FORMAT, b"raw\nraw")),
    "data file name that is not text": image(
        extensions=extension(DATA_FILE, b"\xff\xfe"), incompatible_features=EXTERNAL_DATA
    ),
    "snapshot name that is not text": snapshots(snapshot_entry(name=b"\xff\xfe")),
    "feature name of two lines": image(
        incompatible_features=1 << 60, extensions=extension(FEATURE_NAMES, feature_name(60, b"new\nline"))
    ),
    "feature name that is not text": image(
        incompatible_features=1 << 60, extensions=extension(FEATURE_NAMES, feature_name(60, b"\xff\xfe"))
    ),
    "table of feature names cut off": image(
        incompatible_features=1 << 60, extensions=extension(FEATURE_NAMES, feature_name(60, b"name")[:20])
    ),
    "disk of no bytes": image(size=0),
    "disk of no bytes without an L1 table": image(size=0, l1_size=0, l1_table_offset=0),
    "disk of one byte": image(size=1),
    "disk that ends inside a cluster": image(size=16 * CLUSTER - 1),
}


@pytest.mark.malformed
@pytest.mark.parametrize("case", BAD)
def test_no_operation_fails_but_with_an_error_of_ours(write: Callable[[bytes], Path], case: str) -> None:
    all_outcomes(write(BAD[case]))


UNPRINTABLE = ["backing file name that is not text", "backing file name of two lines", "snapshot name that is not text"]


@pytest.mark.malformed
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_text_that_cannot_be_printed_is_no_traceback(write: Callable[[bytes], Path], locale: str) -> None:
    paths = []
    for name in UNPRINTABLE:
        path = write(BAD[name])
        paths.append(str(path.rename(path.with_stem(name))))
    environment = {**os.environ, "LC_ALL": locale}
    command = [sys.executable, "-c", DESCRIBE, *paths]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=600)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.malformed
def test_a_name_of_the_image_s_cannot_forge_lines_of_our_output(
    write: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(write(image(l2=[0], backing=b"a\nwarning: forged\x1b[2J")))]) == 0
    said = capsys.readouterr().out
    assert "forged" in said
    assert "\x1b" not in said
    assert "\nwarning: forged" not in said


@pytest.mark.malformed
@pytest.mark.parametrize("names", [b"new\nline", b"clear\x1b[2Jscreen"])
def test_a_name_of_a_feature_cannot_forge_lines_of_our_errors(write: Callable[[bytes], Path], names: bytes) -> None:
    table = extension(FEATURE_NAMES, feature_name(60, names))
    error = outcome("info", write(image(incompatible_features=1 << 60, extensions=table)))
    assert str(error).isprintable()


# What is unusual, but sound: strictness must not refuse it


def test_a_last_cluster_that_the_file_does_not_hold_in_full_is_read(write: Callable[[bytes], Path]) -> None:
    path = write(image()[: PAYLOAD * CLUSTER + 512])
    assert outcome("convert", path) is None


@pytest.mark.parametrize("feature", [qcow2_images.DIRTY, qcow2_images.CORRUPT])
def test_an_image_marked_unclean_is_read(write: Callable[[bytes], Path], feature: int) -> None:
    assert outcome("convert", write(image(incompatible_features=feature))) is None


def test_unknown_compatible_and_autoclear_features_are_ignored(write: Callable[[bytes], Path]) -> None:
    assert outcome("convert", write(image(compatible_features=HUGE - 1, autoclear_features=1 << 63))) is None


def test_compressed_data_may_end_past_the_end_of_the_file(write: Callable[[bytes], Path]) -> None:
    data = deflated(CLUSTER_DATA)
    path = write(packed(data)[: PAYLOAD * CLUSTER + len(data)])
    assert outcome("convert", path) is None


def test_a_zstd_frame_followed_by_padding_is_read(write: Callable[[bytes], Path]) -> None:
    assert outcome("convert", write(zstd(zstandard.compress(CLUSTER_DATA)))) is None


def test_a_table_right_behind_the_header_is_read(write: Callable[[bytes], Path], qemu_img: QemuImg) -> None:
    """Its offset is the length of a table, as the distance from the table before it, which is missing."""
    cluster, entries = 512, 64
    tables = {"l1": [0, COPIED | cluster], "l1_size": 2, "l2": [0], "refcount_table_offset": L2_TABLE * cluster}
    data = bytearray(
        image(cluster_bits=9, size=2 * entries * cluster, payload=b"\x5a" * cluster, **tables)  # type: ignore[arg-type]
    )
    data[cluster : 2 * cluster] = struct.pack(">Q", COPIED | PAYLOAD * cluster).ljust(cluster, b"\0")
    path = write(bytes(data))
    target = path.with_suffix(".target")
    api.convert(str(path), str(target), target_format="raw")
    assert target.read_bytes() == bytes(entries * cluster) + b"\x5a" * cluster + bytes((entries - 1) * cluster)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, target)
    assert target.read_bytes() == bytes(entries * cluster) + b"\x5a" * cluster + bytes((entries - 1) * cluster)


# Absurd numbers, and how much memory and time they cost


def sparse_tables(path: Path, tables: npt.NDArray[np.int64]) -> None:
    """Makes a file of 1 TiB in which nothing is stored but an L1 table that names these clusters, all in holes."""
    place = 512 * CLUSTER
    size = len(tables) * CLUSTER * (CLUSTER // 8)
    with path.open("wb") as file:
        file.write(image(l1=[], l1_size=len(tables), l1_table_offset=place, size=size, payload=b""))
        file.seek(place)
        file.write((tables * CLUSTER).astype(">u8").tobytes())
        file.truncate(1 << 40)


FOUR_MILLION = np.arange(1024, 1024 + (32 << 20) // 8, dtype=np.int64)


def tables_in_order(path: Path) -> None:
    sparse_tables(path, FOUR_MILLION)


def tables_in_disorder(path: Path) -> None:
    sparse_tables(path, np.random.default_rng(1).permutation(FOUR_MILLION))


def every_other_table(path: Path) -> None:
    sparse_tables(path, np.where(FOUR_MILLION % 2, FOUR_MILLION, 0))


def snapshots_in_holes(path: Path) -> None:
    """8192 snapshots whose names are a hole of the file each: 1 GiB of names."""
    count = 8192
    entry = struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 0)
    with path.open("wb") as file:
        file.write(image(nb_snapshots=count, snapshots_offset=CLUSTER * 8))
        for number in range(count):
            file.seek(CLUSTER * 8 + number * -(-(len(entry) + 2 * 65535) // 8) * 8)
            file.write(entry)
        file.truncate(2 << 30)


def many_extensions(path: Path) -> None:
    path.write_bytes(image(cluster_bits=21, extensions=extension(0x12345678) * 200_000))


def one_compressed_cluster_many_times(path: Path) -> None:
    """2 MiB of zeros in 2 KiB, as each of 262144 guest clusters: a disk of 512 GiB."""
    cluster_bits = 21
    cluster = 1 << cluster_bits
    data = deflated(bytes(cluster))
    entry = compressed_entry(PAYLOAD * cluster, 8, cluster_bits)
    count = cluster // 8
    path.write_bytes(image(cluster_bits=cluster_bits, l2=[entry] * count, payload=data, size=count * cluster))


def zstd_bomb(path: Path) -> None:
    path.write_bytes(zstd(zstandard.compress(bytes(256 << 20))))


def huge_refcount_table(path: Path) -> None:
    path.write_bytes(image(refcount_table_clusters=2**32 - 1))
    os.truncate(path, 1 << 40)


def huge_bitmap_directory(path: Path) -> None:
    data = struct.pack(">IIQQ", 65535, 0, 65535 * 1024, 8 * CLUSTER)
    path.write_bytes(image(extensions=extension(BITMAPS, data), autoclear_features=1))
    os.truncate(path, 1 << 40)


def largest_disk(path: Path) -> None:
    """A disk of 2 EiB in clusters of 2 MiB, of which nothing is allocated."""
    count = (32 << 20) // 8
    with path.open("wb") as file:
        file.write(image(cluster_bits=21, size=1 << 61, l1=[], l1_size=count, l2=[], payload=b""))
        file.truncate(1 << 40)


ABSURD = {
    make.__name__: make
    for make in (
        tables_in_order,
        tables_in_disorder,
        every_other_table,
        snapshots_in_holes,
        many_extensions,
        one_compressed_cluster_many_times,
        zstd_bomb,
        huge_refcount_table,
        huge_bitmap_directory,
        largest_disk,
    )
}


@pytest.mark.malformed
@pytest.mark.parametrize("case", ABSURD)
def test_absurd_numbers_cost_little_memory_and_time(tmp_path: Path, case: str) -> None:
    path = tmp_path / "disk.qcow2"
    ABSURD[case](path)
    # Millions of tables without counts are repaired, which takes as long as it must.
    for operation in (*OPERATIONS, *(EDITS if "table" not in case else EDITS.keys() - {"repair"})):
        with cost() as spent:
            outcome(operation, path)
        assert spent.seconds < 2 * SOON, operation
        assert spent.memory < MUCH_MEMORY, operation


# Mutations of images that QEMU made


def plain(qemu_img: QemuImg, path: Path, *options: str) -> None:
    """A disk of 1 MiB with a few clusters of 0x5a: all other bytes of the file that are not zero are metadata."""
    raw = path.with_suffix(".raw")
    data = bytearray(1 << 20)
    data[0:8192] = data[100_000:120_000] = b"\x5a" * 8192
    raw.write_bytes(data)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)


def with_backing(qemu_img: QemuImg, path: Path) -> None:
    plain(qemu_img, path.with_name("parent.qcow2"), "-o", "cluster_size=4096")
    qemu_img("create", "-f", "qcow2", "-b", "parent.qcow2", "-F", "qcow2", "-o", "cluster_size=4096", path)


def with_snapshots(qemu_img: QemuImg, path: Path) -> None:
    plain(qemu_img, path, "-o", "cluster_size=4096")
    qemu_img("snapshot", "-c", "first", path)
    qemu_img("snapshot", "-c", "second", path)


MADE_BY_QEMU: dict[str, Callable[[QemuImg, Path], None]] = {
    "default": plain,
    "small clusters": lambda qemu_img, path: plain(qemu_img, path, "-o", "cluster_size=512"),
    "zlib": lambda qemu_img, path: plain(qemu_img, path, "-c", "-o", "cluster_size=4096"),
    "zstd": lambda qemu_img, path: plain(qemu_img, path, "-c", "-o", "cluster_size=4096,compression_type=zstd"),
    "extended L2": lambda qemu_img, path: plain(qemu_img, path, "-o", "cluster_size=16384,extended_l2=on"),
    "version 2": lambda qemu_img, path: plain(qemu_img, path, "-o", "cluster_size=4096,compat=0.10"),
    "data file": lambda qemu_img, path: plain(qemu_img, path, "-o", "cluster_size=4096,data_file=disk.data"),
    "backing file": with_backing,
    "snapshots": with_snapshots,
}
MUTATIONS = 15
HEADER_BYTES = 600


def mutated(data: bytes, metadata: list[int], chance: random.Random) -> bytes:
    """Returns the image with one to four bits flipped, in its header or at the places of metadata."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(min(HEADER_BYTES, len(data))) if chance.random() < 0.4 else chance.choice(metadata)
        result[place] ^= 1 << chance.randrange(8)
    return bytes(result)


@pytest.mark.malformed
@pytest.mark.parametrize("kind", MADE_BY_QEMU)
def test_flipped_bits_are_refused_or_read(
    tmp_path: Path, qemu_img: QemuImg, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # QEMU looks for a data file in the working directory; an absolute name would make the mutations depend on it.
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.qcow2"
    MADE_BY_QEMU[kind](qemu_img, path)
    sound = path.read_bytes()
    metadata = [place for place, byte in enumerate(sound) if byte not in (0, 0x5A)]
    for operation in OPERATIONS:
        path.write_bytes(sound)
        assert outcome(operation, path) is None
        chance = random.Random(f"{kind} {operation}")
        for _ in range(MUTATIONS):
            path.write_bytes(mutated(sound, metadata, chance))
            outcome(operation, path)


# Arbitrary bytes

ANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
interesting = st.sampled_from([0, 1, 8, 9, 511, 512, 513, CLUSTER, END, 2**31 - 1, 2**31, 2**32 - 1])
number32 = st.one_of(interesting, st.integers(0, 2**32 - 1))
number64 = st.one_of(interesting, st.sampled_from([2**62, 2**63 - 1, 2**63, HUGE]), st.integers(0, HUGE))


@pytest.mark.malformed
@ANY
@given(version=st.integers(2, 3), rest=st.binary(max_size=2048))
@example(version=3, rest=b"")
@example(version=2, rest=b"\xff" * 2048)
def test_any_bytes_after_the_magic_are_refused_or_read(
    write: Callable[[bytes], Path], version: int, rest: bytes
) -> None:
    all_outcomes(write(b"QFI\xfb" + struct.pack(">I", version) + rest))


@pytest.mark.malformed
@ANY
@given(
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "version": st.integers(2, 3),
            "backing_file_offset": number64,
            "backing_file_size": number32,
            "cluster_bits": st.one_of(st.integers(8, 22), number32),
            "size": number64,
            "l1_size": number32,
            "l1_table_offset": number64,
            "refcount_table_offset": number64,
            "refcount_table_clusters": number32,
            "nb_snapshots": number32,
            "snapshots_offset": number64,
            "incompatible_features": st.one_of(st.integers(0, 31), number64),
            "autoclear_features": st.integers(0, 3),
            "refcount_order": st.one_of(st.integers(0, 7), number32),
            "header_length": st.one_of(st.integers(96, 120), number32),
            "compression_type": st.integers(0, 2),
        },
    )
)
def test_any_numbers_in_the_header_are_refused_or_read(write: Callable[[bytes], Path], numbers: dict[str, Any]) -> None:
    all_outcomes(write(image(**numbers)))


@pytest.mark.malformed
@ANY
@given(
    l1=st.lists(number64, max_size=4),
    l2=st.lists(number64, max_size=16),
    features=st.sampled_from([0, ZSTD, EXTENDED_L2]),
)
def test_any_entries_of_tables_are_refused_or_read(
    write: Callable[[bytes], Path], l1: list[int], l2: list[int], features: int
) -> None:
    first = [COPIED | L2_TABLE * CLUSTER]
    kind = int(features == ZSTD)
    data = image(l1=first + l1, l2=l2, incompatible_features=features, compression_type=kind, l1_size=5)
    all_outcomes(write(data))
