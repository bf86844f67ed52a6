"""Reads E01 images: segment files into one disk of decoded chunks, and what they say of the case."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from vmconv.plugin import (
    MAX_SIZE,
    Dependency,
    File,
    Image,
    ImageError,
    Opener,
    Structure,
    UsageError,
    counted,
    field_offset,
)
from vmconv_ewf import structs
from vmconv_ewf.chunks import Chunks, refuse_missing, tables_of
from vmconv_ewf.sections import Section, segments


class EwfImage(Image):
    """An image with its source of payload, for the check."""

    chunks: Chunks


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the disk in the segment files whose first is `file`."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: an E01 has no snapshots, {snapshot!r} was requested")
    parts = segments(file, opener)
    sections = [section for part in parts for section in part]
    volume = _volume(file, sections)
    size = volume.sector_count * volume.bytes_per_sector
    chunk = volume.sectors_per_chunk * volume.bytes_per_sector
    _refuse_strangers(parts, volume)
    tables = tables_of(parts)
    refuse_missing(file, tables, -(-size // chunk))
    chunks = Chunks(file, tables, chunk, size)
    case, doubts = _case(sections)
    digests = _digests(sections)

    def details() -> Mapping[str, Any]:
        identifier: bytes = volume.set_identifier
        facts: dict[str, Any] = {
            "chunk-size": chunk,
            "segments": len(parts),
            **({"set-identifier": identifier.hex()} if any(identifier) else {}),
            **case,
            **digests,
        }
        return {"cluster-size": chunk, "format-specific": {"type": "ewf", "data": facts}}

    image = EwfImage(
        "ewf",
        file,
        size,
        chunks.table,
        details=details,
        digests=digests,
        losses=("data of the case: examiner, notes, hashes and the like",) if case or digests else (),
        warnings=(*doubts, *_unread(file, sections)),
        dependencies=tuple(Dependency("segment", part[0].file.name, part[0].file.size) for part in parts[1:]),
    )
    image.chunks = chunks
    return image


def _volume(file: File, sections: Sequence[Section]) -> Any:
    """Returns the fields of the volume section, checked."""
    found = next((one for one in sections if one.kind in ("volume", "disk")), None)
    if found is None or found.file is not file:
        raise ImageError(f"{file.name}: the first segment has no volume section")
    if found.length < structs.VOLUME_LENGTH:
        raise found.damaged(f"{found.length} bytes, where an E01 has {structs.VOLUME_LENGTH}: a SMART image (S01)")
    part = Structure(file, structs.Volume, found.body, "volume")
    data = part.read()
    volume = part.parse(data=data)
    if zlib.adler32(data[:-4]) != volume.checksum:
        raise part.damaged("checksum", "does not match")
    part.limit_power("bytes_per_sector", volume.bytes_per_sector, structs.MIN_SECTOR, structs.MAX_SECTOR)
    part.limit_power("sectors_per_chunk", volume.sectors_per_chunk, 1, structs.MAX_CHUNK // volume.bytes_per_sector)
    part.limit("sector_count", volume.sector_count, 0, MAX_SIZE // volume.bytes_per_sector)
    return volume


def _refuse_strangers(parts: Sequence[Sequence[Section]], volume: Any) -> None:
    """Raises `ImageError` for a segment of another acquisition, if it says so."""
    place = field_offset(structs.Volume, "set_identifier")
    for part in parts[1:]:
        data = next((one for one in part if one.kind == "data" and one.length >= structs.VOLUME_LENGTH), None)
        if data and data.read(16, at=place) != volume.set_identifier:
            raise data.damaged("its set identifier is not that of the first segment", structs.SECTION.size + place)


def _digests(sections: Sequence[Section]) -> dict[str, str]:
    """Returns the hashes of the disk that the image stores, in hexadecimal, by their names in hashlib."""
    found: dict[str, str] = {}
    for section in sections:
        length = {"hash": structs.HASH_LENGTH, "digest": structs.DIGEST_LENGTH}.get(section.kind)
        if length is None:
            continue
        data = section.read(length)
        if zlib.adler32(data[:-4]) != structs.CHECKSUM.unpack(data[-4:])[0]:
            raise section.damaged("its checksum does not match")
        found["md5"] = data[: structs.MD5_LENGTH].hex()
        if section.kind == "digest":
            sha1 = data[structs.MD5_LENGTH :][: structs.SHA1_LENGTH]
            # Zeros, if it was not computed.
            found |= {"sha1": sha1.hex()} if any(sha1) else {}
    return found


def _unread(file: File, sections: Sequence[Section]) -> tuple[str, ...]:
    """Returns a warning if the source had sectors that could not be read: they are zeros."""
    count = sum(int.from_bytes(one.read(4), "little") for one in sections if one.kind == "error2")
    said = "of sectors could not be read when it was acquired"
    return (f"{file.name}: {counted(count, 'range')} {said}",) if count else ()


def _case(sections: Sequence[Section]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns what the image says of the case, and a warning if that cannot be read."""
    for kind, encoding in (("header2", "utf-16"), ("header", "latin-1")):
        section = next((one for one in sections if one.kind == kind), None)
        if section is None:
            continue
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(section.read(min(section.length, structs.MAX_TEXT)), structs.MAX_TEXT)
            text = data.decode(encoding)
        except (zlib.error, UnicodeDecodeError):
            return {}, (str(section.damaged("text of the case that cannot be read")),)
        return _fields(text), ()
    return {}, ()


def _fields(text: str) -> dict[str, str]:
    """Returns the named columns of the table "main": a line of names, and a line of values."""
    lines = text.splitlines()
    if "main" not in lines:
        return {}
    rest = lines[lines.index("main") + 1 :][:2]
    names, values = (line.split("\t") for line in (*rest, "", "")[:2])
    said = dict(zip(names, (value.strip() for value in values), strict=False))
    return {title: said[name] for name, title in structs.FIELDS.items() if said.get(name)}
