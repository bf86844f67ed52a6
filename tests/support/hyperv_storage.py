"""Makes HyperVStorage files, as Hyper-V's configurations are, from the published layout (openvmm, FORMAT.md)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PAGE = 4096
TABLES = 4 * PAGE
"""Where key tables begin."""
INLINE = 2048
"""Values from this size on lie in file objects."""


class Unsigned(int):
    """An integer that is stored as an unsigned one."""


class Twice(NamedTuple):
    """Two nodes or values of one name."""

    first: Any
    second: Any


def sealed(raw: bytes, at: int) -> bytes:
    """Returns a structure with its CRC-32 at an offset."""
    clean = raw[:at] + bytes(4) + raw[at + 4 :]
    return clean[:at] + struct.pack("<I", zlib.crc32(clean)) + clean[at + 4 :]


def storage(tree: Mapping[str, Any], *, sequences: tuple[int, int] = (5, 4), changes: int = 0) -> bytes:
    """Returns a file with this tree: mappings are nodes, other values are typed by their Python type.

    `sequences` are those of the two headers, `changes` the number of entries in the replay log.
    """
    maker = _Maker()
    for name, value in _pairs(tree):
        maker.add(name, value, (0, 0))
    tables = maker.finished()
    objects = [(2, len(table)) for table in tables] + [(3, len(blob)) for blob in maker.blobs]
    # Headers, object table, replay log, key tables, file objects.
    at = 4 * PAGE
    entries = b""
    for kind, size in objects:
        entries += sealed(struct.pack("<BIQIB", kind, 0, at, size, 1), 1)
        at += size
    entries += sealed(struct.pack("<BIQIB", 0, 0, 0, 0, 0), 1)
    table = struct.pack("<II", 0x01110001, len(objects) + 1) + entries
    assert len(table) <= PAGE
    log = sealed(struct.pack("<IIIBI", 0x01110003, 0, changes, 0, 145).ljust(34, b"\0"), 4)
    start = b"".join(header(sequence).ljust(PAGE, b"\0") for sequence in sequences)
    return b"".join([start, table.ljust(PAGE, b"\0"), log.ljust(PAGE, b"\0"), *tables, *maker.blobs])


def resealed(data: bytes) -> bytes:
    """Returns a storage with the checksums of its keys made right, as far as its keys can be followed."""
    for start in range(TABLES, len(data), PAGE):
        at = start + 10
        while at + 21 < start + PAGE:
            size = int.from_bytes(data[at + 2 : at + 6], "little")
            if not 21 <= size <= start + PAGE - at:
                break
            if data[at] != 1:
                data = data[:at] + sealed(data[at : at + size], 12) + data[at + size :]
            at += size
    return data


def header(sequence: int, version: int = 0x400) -> bytes:
    return sealed(struct.pack("<IIHIIIIQQI", 0x01282014, 0, sequence, version, 0, 0, PAGE, 3 * PAGE, PAGE, PAGE), 4)


def _pairs(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Twice):
            yield name, value.first
            yield name, value.second
        else:
            yield name, value


SCSI, ETHERNET = "d422512d-2bf2-4752-809d-7b82b5fcb1b4", "2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778"
BIOS = "ac6b8dc1-3257-4a70-b1b2-a9c9215659ad"


def configuration_beside(script: Path) -> Path:
    """Returns a configuration of generation 2 with the disks beside a script, made next to it."""
    disks = sorted(script.parent.glob("*.vhdx"))
    drives = {
        f"drive{number}": {"type": "VHD", "pathname": f"C:\\VMs\\{disk.name}"} for number, disk in enumerate(disks)
    }
    tree = {
        "properties": {"name": "web", "notes": "the shop", "subtype": 1, "version": 2304},
        "settings": {"memory": {"bank": {"size": 2048}}, "processors": {"count": 4}},
        "manifest": {
            f"vdev00{number}": {"device": kind, "instance": kind} for number, kind in enumerate((SCSI, ETHERNET))
        },
        f"_{SCSI}_": {"controller0": drives},
        f"_{ETHERNET}_": {"MacAddress": "00-50-56-01-02-03", "MacAddressIsStatic": True},
        f"_{BIOS}_": {"bios_guid": "{421F245C-7FA8-60FA-1122-334455667788}", "secure_boot_enabled": False},
    }
    path = script.with_suffix(".vmcx")
    path.write_bytes(storage({"configuration": tree}))
    return path


def seal(raw: bytearray) -> None:
    """Makes all checksums of a file right that lie where `storage` puts their structures."""
    places = [(0, 46, 4), (PAGE, 46, 4), (3 * PAGE, 34, 4)]
    places += [(2 * PAGE + 8 + 18 * number, 18, 1) for number in range(200)]
    for table in range(4 * PAGE, (4 + _TABLES) * PAGE, PAGE):
        places.append((table, 10, 6))
        at = table + 10
        while at + 21 <= min(table + PAGE, len(raw)):
            kind, flags, size, _, _, _, _, name = struct.unpack_from("<BBIHIIIB", raw, at)
            head = at + 21 + name
            length = 12 if flags & 1 else {3: 8, 4: 8, 5: 8, 8: 4, 9: 12}.get(kind)
            length = 4 + int.from_bytes(raw[head : head + 4], "little") if length is None else length
            if not 21 <= size <= table + PAGE - at:
                break
            places.append((at, 21 + name + min(length, PAGE), 12))
            at += size
    for at, length, checksum in places:
        if at + length <= len(raw):
            raw[at : at + length] = sealed(bytes(raw[at : at + length]), checksum)


class _Maker:
    def __init__(self) -> None:
        self._tables = [b""]
        self._next = 0
        self.blobs: list[bytes] = []

    def add(self, name: str, value: Any, parent: tuple[int, int]) -> None:
        kind, flags, data = self._typed(value)
        self._next += 1
        label = name.encode() + b"\0"
        size = 21 + len(label) + len(data)
        if 10 + len(self._tables[-1]) + size + 22 > PAGE:
            self._tables.append(b"")
        place = len(self._tables), 10 + len(self._tables[-1])
        head = struct.pack("<BBIHIIIB", kind, flags, size, *parent, 0, self._next, len(label))
        self._tables[-1] += sealed(head + label + data, 12)
        if kind == 9:
            for below, inner in _pairs(value):
                self.add(below, inner, place)

    def _typed(self, value: Any) -> tuple[int, int, bytes]:
        if isinstance(value, Mapping):
            return 9, 0, struct.pack("<QI", 0, len(value) + 1)
        if isinstance(value, bool):
            return 8, 0, struct.pack("<I", value)
        if isinstance(value, int):
            return (4 if isinstance(value, Unsigned) else 3), 0, struct.pack("<q", value)
        if isinstance(value, float):
            return 5, 0, struct.pack("<d", value)
        kind, data = (6, value.encode("utf-16-le")) if isinstance(value, str) else (7, bytes(value))
        if len(data) < INLINE:
            return kind, 0, struct.pack("<I", len(data)) + data
        self.blobs.append(data.ljust(-(-len(data) // PAGE) * PAGE, b"\0"))
        return kind, 1, struct.pack("<IQ", len(data), self._blob_offset(len(self.blobs) - 1))

    def _blob_offset(self, number: int) -> int:
        # Key tables lie before the file objects; a tree of a test has at most `_TABLES`.
        return (4 + _TABLES) * PAGE + sum(map(len, self.blobs[:number]))

    def finished(self) -> list[bytes]:
        """Returns the key tables, each filled up with a free entry; there are always `_TABLES` of them."""
        assert len(self._tables) <= _TABLES
        return [_filled(index, self._tables[index - 1 : index]) for index in range(1, _TABLES + 1)]


_TABLES = 6


def _filled(index: int, entries: list[bytes]) -> bytes:
    data = sealed(struct.pack("<HHHI", 2, index, 1, 0), 6) + b"".join(entries)
    return (data + struct.pack("<BBIHIIIB", 1, 0, PAGE - len(data), 0, 0, 0, 0, 0)).ljust(PAGE, b"\0")
