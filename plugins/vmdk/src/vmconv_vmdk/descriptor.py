"""The text that describes a disk: its extents and its parent (Virtual Disk Format 5.0, "The Descriptor File").

It may be edited by hand, so the parser ignores case, spaces and the order of lines.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vmconv.plugin import MAX_SIZE, Dependency, File, ImageError, Record, named_by, read_records, text_of
from vmconv_vmdk import structs
from vmconv_vmdk.title import is_descriptor

NO_PARENT = 0xFFFFFFFF
FIRST_CID = 0xFFFFFFFE
"""The content id of new disks of VMware, until they are written to."""

_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)\s+(\d{1,18})\s+([A-Z]+)(?:\s+"(.*)"(?:\s+(\d{1,18})\b)?.*)?', re.IGNORECASE)
_VALUE = re.compile(r'([\w.:-]+)\s*=\s*(?:"(.*)"|(.*))')
_ENCODING = re.compile(rb"^[ \t]*encoding[ \t]*=[ \t]*\"?([\w.:-]{1,40})", re.IGNORECASE | re.MULTILINE)
_TEXT_CODECS = re.compile(
    r"utf-8|ascii|cp\d+|iso8859-\d+|shift_jis\w*|gb2312|gbk|gb18030|big5\w*|euc_\w+|koi8-[rut]|mac-\w+"
)
_RECORD = "ddb.vmconv.source."
_PARENT = "parentfilenamehint"
FLAT_KINDS = frozenset({"FLAT", "VMFS"})
SPARSE_KINDS = frozenset({"SPARSE", "VMFSSPARSE", "SESPARSE"})
_DEVICE_KINDS = frozenset({"VMFSRDM", "VMFSRAW"})
_DEVICE_TYPES = frozenset(
    {
        "fulldevice",
        "partitioneddevice",
        "vmfsrawdevicemap",
        "vmfspassthroughrawdevicemap",
        "vmfsraw",
        "vmfsrdm",
        "vmfsrdmp",
    }
)
_KNOWN_TYPES = frozenset(
    {
        "custom",
        "monolithicsparse",
        "monolithicflat",
        "twogbmaxextentsparse",
        "twogbmaxextentflat",
        "2gbmaxextentsparse",
        "2gbmaxextentflat",
        "vmfs",
        "vmfsthin",
        "vmfssparse",
        "vmfseagerzeroedthick",
        "vmfspreallocated",
        "sesparse",
        "streamoptimized",
    }
)


@dataclass(frozen=True)
class Part:
    """One extent of a disk, from a line of the descriptor: `offset` is in sectors of the file `name`."""

    access: str
    sectors: int
    kind: str
    name: str | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        return self.sectors * structs.SECTOR


@dataclass(frozen=True)
class Descriptor:
    """A checked descriptor; `values` are by lower-case name."""

    values: Mapping[str, str]
    parts: tuple[Part, ...]
    create_type: str
    cid: int | None
    parent_cid: int
    encoding: str | None = None
    parent: str | None = None

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def dependencies(self) -> Iterator[Dependency]:
        """Yields the files of extents, with the records of flat ones from the making of the disk."""
        ends: dict[str, int] = {}
        for part in self.parts:
            if part.kind == "ZERO" or part.access == "NOACCESS" or not part.name:
                continue
            # Only the tables of a sparse extent determine the length of its file.
            end = part.offset * structs.SECTOR + part.size if part.kind in FLAT_KINDS else 0
            ends[part.name] = max(ends.get(part.name, 0), end)
        known = read_records(named_by(text) for name, text in self.values.items() if name.startswith(_RECORD))
        for name, end in ends.items():
            yield Dependency("extent", name, end, known.get(name))


def recorded(records: Sequence[Record]) -> dict[str, str]:
    """Returns the lines of "ddb" with the records of the source's files; other readers ignore them."""
    return {f"{_RECORD.removeprefix('ddb.')}{number}": text_of(str(record)) for number, record in enumerate(records)}


def parse(data: bytes, name: str) -> Descriptor:
    """Returns the descriptor in `data`, which may be padded with zeros. Raises `ImageError` with the invalid part."""
    text, encoding = _decode(data.split(b"\0", 1)[0], name)
    values: dict[str, str] = {}
    parts: list[Part] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if found := _EXTENT.fullmatch(line):
            parts.append(_part(found, f"{name}: line {number}"))
        elif found := _VALUE.fullmatch(line):
            key, quoted = found[1].lower(), found[2]
            # File names may begin and end with spaces.
            values.setdefault(
                key, quoted if quoted is not None and key == _PARENT else (quoted or found[3] or "").strip()
            )
        elif re.match(r"(RW|RDONLY|NOACCESS)\b", line, re.IGNORECASE):
            raise ImageError(f"{name}: line {number}: {line[:80]!r} is not an extent")
    descriptor = Descriptor(
        values,
        tuple(parts),
        values.get("createtype", ""),
        _content_id(values, "CID", name),
        NO_PARENT if (below := _content_id(values, "parentCID", name)) is None else below,
        encoding,
        named_by(values.get(_PARENT, "")) or None,
    )
    _check(descriptor, name)
    return descriptor


def _decode(data: bytes, name: str) -> tuple[str, str | None]:
    data = data.removeprefix(codecs.BOM_UTF8)
    found = _ENCODING.search(data)
    if not found:
        # File names are bytes, and need not be UTF-8.
        return data.decode("utf-8", "surrogateescape"), None
    encoding = found[1].decode("ascii", "replace")
    try:
        codec = codecs.lookup(encoding.lower().replace("windows-", "cp")).name
    except LookupError:
        codec = ""
    if not _TEXT_CODECS.fullmatch(codec):
        raise ImageError(f"{name}: encoding {encoding!r} of the descriptor is not known")
    try:
        return data.decode(codec, "surrogateescape" if codec == "utf-8" else "strict"), encoding
    except UnicodeDecodeError as exc:
        raise ImageError(f"{name}: descriptor at {exc.start:#x}: is not {encoding}") from exc


def _part(found: re.Match[str], where: str) -> Part:
    access, sectors, kind, file, offset = found.groups()
    access, kind = access.upper(), kind.upper()
    if kind in _DEVICE_KINDS:
        raise ImageError(f"{where}: extent of kind {kind}: the disk is a raw device, not a file")
    if kind not in FLAT_KINDS | SPARSE_KINDS | {"ZERO"}:
        raise ImageError(f"{where}: extent of unknown kind {kind[:40]!r}")
    if not 0 < int(sectors) <= MAX_SIZE // structs.SECTOR:
        raise ImageError(f"{where}: extent of {sectors} sectors, 1 to {MAX_SIZE // structs.SECTOR} are possible")
    if int(offset or 0) > MAX_SIZE // structs.SECTOR:
        raise ImageError(f"{where}: extent at sector {offset}, {MAX_SIZE // structs.SECTOR} at most")
    if kind != "ZERO" and access != "NOACCESS" and not file:
        raise ImageError(f"{where}: extent of kind {kind} names no file")
    return Part(access, int(sectors), kind, named_by(file) if file else None, int(offset or 0))


def _content_id(values: Mapping[str, str], key: str, name: str) -> int | None:
    text = values.get(key.lower())
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}", text):
        raise ImageError(f"{name}: {key} {text[:40]!r} is not a number of 32 bits in hexadecimal")
    return int(text, 16)


def _check(descriptor: Descriptor, name: str) -> None:
    kind = descriptor.create_type
    if kind.lower() in _DEVICE_TYPES:
        raise ImageError(f"{name}: createType {kind}: the disk is a physical device, not a file")
    if kind and kind.lower() not in _KNOWN_TYPES:
        raise ImageError(f"{name}: createType {kind[:40]!r} is not known")
    if any("encryption" in key or "keysafe" in key for key in descriptor.values) or "vmwarevmcrypt" in (
        descriptor.values.get("ddb.iofilters", "").lower()
    ):
        raise ImageError(f"{name}: the disk is encrypted", hint="decrypt it with VMware's tools first")
    if not descriptor.parts:
        raise ImageError(f"{name}: descriptor names no extent")
    if descriptor.size > MAX_SIZE:
        raise ImageError(f"{name}: extents of {descriptor.size} bytes together, {MAX_SIZE} at most")
    if descriptor.parent_cid != NO_PARENT and not descriptor.parent:
        raise ImageError(f"{name}: parentCID {descriptor.parent_cid:08x} states a parent, but no line names its file")


def separate(file: File) -> Descriptor:
    """Returns the descriptor in a file of its own."""
    data = file.read(0, min(file.size, structs.MAX_DESCRIPTOR))
    if not is_descriptor(data):
        raise ImageError(f"{file.name}: neither a descriptor nor an extent of a VMDK")
    if file.size > structs.MAX_DESCRIPTOR:
        raise ImageError(f"{file.name}: descriptor of {file.size} bytes, {structs.MAX_DESCRIPTOR} at most")
    return parse(data, file.name)


def render(
    *,
    create_type: str,
    cid: int,
    parts: Sequence[Part],
    database: Mapping[str, str],
    parent_cid: int = NO_PARENT,
    parent: str | None = None,
) -> bytes:
    """Returns the text of a descriptor: `database` are the lines of "ddb", by name."""
    lines = [
        "# Disk DescriptorFile",
        # QEMU requires the version in the first line that is no comment.
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid:08x}",
        f"parentCID={parent_cid:08x}",
        'isNativeSnapshot="no"',
        f'createType="{create_type}"',
        *([f'parentFileNameHint="{text_of(parent)}"'] if parent else []),
        "",
        "# Extent description",
        *(_line(part) for part in parts),
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        *(f'ddb.{name} = "{value}"' for name, value in database.items()),
        "",
    ]
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _line(part: Part) -> str:
    place = f" {part.offset}" if part.kind == "FLAT" else ""
    return f'{part.access} {part.sectors} {part.kind} "{text_of(part.name or "")}"{place}'
