"""The conformance kit of EWF; ewfacquirestream makes the image."""

from __future__ import annotations

import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from support.requirements import oracle_program
from vmconv.testing import ReaderTests, Sample, patterned
from vmconv_ewf import Ewf

MIB = 1 << 20
SECTION = struct.Struct("<16sQQ")
DESCRIPTOR = 76


def acquire(disk: bytes, folder: Path, *options: str, name: str = "case") -> Path:
    """Makes `name`.E01, .E02, ... of a disk, with ewfacquirestream, and returns the first."""
    case = ("-C", "12/7", "-D", "a disk", "-E", "4", "-e", "J. Doe", "-N", "seized")
    command = [oracle_program("ewfacquirestream"), "-q", "-t", str(folder / name), *case, "-d", "sha1", *options]
    # It has no option for the time zone of the dates it writes.
    done = subprocess.run(command, input=disk, capture_output=True, check=False, env={"TZ": "UTC", "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr
    return next(path for path in (folder / f"{name}.E01", folder / f"{name}.e01") if path.exists())


def sections(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields type, start and end of each section of a segment file, as long as they are sound."""
    at = 13
    while at + DESCRIPTOR <= len(data):
        kind, following, _ = SECTION.unpack_from(data, at)
        end = following if at < following <= len(data) else at + DESCRIPTOR
        yield kind.rstrip(b"\0"), at, end
        if end != following:
            return
        at = end


@cache
def _made(options: str) -> Sample:
    disk = patterned(3 * MIB, [(0, 4096), (MIB, 70000), (3 * MIB - 8192, 8192)])
    with tempfile.TemporaryDirectory() as folder:
        data = acquire(disk.read(0, disk.size), Path(folder), *options.split()).read_bytes()
    places = [(0, 13)]
    for kind, start, end in sections(data):
        places.append((start, start + DESCRIPTOR if kind == b"sectors" else end))
    return Sample(data, places)


class EwfKit(ReaderTests):
    format = Ewf()
    variants = (
        {"ewfacquirestream": "-f encase6 -c fast"},
        {"ewfacquirestream": "-f encase5 -c none"},
        {"ewfacquirestream": "-f ftk -c best -b 512"},
    )

    def sound(self, variant: Mapping[str, str]) -> Sample:
        return _made(variant.get("ewfacquirestream", "-f encase6 -c fast"))

    def seal(self, data: bytearray) -> None:
        for kind, start, end in list(sections(bytes(data))):
            struct.pack_into("<I", data, start + DESCRIPTOR - 4, zlib.adler32(data[start : start + DESCRIPTOR - 4]))
            body = start + DESCRIPTOR
            if kind in (b"volume", b"data", b"hash", b"digest") and end - body >= 4:
                struct.pack_into("<I", data, end - 4, zlib.adler32(data[body : end - 4]))
            if kind in (b"table", b"table2") and end - body >= 28:
                struct.pack_into("<I", data, body + 20, zlib.adler32(data[body : body + 20]))
                (count,) = struct.unpack_from("<I", data, body)
                last = body + 24 + 4 * count
                if last + 4 <= end:
                    struct.pack_into("<I", data, last, zlib.adler32(data[body + 24 : last]))
