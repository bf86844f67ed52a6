"""OVA packages: an OVF descriptor and its files in one tar archive.

A new package is laid out so that each disk begins at a multiple of the target's block size:

    +--------+-------------------+--------+-------+--------+------------------+--------+---------- - -
    | header | descriptor, white | header | NVRAM | header | disk 1, zeros    | header | disk 2
    |        | space at its end  |        |       |        | behind its end   |        |
    +--------+-------------------+--------+-------+--------+------------------+--------+---------- - -
    0        512                                           n * modulus                 m * modulus

A header has 512 bytes, so a disk that another follows ends 512 bytes before a multiple. Readers of sparse VMDK do not
look behind its last grain. VirtualBox 7.2 refuses pax headers that would do the same.
"""

from __future__ import annotations

import hashlib
import posixpath
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from vmconv.plugin import Blob, Columns, Extents, ImageError, Kind, PlanError
from vmconv_ovf.names import decoded
from vmconv_ovf.tar import BLOCK, Header, headers, members

if TYPE_CHECKING:
    from vmconv.machine import Disk, Machine, Removable
    from vmconv.plugin import ConfigFile, File, Image, Manifest, Member
    from vmconv_ovf.options import PackageOptions

Named = TypeVar("Named", "Disk", "Removable")

_ALIGNMENT = 4096
"""Smallest multiple at which disks begin: block sizes of common filesystems."""

_END = 2 * BLOCK
_OCTAL_LIMIT = 8**11
_CHUNK = 4 << 20
_COMPRESSED = 1 << 16
"""Flag of a sparse extent's header; VMware, "Virtual Disk Format 5.0"."""


def read(file: File) -> Machine:
    """Returns the machine of a package. Raises `ImageError` if it refers to files that the package lacks."""
    from vmconv_ovf.reader import read as read_descriptor

    descriptor = _descriptor(file)
    machine = read_descriptor(file, file.read(descriptor.start, descriptor.size))
    sizes = {member.name: member.table.size for member in members(file)}
    return _Names(file, descriptor, sizes, {decoded(name): name for name in sizes}).resolved(machine)


def _descriptor(file: File) -> Header:
    """Returns the only descriptor of a package, which is not larger than a configuration may be."""
    from vmconv.machine import MAX_CONFIG

    found = [header for header in headers(file) if not header.is_directory and header.name.lower().endswith(".ovf")]
    if len(found) != 1:
        names = ", ".join(repr(header.name) for header in found[:8]) or "none"
        raise ImageError(f"{file.name}: a package has one member that ends in .ovf, this one has {names}")
    name, _, start, size, _ = found[0]
    if size > MAX_CONFIG:
        raise ImageError(f"{file.name}: {name} at {start:#x} has {size} bytes, the limit is {MAX_CONFIG}")
    return found[0]


def manifest(file: File) -> Manifest | None:
    """Returns the digests of the members. Raises `ImageError` if the descriptor has another one."""
    from vmconv_ovf.manifest import inside

    descriptor = _descriptor(file)
    return inside(file.name, members(file), descriptor.name, file.read(descriptor.start, descriptor.size))


class _Names(NamedTuple):
    """The members of a package and their sizes, for references from its descriptor."""

    file: File
    descriptor: Header
    sizes: dict[str, int]
    encoded: dict[str, str]
    """Names by what they stand for if they are encoded, as VirtualBox reads and writes them."""

    def of(self, reference: str) -> str:
        name = posixpath.normpath(posixpath.join(posixpath.dirname(self.descriptor.name), reference))
        found = name if name in self.sizes else self.encoded.get(name)
        if found is None:
            raise ImageError(f"{self.file.name}: the descriptor refers to {reference!r}, which is not in the package")
        return found

    def resolved(self, machine: Machine) -> Machine:
        """Returns the machine with names of members in place of references."""
        nvram = machine.firmware.nvram
        nvram = nvram and nvram.model_copy(update={"file": self.of(nvram.file)})
        changes = {
            "disks": tuple(self._disk(each) for each in machine.disks),
            "removables": tuple(_named(each, each.file and self.of(each.file)) for each in machine.removables),
            "firmware": machine.firmware.model_copy(update={"nvram": nvram}),
        }
        return machine.model_copy(update=changes)

    def _disk(self, disk: Disk) -> Disk:
        if disk.file is None:
            return disk
        name = self.of(disk.file)
        if disk.file_size not in (None, self.sizes[name]):
            raise ImageError(
                f"{self.file.name}: the descriptor has {disk.file_size} bytes for {disk.file!r}, "
                f"and the member has {self.sizes[name]}"
            )
        return _named(disk, name)


def _named(device: Named, name: str | None) -> Named:
    return device.model_copy(update={"file": name})


# -- writing


class _Part(NamedTuple):
    """A member and the bytes of zeros behind it that count as its content."""

    name: str
    table: Extents
    slack: int = 0
    digest: str | None = None
    """The SHA256 of the content, if it is known."""


def pack(configs: Sequence[ConfigFile], disks: Sequence[Member], modulus: int, options: PackageOptions) -> Extents:
    """Returns the table of a package: the last of `configs` first, as its descriptor, then other files and disks.

    Disks begin at multiples of `modulus`, but for streamOptimized ones, whose readers look for the end marker at the
    end of the file. The first of those begins where it can share the blocks of the package that it comes from.
    """
    *others, last = configs
    name, content = f"{posixpath.splitext(last.name)[0]}.ovf", last.content
    small = [_Part(each.name, Extents.whole(Blob(each.name, each.content))) for each in others]
    large = [_Part(each.name, each.table, digest=_sha256(each)) for each in disks]
    _refuse_other_disks(large, options)
    step = max(modulus, _ALIGNMENT)
    if large:
        before = BLOCK + sum(BLOCK + _padded(each.table.size) for each in small) + BLOCK
        phase = 0 if options.disk_format == "sparse" else _phase(large[0].table, step)
        content += b"\n" * ((phase - before - len(content)) % step)
    if large and options.disk_format == "sparse":
        large = [*(each._replace(slack=-(each.table.size + BLOCK) % step) for each in large[:-1]), large[-1]]
    parts = [_Part(name, Extents.whole(Blob(name, content))), *small, *large]
    if options.manifest == "sha256":
        parts.append(_manifest(name, tuple(parts)))
    _refuse_names(parts)
    return _joined(parts)


def digested(disks: Sequence[Member], options: PackageOptions) -> int:
    """Returns the bytes that are read for the manifest of a package, zeros aside."""
    if options.manifest == "none":
        return 0
    read = (each.table for each in disks if _sha256(each) is None)
    return sum(int(table.length[table.kind == Kind.DATA].sum()) for table in read)


def keeps(image: Image, options: PackageOptions) -> bool:
    """True for an image that is in one streamOptimized file, as a package for such disks has it."""
    data = image.details.get("format-specific", {}).get("data", {})
    one_file = "cluster-size" in image.details and image.parent_reference is None
    stream = str(data.get("create-type")).lower() == "streamoptimized"
    return image.format_name == "vmdk" and one_file and stream and options.disk_format == "streamOptimized"


def _sha256(disk: Member) -> str | None:
    return disk.digest.value if disk.digest is not None and disk.digest.algorithm == "sha256" else None


def _phase(disk: Extents, step: int) -> int:
    """Returns the place modulo `step` at which a disk that stays as it is can share the blocks of its old package.

    The disks behind it do so too, if they followed it there: only a header is between them.
    """
    if not len(disk) or not disk.in_files()[0] or disk.start[0] or disk.offset[0] % BLOCK:
        return 0
    return int(disk.offset[0]) % step


def _refuse_other_disks(disks: Sequence[_Part], options: PackageOptions) -> None:
    """Raises `PlanError` for disks of another kind than the descriptor states."""
    for disk in disks:
        magic, _, flags = struct.unpack("<4sII", disk.table.read(0, 12)) if disk.table.size >= 12 else (b"", 0, 0)
        if magic == b"KDMV" and bool(flags & _COMPRESSED) != (options.disk_format == "streamOptimized"):
            kind = "streamOptimized" if flags & _COMPRESSED else "sparse"
            raise PlanError(f"{disk.name}: is {kind}, and the package is for {options.disk_format} disks")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _refuse_names(parts: Sequence[_Part]) -> None:
    seen: set[str] = set()
    for name in (part.name for part in parts):
        if len(name.encode()) > 100:
            raise PlanError(f"{name!r} is too long for a package, whose names have at most 100 bytes")
        if name in seen:
            raise PlanError(f"two files of the package would be called {name!r}")
        seen.add(name)


def _joined(parts: Sequence[_Part]) -> Extents:
    """Returns the archive of the parts, with their headers and two blocks of zeros at its end."""
    tables, places, at = [], [], 0
    for part in parts:
        size = part.table.size + part.slack
        header = Extents.whole(Blob(f"header of {part.name}", _header(part.name, size)))
        tables += [header, part.table]
        places += [at, at + BLOCK]
        at += BLOCK + _padded(size)
    return _placed(at + _END, places, tables)


def _placed(size: int, places: Sequence[int], tables: Sequence[Extents]) -> Extents:
    """Returns the table of a file with other tables at the given offsets, and zeros between them."""
    sources = [source for table in tables for source in table.sources]
    rows, lengths, first = [], [], 0
    for place, table in zip(places, tables, strict=True):
        start, kind, source, offset = table.columns
        rows.append(Columns(start + place, kind, np.where(source < 0, source, source + first).astype(np.int32), offset))
        lengths.append(table.length)
        first += len(table.sources)
    return Extents.placed(size, Columns.join(rows), np.concatenate(lengths), sources)


def _header(name: str, size: int) -> bytes:
    """Returns a USTAR header; sizes from 8 GiB on are in base 256, as GNU tar and VirtualBox write them."""
    octal = b"%011o\0" % size if size < _OCTAL_LIMIT else b"\x80" + size.to_bytes(11, "big")
    # Mode, owner, group, size and a constant time, so that equal packages have equal bytes.
    front = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + octal + b"%011o\0" % 0
    back = (b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2).ljust(BLOCK - 156, b"\0")
    checksum = sum(front) + 8 * ord(" ") + sum(back)
    return front + b"%06o\0 " % checksum + back


def _manifest(descriptor: str, parts: Sequence[_Part]) -> _Part:
    """Returns the manifest; reading it reads all parts once."""
    name = posixpath.splitext(descriptor)[0] + ".mf"
    size = sum(len(_line(part.name, "0" * 64)) for part in parts)
    lines: list[bytes] = []

    def content(offset: int, length: int) -> bytes:
        if not lines:
            lines.append(b"".join(_line(part.name, _digest(part)) for part in parts))
        return lines[0][offset : offset + length]

    return _Part(name, Extents.whole(Blob(name, content, size)))


def _line(name: str, digest: str) -> bytes:
    return f"SHA256({name})= {digest}\n".encode()


def _digest(part: _Part) -> str:
    if part.digest is not None and not part.slack:
        return part.digest
    found = hashlib.sha256()
    for chunk in _chunks(part.table):
        found.update(chunk)
    for at in range(0, part.slack, _CHUNK):
        found.update(bytes(min(_CHUNK, part.slack - at)))
    return found.hexdigest()


def _chunks(table: Extents) -> Iterator[bytes]:
    for at in range(0, table.size, _CHUNK):
        yield table.read(at, min(_CHUNK, table.size - at))
