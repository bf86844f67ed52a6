"""Digests of the pieces of an export: compared when asked, and whatever is wrong with one is said."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import vmconv
from support.requirements import oracle_module, oracle_program
from support.xva_archives import DIGESTS, MIB, Digest, archive, config, no_digest, pieces, records, sha1, xxh64
from vmconv.errors import ImageError
from vmconv.testing import random_bytes
from vmconv_xva.checksums import SAMPLE

DISK = random_bytes(3 * MIB, 1) + bytes(MIB) + random_bytes(MIB - 512, 2)
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def export(files: list[tuple[str, bytes]]) -> bytes:
    return archive([("ova.xml", config(records({"Ref:12": DISK}))), *files])


def changed(digest: Digest, change: Callable[[bytes], bytes], number: int = 2) -> bytes:
    """Returns an export in which one digest is another one."""
    name = f"Ref:12/{number:08d}."
    files = pieces({"Ref:12": DISK}, digest=digest)
    return export([(each, change(data) if each.startswith(name) else data) for each, data in files])


def without(*numbers: int) -> bytes:
    """Returns an export without the digests of some pieces."""
    names = {f"Ref:12/{number:08d}.checksum" for number in numbers}
    return export([(name, data) for name, data in pieces({"Ref:12": DISK}) if name not in names])


def checked(path: Path, *, code: int = 0) -> list[dict[str, Any]]:
    """Returns the findings of `vmconv machine check --payload` on checksums."""
    command = [
        oracle_program("vmconv"),
        "machine",
        "check",
        "--no-filesystems",
        "--payload",
        "--output=json",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # The disk has no partitions, which alone is a warning.
    assert (done.returncode, done.stderr) == (code, "")
    return [one for one in json.loads(done.stdout) if one["path"] == "checksums"]


def test_the_digest_is_the_one_that_xxhash_publishes() -> None:
    # The value for no bytes, in the test vectors of xxHash.
    assert xxh64("Ref:1/00000000", b"") == [("Ref:1/00000000.xxhash", b"EF46DB3751D8E999")]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", DIGESTS)
def test_right_digests_are_counted(kind: str, suffix: str, tmp_path: Path) -> None:
    files = pieces({"Ref:12": DISK}, digest=DIGESTS[kind], keep_alive=2)
    (tmp_path / f"web.xva{suffix}").write_bytes(PACKED[suffix](export(files)))
    (found,) = checked(tmp_path / f"web.xva{suffix}")
    # Four with payload, and two that keep a connection open.
    assert (found["level"], found["text"]) == ("note", "6 pieces with the right checksum")


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "SHA-1": (lambda: changed(sha1, lambda _: b"0" * 40), "SHA-1 of Ref:12/00000002 at "),
    "XXH64": (lambda: changed(xxh64, lambda _: b"0" * 16), "XXH64 of Ref:12/00000002 at "),
    "no hexadecimal": (
        lambda: changed(sha1, lambda _: b"\x1b[31m" + b"g" * 35),
        "Ref:12/00000002.checksum is b'\\x1b[31m",
    ),
    "too short": (lambda: changed(sha1, lambda data: data[:-1]), "where SHA-1 has 40 hexadecimal digits"),
    "too long": (lambda: changed(xxh64, lambda data: data + b"0"), "where XXH64 has 16 hexadecimal digits"),
    "a line": (lambda: changed(sha1, lambda data: data + b"\n"), "where SHA-1 has 40 hexadecimal digits"),
    "empty": (lambda: changed(sha1, lambda _: b""), "is b'', where SHA-1 has 40"),
    "the largest": (lambda: changed(sha1, lambda _: b"a" * 128), "where SHA-1 has 40 hexadecimal digits"),
    "one missing": (lambda: without(2), "Ref:12/00000002 at "),
    "the first missing": (lambda: without(0), "Ref:12/00000000 at "),
    "two missing": (lambda: without(0, 4), "has no digest, and 1 more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_digest_is_found(name: str, tmp_path: Path) -> None:
    make, wanted = WRONG[name]
    (tmp_path / "web.xva").write_bytes(make())
    error, note = checked(tmp_path / "web.xva", code=1)
    assert (error["level"], note["level"]) == ("error", "note")
    assert wanted in error["text"]
    assert "\n" not in error["text"]
    count = 2 if name == "two missing" else 1
    assert note["text"] == f"{4 - count} pieces with the right checksum"


@pytest.mark.parametrize("mode", ["bytes", "sample"])
@pytest.mark.parametrize("name", WRONG)
def test_a_conversion_that_compares_payload_refuses_it(name: str, mode: Any, tmp_path: Path) -> None:
    make, wanted = WRONG[name]
    (tmp_path / "web.xva").write_bytes(make())
    with pytest.raises(ImageError) as error:
        vmconv.machine_convert(tmp_path / "web.xva", tmp_path / "new", target_format="libvirt", verify=mode)
    assert wanted in str(error.value)
    assert error.value.hint == "--verify=metadata converts it as it is"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", WRONG)
def test_a_compressed_export_is_compared_as_it_is_decoded(name: str, tmp_path: Path) -> None:
    make, wanted = WRONG[name]
    (tmp_path / "web.xva.gz").write_bytes(gzip.compress(make()))
    with pytest.raises(ImageError) as error:
        vmconv.machine_convert(tmp_path / "web.xva.gz", tmp_path / "new", target_format="libvirt")
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_metadata_are_verified_without_reading_payload(verify: bool, tmp_path: Path) -> None:
    (tmp_path / "web.xva").write_bytes(WRONG["SHA-1"][0]())
    vmconv.machine_convert(tmp_path / "web.xva", tmp_path / "new", target_format="libvirt", verify=verify)


def test_a_damaged_piece_is_found(tmp_path: Path) -> None:
    data = bytearray(export(pieces({"Ref:12": DISK})))
    data[data.index(DISK[:64]) + 5000] ^= 1
    (tmp_path / "web.xva").write_bytes(data)
    error, _ = checked(tmp_path / "web.xva", code=1)
    assert error["text"].startswith("SHA-1 of Ref:12/")
    with (tmp_path / "web.xva").open("rb") as file, pytest.raises(ValueError, match="Invalid checksum"):
        # dissect.archive 1.8 reads no piece behind a right digest either, but says another thing.
        oracle_module("dissect.archive.xva").XVA(file).open("Ref:12", verify=True).read()


@pytest.mark.parametrize("suffix", PACKED)
def test_old_exports_have_no_digests(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"web.xva{suffix}"
    path.write_bytes(PACKED[suffix](export(pieces({"Ref:12": DISK}, digest=no_digest))))
    (found,) = checked(path)
    assert (found["level"], found["text"]) == ("warning", "there are none of the disks")
    vmconv.machine_convert(path, tmp_path / "new", target_format="libvirt", verify="bytes")


def test_a_sample_reads_some_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmconv.io.opener import Opener
    from vmconv.io.registry import Registry
    from vmconv_xva import Xva

    disk = bytes(range(256)) * (300 * MIB // 256)
    (tmp_path / "web.xva").write_bytes(
        archive([("ova.xml", config(records({"Ref:12": disk}))), *pieces({"Ref:12": disk})])
    )
    with Opener(Registry()) as opener:
        file = opener.referring(str(tmp_path / "web.xva"))
        sizes: list[int] = []
        original = type(file).read

        def read(self: Any, offset: int, length: int) -> bytes:
            sizes.append(length)
            return original(self, offset, length)

        monkeypatch.setattr(type(file), "read", read)
        report = Xva().check_payload(file, sample=True)
    assert (report.allocated_clusters, report.total_clusters) == (SAMPLE, SAMPLE)
    assert sizes.count(MIB) == SAMPLE
