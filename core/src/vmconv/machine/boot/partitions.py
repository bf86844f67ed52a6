"""Partition tables of a guest's disk: MBR with logical partitions, and GPT (UEFI 2.10, 5)."""

from __future__ import annotations

import binascii
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import UUID

if TYPE_CHECKING:
    from vmconv.model.extents import Extents

ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
BIOS_BOOT = UUID("21686148-6449-6e6f-744e-656564454649")
_PROTECTIVE, _EXTENDED, _MBR_ESP = 0xEE, (0x05, 0x0F, 0x85), 0xEF

MAX_PARTITIONS = 256
_FIRST_LOGICAL = 5
_SECTORS = (512, 4096)


class Partition(NamedTuple):
    """A partition: bytes of its start and its length. `kind` is the GPT type, or None with an MBR.

    `number` is that of Linux: the place in the table from 1 on; logical partitions of an MBR have those from 5 on.
    """

    number: int
    start: int
    length: int
    kind: UUID | None
    is_esp: bool
    is_active: bool


class Table(NamedTuple):
    """A partition table. `has_boot_code`: the first sector has code that a BIOS would run.

    `problem` says what is wrong with the table.
    """

    scheme: Literal["mbr", "gpt", "none"]
    partitions: tuple[Partition, ...]
    has_boot_code: bool
    problem: str | None = None

    @property
    def has_esp(self) -> bool:
        return any(partition.is_esp for partition in self.partitions)


def read(disk: Extents) -> Table:
    """Returns the partition table of a disk; the scheme is "none" if it has neither."""
    first = _at(disk, 0, 512)
    if first[510:] != b"\x55\xaa":
        return Table("none", (), has_boot_code=False)
    has_code = any(first[:440])
    entries = [_Entry.of(first, number) for number in range(4)]
    if any(entry.kind == _PROTECTIVE for entry in entries):
        table = _gpt(disk, has_boot_code=has_code)
    else:
        found, problem = _mbr_partitions(disk, entries)
        table = Table("mbr", tuple(found), has_code, problem)
    return table._replace(problem=table.problem or _misplaced(table.partitions, disk.size))


def _misplaced(partitions: Sequence[Partition], size: int) -> str | None:
    """Returns what is wrong with the places of partitions on a disk of `size` bytes."""
    for one in partitions:
        if one.start <= 0 or one.length <= 0 or one.start + one.length > size:
            said = f"its partition {one.number} at {one.start:#x} with {one.length} bytes"
            return f"{said} is not inside the disk of {size} bytes"
    ordered = sorted(partitions, key=lambda one: one.start)
    for one, following in pairwise(ordered):
        if one.start + one.length > following.start:
            return f"its partitions {one.number} and {following.number} overlap at {following.start:#x}"
    return None


def _at(disk: Extents, offset: int, length: int) -> bytes:
    """Returns bytes of the disk, with zeros for what lies past its end."""
    inside = max(0, min(length, disk.size - offset))
    return (disk.read(offset, inside) if inside else b"").ljust(length, b"\0")


class _Entry(NamedTuple):
    """An entry of an MBR; `start` and `sectors` are in units of 512 bytes."""

    active: bool
    kind: int
    start: int
    sectors: int

    @classmethod
    def of(cls, sector: bytes, number: int) -> _Entry:
        flag, kind, start, sectors = struct.unpack_from("<B3xB3xII", sector, 446 + 16 * number)
        return cls(flag == 0x80, kind, start, sectors)


def _mbr_partitions(disk: Extents, entries: list[_Entry]) -> tuple[list[Partition], str | None]:
    """Returns the partitions of an MBR, and what is wrong with the chain of logical ones."""
    found, problem = list[Partition](), None
    for number, entry in enumerate(entries, 1):
        if entry.kind in _EXTENDED:
            logical, said = _logical(disk, entry, sum(one.number >= _FIRST_LOGICAL for one in found))
            found, problem = found + logical, problem or said
        elif entry.kind and entry.sectors:
            found.append(_partition(entry, 0, number))
    return found, problem


def _partition(entry: _Entry, base: int, number: int) -> Partition:
    start, length = (base + entry.start) * 512, entry.sectors * 512
    return Partition(number, start, length, None, is_esp=entry.kind == _MBR_ESP, is_active=entry.active)


def _logical(disk: Extents, extended: _Entry, count: int) -> tuple[list[Partition], str | None]:
    """Returns the logical partitions of an extended one, and what is wrong with their chain; `count` are known."""
    found, seen = list[Partition](), set[int]()
    at = extended.start
    while len(seen) < MAX_PARTITIONS:
        if at in seen:
            return found, f"its chain of logical partitions leads back to sector {at}"
        seen.add(at)
        sector = _at(disk, at * 512, 512)
        if sector[510:] != b"\x55\xaa":
            return found, None
        own, following = _Entry.of(sector, 0), _Entry.of(sector, 1)
        if own.kind and own.sectors:
            found.append(_partition(own, at, _FIRST_LOGICAL + count + len(found)))
            if (
                not extended.start
                <= at + own.start
                <= at + own.start + own.sectors
                <= extended.start + extended.sectors
            ):
                return found, f"its logical partition {found[-1].number} is not inside the extended one"
        if following.kind not in _EXTENDED:
            return found, None
        at = extended.start + following.start
    return found, f"it has more than {MAX_PARTITIONS} logical partitions"


def _gpt(disk: Extents, *, has_boot_code: bool) -> Table:
    for size in _SECTORS:
        header = _at(disk, size, 92)
        if header[:8] == b"EFI PART":
            return _gpt_table(disk, header, size, has_boot_code=has_boot_code)
    return Table("gpt", (), has_boot_code, "its GPT is missing: the first sector only protects one")


def _gpt_table(disk: Extents, header: bytes, sector: int, *, has_boot_code: bool) -> Table:
    length, crc = struct.unpack_from("<II", header, 12)
    begin, count, size, entries_crc = struct.unpack_from("<QIII", header, 72)
    if length != len(header) or binascii.crc32(header[:16] + bytes(4) + header[20:]) != crc:
        return Table("gpt", (), has_boot_code, "the checksum of its GPT header is wrong")
    if size != 128 or count > MAX_PARTITIONS:
        return Table("gpt", (), has_boot_code, f"its GPT has {count} entries of {size} bytes")
    entries = _at(disk, begin * sector, count * size)
    if binascii.crc32(entries) != entries_crc:
        return Table("gpt", (), has_boot_code, "the checksum of its GPT entries is wrong")
    return Table("gpt", tuple(_gpt_partitions(entries, sector)), has_boot_code)


def _gpt_partitions(entries: bytes, sector: int) -> Iterator[Partition]:
    for number, (kind, first, last) in enumerate(struct.iter_unpack("<16s16xQQ80x", entries), 1):
        if any(kind):
            found = UUID(bytes_le=kind)
            start, length = first * sector, (last - first + 1) * sector
            yield Partition(number, start, length, found, found == ESP, is_active=False)
