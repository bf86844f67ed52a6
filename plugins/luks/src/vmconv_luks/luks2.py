"""Headers of LUKS 2: two copies of a binary header, each with a JSON area that says all the rest."""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64decode
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from vmconv.plugin import MAX_SIZE, File, ImageError, Structure, damaged, read_part
from vmconv_luks import structs
from vmconv_luks.ciphers import HASHES, UnsupportedCipherError, parse
from vmconv_luks.volume import Derivation, Digest, Slot, Volume

_SUMS = ("sha1", "sha256", "sha512")
_PBKDF2, _ARGON2 = "pbkdf2", ("argon2i", "argon2id")


def _number(value: object) -> int:
    """Returns a number that the format writes as text, because JSON has none of 64 bits."""
    if not isinstance(value, str) or not value.isascii() or not value.isdecimal() or len(value) > 20:
        raise ValueError("is not a number as text")
    if int(value) > MAX_SIZE:
        raise ValueError(f"is more than {MAX_SIZE}")
    return int(value)


def _bytes(value: object) -> bytes:
    if not isinstance(value, str) or len(value) > 2 * structs.MAX_SALT:
        raise ValueError(f"is not at most {structs.MAX_SALT} bytes in base64")
    try:
        return b64decode(value, validate=True)
    except ValueError:
        raise ValueError("is not base64") from None


_Number = Annotated[int, PlainValidator(_number)]
_Bytes = Annotated[bytes, PlainValidator(_bytes)]
_Name = Annotated[str, Field(pattern=r"^[0-9]{1,3}$")]


class _Part(BaseModel):
    # What other programs add is for them.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Split(_Part):
    type: Literal["luks1"]
    stripes: int = Field(ge=1, le=structs.MAX_STRIPES)
    hash: Literal[HASHES]  # type: ignore[valid-type]


class _Area(_Part):
    type: Literal["raw"]
    offset: _Number
    size: _Number
    encryption: str = Field(max_length=64)
    key_size: int = Field(ge=1, le=structs.MAX_KEY)


class _Kdf(_Part):
    type: Literal["pbkdf2", "argon2i", "argon2id"]
    salt: _Bytes
    hash: Literal[HASHES] | None = None  # type: ignore[valid-type]
    iterations: int | None = Field(default=None, ge=1, le=structs.MAX_ITERATIONS)
    time: int | None = Field(default=None, ge=1, le=1 << 20)
    memory: int | None = Field(default=None, ge=8, le=structs.MAX_MEMORY)
    cpus: int | None = Field(default=None, ge=1, le=structs.MAX_LANES)


class _Keyslot(_Part):
    type: str
    key_size: int = Field(ge=1, le=structs.MAX_KEY)
    kdf: _Kdf
    af: _Split
    area: _Area


class _OtherSlot(_Part):
    """A key slot of another kind, such as one of a change of the key that is not complete."""

    type: str


class _Segment(_Part):
    type: str
    offset: _Number
    size: str
    iv_tweak: _Number = 0
    encryption: str = Field(default="", max_length=64)
    sector_size: Literal[512, 1024, 2048, 4096] = 512
    integrity: dict[str, Any] | None = None
    flags: list[str] = []


class _Digest(_Part):
    type: Literal["pbkdf2"]
    keyslots: list[_Name] = Field(max_length=structs.MAX_SLOTS)
    segments: list[_Name] = Field(max_length=structs.MAX_ITEMS)
    salt: _Bytes
    digest: _Bytes
    hash: Literal[HASHES]  # type: ignore[valid-type]
    iterations: int = Field(ge=1, le=structs.MAX_ITERATIONS)


class _Requirements(_Part):
    mandatory: list[str] = []


class _Config(_Part):
    json_size: _Number
    keyslots_size: _Number
    requirements: _Requirements = _Requirements()


class _Metadata(_Part):
    keyslots: dict[_Name, _OtherSlot] = Field(max_length=structs.MAX_SLOTS)
    tokens: dict[str, Any] = Field(max_length=structs.MAX_ITEMS)
    segments: dict[_Name, _Segment] = Field(max_length=structs.MAX_ITEMS)
    digests: dict[_Name, _Digest] = Field(max_length=structs.MAX_ITEMS)
    config: _Config


class _Slots(_Part):
    keyslots: dict[_Name, _Keyslot]


class _Header(NamedTuple):
    head: Structure
    raw: Any
    json: bytes
    metadata: _Metadata


def read(file: File) -> Volume:
    """Returns the container in the file. Of the two headers, the newer sound one counts."""
    header, warnings = _newest(file)
    segment = _segment(file, header)
    slots = tuple(_slots(file, header))
    _refuse_costs(file, header, slots)
    metadata = header.metadata
    size = _size(file, header, segment)
    for name, one in metadata.digests.items():
        # A shorter one would fit other keys, too.
        if len(one.digest) != hashlib.new(one.hash).digest_size:
            raise _wrong(file, header, f"digests.{name}.digest", f"{len(one.digest)} bytes are no digest of {one.hash}")
    digests = tuple(
        Digest(Derivation(_PBKDF2, one.hash, one.iterations, one.salt), one.digest, frozenset(one.keyslots))
        for one in metadata.digests.values()
        if "0" in one.segments
    )
    if not digests:
        raise _wrong(file, header, "digests", "none is of the segment")
    length = header.raw.hdr_size
    keys = {slot.key_bytes for slot in slots}
    for key in keys:
        _supported(file, header, "segments.0.encryption", segment.encryption, key)
    return Volume(
        file=file,
        version=2,
        cipher=segment.encryption,
        key_bytes=max(keys, default=0),
        sector=segment.sector_size,
        payload=segment.offset,
        size=size,
        first_sector=segment.iv_tweak,
        slots=slots,
        digests=digests,
        areas=(
            ("header", 0, length),
            ("second header", length, length),
            *((f"key slot {slot.name}", slot.offset, slot.length) for slot in slots),
            ("payload", segment.offset, size),
        ),
        facts=_facts(header, segment),
        warnings=warnings,
    )


def _newest(file: File) -> tuple[_Header, tuple[str, ...]]:
    """Returns the header that counts, and warnings on the other one. Raises `ImageError` if none is sound."""
    found: list[_Header] = []
    refused: list[ImageError] = []
    for offset in (0, *structs.HEADER_SIZES):
        # The size of the first says where the second is, if the first is sound.
        if found and offset != found[0].raw.hdr_size:
            continue
        if offset and (offset + 6 > file.size or file.read(offset, 6) != structs.MAGIC_SECOND):
            if found:
                refused.append(damaged(file, "second header", offset, "is not there"))
            continue
        try:
            found.append(_header(file, offset))
        except ImageError as exc:
            refused.append(exc)
        if offset and found:
            break
    if not found:
        raise refused[0]
    newest = max(found, key=lambda one: one.raw.seqid)
    warnings = tuple(f"{error}; the other header is used" for error in refused[:1])
    if len({one.raw.seqid for one in found}) > 1:
        warnings += (f"{file.name}: its headers differ, and the newer one is used",)
    return newest, warnings


def _header(file: File, offset: int) -> _Header:
    head = Structure(file, structs.Header2, offset, "second header" if offset else "header")
    raw = head.parse("is not of version 2", "version")
    if raw.magic != (structs.MAGIC_SECOND if offset else structs.MAGIC):
        raise head.damaged("magic", f"{raw.magic!r} is not that of this header")
    if raw.hdr_size not in structs.HEADER_SIZES:
        raise head.damaged("hdr_size", f"{raw.hdr_size:#x} is not a size of a header of LUKS 2")
    if raw.hdr_offset != offset:
        raise head.damaged("hdr_offset", f"{raw.hdr_offset:#x} is not where the header is")
    if offset and raw.hdr_size != offset:
        raise head.damaged("hdr_size", f"{raw.hdr_size:#x} is not that of the first header")
    name = raw.csum_alg.rstrip(b"\0").decode("ascii", "replace")
    if name not in _SUMS:
        raise head.damaged("csum_alg", f"checksum {name!r} is not supported")
    data = bytearray(read_part(file, head.name, offset, raw.hdr_size))
    at = head.offset_of("csum") - offset
    data[at : at + len(raw.csum)] = bytes(len(raw.csum))
    found = hashlib.new(name, data).digest()
    if not hmac.compare_digest(found, raw.csum[: len(found)]):
        raise head.damaged("csum", "does not match")
    text = bytes(data[structs.JSON_BEGIN :]).split(b"\0", 1)[0]
    return _Header(head, raw, text, _parsed(head, _Metadata, text))


def _parsed(head: Structure, model: type[Any], text: bytes) -> Any:
    try:
        return model.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "text"
        said = first["msg"].removeprefix("Value error, ")
        raise damaged(head.file, f"JSON area, {place}", head.offset + structs.JSON_BEGIN, said) from exc


def _wrong(file: File, header: _Header, place: str, problem: str) -> ImageError:
    return damaged(file, f"JSON area, {place}", header.head.offset + structs.JSON_BEGIN, problem)


def _supported(file: File, header: _Header, place: str, cipher: str, key_bytes: int) -> None:
    try:
        parse(cipher, key_bytes)
    except UnsupportedCipherError as exc:
        raise _wrong(file, header, place, str(exc)) from exc


def _segment(file: File, header: _Header) -> _Segment:
    """Returns the one segment, which is all of the disk. Raises `ImageError` for other disks."""
    metadata = header.metadata
    if needed := metadata.config.requirements.mandatory:
        raise _wrong(file, header, "config.requirements", f"{needed[0]!r} is not supported")
    if list(metadata.segments) != ["0"]:
        names = ", ".join(metadata.segments) or "none"
        raise _wrong(file, header, "segments", f"{names}: only one segment, 0, is supported")
    segment = metadata.segments["0"]
    if segment.type != "crypt":
        raise _wrong(file, header, "segments.0.type", f"{segment.type!r} is not supported")
    if segment.integrity is not None or segment.flags:
        what = "integrity" if segment.integrity is not None else f"flag {segment.flags[0]!r}"
        raise _wrong(file, header, "segments.0", f"{what} is not supported")
    if segment.offset % structs.SECTOR or not 2 * header.raw.hdr_size <= segment.offset <= file.size:
        problem = f"{segment.offset:#x} is not a sector between the headers and the end of the file ({file.size:#x})"
        hint = ": the payload lies in another file, with this one as its header" if segment.offset == 0 else ""
        raise _wrong(file, header, "segments.0.offset", problem + hint)
    return segment


def _size(file: File, header: _Header, segment: _Segment) -> int:
    room = file.size - segment.offset
    if segment.size == "dynamic":
        return room // segment.sector_size * segment.sector_size
    try:
        size = _number(segment.size)
    except ValueError as exc:
        raise _wrong(file, header, "segments.0.size", f"{segment.size!r} {exc}") from exc
    if size > room or size % segment.sector_size:
        raise _wrong(file, header, "segments.0.size", f"{size:#x} are no sectors of the {room:#x} bytes that are left")
    return size


def _slots(file: File, header: _Header) -> Iterator[Slot]:
    metadata = header.metadata
    usable = [name for name, slot in metadata.keyslots.items() if slot.type == "luks2"]
    if not usable:
        return
    others = sorted(metadata.keyslots.keys() - set(usable))
    if others:
        kind = metadata.keyslots[others[0]].type
        raise _wrong(file, header, f"keyslots.{others[0]}.type", f"{kind!r} is not supported")
    end = 2 * header.raw.hdr_size + metadata.config.keyslots_size
    for name, slot in _parsed(header.head, _Slots, header.json).keyslots.items():
        place = f"keyslots.{name}"
        needed = -(-slot.key_size * slot.af.stripes // structs.SECTOR) * structs.SECTOR
        offset, size = slot.area.offset, slot.area.size
        if offset % structs.SECTOR or offset < 2 * header.raw.hdr_size or offset + size > min(end, file.size):
            raise _wrong(file, header, f"{place}.area", f"{size} bytes at {offset:#x} lie outside of the key slots")
        if size < needed:
            raise _wrong(file, header, f"{place}.area.size", f"{size} bytes, the key slot has {needed}")
        _supported(file, header, f"{place}.area.encryption", slot.area.encryption, slot.area.key_size)
        yield Slot(
            name,
            _derivation(file, header, place, slot.kdf),
            slot.key_size,
            offset,
            needed,
            slot.area.encryption,
            slot.area.key_size,
            slot.af.stripes,
            slot.af.hash,
        )


def _derivation(file: File, header: _Header, place: str, kdf: _Kdf) -> Derivation:
    needed = ("hash", "iterations") if kdf.type == _PBKDF2 else ("time", "memory", "cpus")
    for name in needed:
        if getattr(kdf, name) is None:
            raise _wrong(file, header, f"{place}.kdf", f"{kdf.type} without {name}")
    if kdf.type == _PBKDF2:
        return Derivation(kdf.type, str(kdf.hash), kdf.iterations or 0, kdf.salt)
    passes, memory, lanes = kdf.time or 0, kdf.memory or 0, kdf.cpus or 0
    if passes * memory > structs.MAX_WORK:
        problem = f"{passes} passes over {memory} KiB, {structs.MAX_WORK} KiB together at most"
        raise _wrong(file, header, f"{place}.kdf.time", problem)
    if memory < 8 * lanes or len(kdf.salt) < 8:
        raise _wrong(file, header, f"{place}.kdf", f"{memory} KiB for {lanes} lanes, salt of {len(kdf.salt)} bytes")
    return Derivation(kdf.type, "", passes, kdf.salt, memory, lanes)


def _refuse_costs(file: File, header: _Header, slots: tuple[Slot, ...]) -> None:
    """Raises `ImageError` if trying all key slots takes too long."""
    passes = sum(slot.derivation.passes for slot in slots if slot.derivation.kind == _PBKDF2)
    passes += sum(one.iterations for one in header.metadata.digests.values())
    work = sum(slot.derivation.passes * slot.derivation.memory for slot in slots)
    if passes > structs.MAX_ALL_ITERATIONS or work > 2 * structs.MAX_WORK:
        raise _wrong(file, header, "keyslots", f"{passes} iterations and {work} KiB of all key slots are too many")


def _facts(header: _Header, segment: _Segment) -> dict[str, Any]:
    name, mode, generator = (*segment.encryption.split("-", 2), "", "")[:3]
    metadata = header.metadata
    slots = _parsed(header.head, _Slots, header.json).keyslots if metadata.keyslots else {}
    text = {field: getattr(header.raw, field).rstrip(b"\0").decode("ascii", "replace") for field in ("uuid", "label")}
    return {
        "ivgen-alg": generator,
        "cipher-alg": name,
        "cipher-mode": mode,
        "sector-size": segment.sector_size,
        "uuid": text["uuid"],
        **({"label": text["label"]} if text["label"] else {}),
        "payload-offset": segment.offset,
        "slots": [
            {
                "name": number,
                "kdf": slot.kdf.type,
                **({"hash-alg": slot.kdf.hash, "iters": slot.kdf.iterations} if slot.kdf.type == _PBKDF2 else {}),
                **({"time": slot.kdf.time, "memory": slot.kdf.memory} if slot.kdf.type in _ARGON2 else {}),
                "key-bytes": slot.key_size,
                "key-offset": slot.area.offset,
                "stripes": slot.af.stripes,
            }
            for number, slot in slots.items()
        ],
    }
