"""Headers of LUKS 1: one structure with eight key slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vmconv.plugin import File, Structure, damaged
from vmconv_luks import structs
from vmconv_luks.ciphers import HASHES, UnsupportedCipherError, parse
from vmconv_luks.volume import Derivation, Digest, Slot, Volume


def read(file: File, offset: int, length: int, *, inside: bool = False) -> Volume:
    """Returns the container whose header lies in bytes `[offset, offset + length)` of the file.

    `inside`: in an image of another format, which says where the payload is.
    """
    head = Structure(file, structs.Header1, offset)
    if head.length > length:
        raise head.refused(f"{head.length} bytes, and there is room for {length}")
    raw = head.parse()
    digest = _text(head, "hash_spec", raw.hash_spec)
    if digest not in HASHES:
        raise head.damaged("hash_spec", f"hash {digest!r} is not supported")
    mode = _text(head, "cipher_mode", raw.cipher_mode)
    cipher = f"{_text(head, 'cipher_name', raw.cipher_name)}-{mode}"
    head.limit("key_bytes", raw.key_bytes, 1, structs.MAX_KEY)
    try:
        parse(cipher, raw.key_bytes)
    except UnsupportedCipherError as exc:
        raise head.damaged("cipher_name", str(exc)) from exc
    head.limit("mk_digest_iterations", raw.mk_digest_iterations, 1, structs.MAX_ITERATIONS)
    payload = raw.payload_offset * structs.SECTOR
    if not payload and not inside:
        raise head.damaged("payload_offset", "0: the payload lies in another file, with this one as its header")
    if not inside and payload > file.size:
        raise head.damaged("payload_offset", f"{payload:#x} is past the end of the file ({file.size:#x})")
    slots = tuple(_slots(head, raw, cipher, digest, length))
    if sum(slot.derivation.passes for slot in slots) > structs.MAX_ALL_ITERATIONS:
        raise head.damaged("slots", f"more than {structs.MAX_ALL_ITERATIONS} iterations in all key slots")
    known = Derivation("pbkdf2", digest, raw.mk_digest_iterations, raw.mk_digest_salt)
    areas = [("header", offset, head.length), *((f"key slot {slot.name}", slot.offset, slot.length) for slot in slots)]
    size = 0 if inside else (file.size - payload) // structs.SECTOR * structs.SECTOR
    return Volume(
        file=file,
        version=1,
        cipher=cipher,
        key_bytes=raw.key_bytes,
        sector=structs.SECTOR,
        payload=payload,
        size=size,
        first_sector=0,
        slots=slots,
        digests=(Digest(known, raw.mk_digest, frozenset(slot.name for slot in slots)),),
        areas=tuple(areas if inside else [*areas, ("payload", payload, size)]),
        facts=_facts(head, raw, cipher, digest),
    )


def _slots(head: Structure, raw: Any, cipher: str, digest: str, length: int) -> Iterator[Slot]:
    for number, slot in enumerate(raw.slots):
        at = head.offset_of("slots") + number * structs.Slot1.sizeof()
        if slot.active == structs.DISABLED:
            continue
        if slot.active != structs.ENABLED:
            raise damaged(head.file, f"key slot {number}", at, f"{slot.active:#x} is neither enabled nor disabled")
        for name, value, most in (
            ("iterations", slot.iterations, structs.MAX_ITERATIONS),
            ("stripes", slot.stripes, structs.MAX_STRIPES),
        ):
            if not 1 <= value <= most:
                raise damaged(head.file, f"key slot {number}", at, f"{name} {value} is not in 1..{most}")
        place = slot.key_material_offset * structs.SECTOR
        room = -(-raw.key_bytes * slot.stripes // structs.SECTOR) * structs.SECTOR
        if place < head.length or place + room > min(length, head.file.size - head.offset):
            raise damaged(head.file, f"key slot {number}", at, f"{room} bytes at {place:#x} lie outside of the header")
        derivation = Derivation("pbkdf2", digest, slot.iterations, slot.salt)
        yield Slot(
            str(number),
            derivation,
            raw.key_bytes,
            head.offset + place,
            room,
            cipher,
            raw.key_bytes,
            slot.stripes,
            digest,
        )


def _text(head: Structure, field: str, data: bytes) -> str:
    text, _, _ = data.partition(b"\0")
    try:
        return text.decode("ascii")
    except UnicodeDecodeError:
        raise head.damaged(field, f"{text!r} is not ASCII") from None


def _facts(head: Structure, raw: Any, cipher: str, digest: str) -> dict[str, Any]:
    """Returns the keys of QEMU's QCryptoBlockInfoLUKS."""
    name, mode, generator = cipher.split("-", 2)
    generator, _, of_iv = generator.partition(":")
    bits = raw.key_bytes * (4 if mode == "xts" else 8)
    return {
        "ivgen-alg": generator,
        **({"ivgen-hash-alg": of_iv} if of_iv else {}),
        "hash-alg": digest,
        "cipher-alg": f"{name}-{bits}",
        "cipher-mode": mode,
        "uuid": _text(head, "uuid", raw.uuid),
        "payload-offset": raw.payload_offset * structs.SECTOR,
        "master-key-iters": raw.mk_digest_iterations,
        "slots": [
            {
                "active": slot.active == structs.ENABLED,
                **({"iters": slot.iterations, "stripes": slot.stripes} if slot.active == structs.ENABLED else {}),
                "key-offset": slot.key_material_offset * structs.SECTOR,
            }
            for slot in raw.slots
        ],
    }
