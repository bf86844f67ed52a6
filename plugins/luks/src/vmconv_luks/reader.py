"""Reads LUKS containers: the header now, the key when payload is needed."""

from __future__ import annotations

from vmconv.plugin import (
    Decoded,
    Encryption,
    Extents,
    File,
    Image,
    Opener,
    Structure,
    UsageError,
)
from vmconv_luks import luks1, structs
from vmconv_luks.ciphers import SectorCipher, key_name
from vmconv_luks.keys import unlock
from vmconv_luks.volume import Volume

LOSSES = ("its encryption: passphrases, key and cipher",)


class LuksImage(Image):
    """An image with what its header says, for the check."""

    volume: Volume


def read(file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
    """Returns the disk in a container. Its payload is read with one of the user's passphrases."""
    if snapshot is not None:
        raise UsageError(f"{file.name}: LUKS has no snapshots, {snapshot!r} was requested")
    begin = Structure(file, structs.Begin)
    version = begin.parse("no LUKS signature", "magic").version
    begin.limit("version", version, 1, 2)
    if version == 1:
        volume = luks1.read(file, 0, file.size)
    else:
        from vmconv_luks import luks2

        volume = luks2.read(file)

    def load_guest() -> Extents:
        return Extents.whole(Decrypted(volume, unlock(volume, opener), volume.payload, volume.size))

    rest = file.size - volume.payload - volume.size
    image = LuksImage(
        "luks",
        file,
        volume.size,
        load_guest,
        details=lambda: {
            "encrypted": True,
            "format-specific": {"type": "luks", "data": {"version": volume.version, **volume.facts}},
        },
        losses=LOSSES,
        warnings=volume.warnings
        + ((f"{file.name}: {rest} bytes at its end are no sector",) if 0 < rest < volume.sector else ()),
    )
    image.volume = volume
    return image


def encryption(file: File, opener: Opener, offset: int, length: int) -> Encryption:
    """Returns the encryption of an image of QEMU, whose header of LUKS 1 lies in these bytes of the file."""
    volume = luks1.read(file, offset, length, inside=True)

    def decrypted(size: int) -> Decoded:
        return Decrypted(volume, unlock(volume, opener), 0, size)

    return Encryption(volume.facts, decrypted)


class Decrypted(Decoded):
    """The `size` bytes of a file from `start` on, decrypted; bytes past the end of the file are decrypted zeros."""

    def __init__(self, volume: Volume, key: bytes, start: int, size: int) -> None:
        super().__init__(
            f"{volume.file.name} (LUKS)",
            volume.file,
            unit=volume.sector,
            count=size // volume.sector,
            reason="encrypted payload has to be decrypted (LUKS)",
        )
        self._start = start
        self._first_sector = volume.first_sector
        self._cipher = SectorCipher(volume.cipher, key, volume.sector)
        if not (start or volume.first_sector) and volume.sector == structs.SECTOR:
            # Only then a sector's number is its place in the file.
            self.cipher = key_name(volume.cipher, key)

    def units(self, offset: int, length: int) -> list[bytes]:
        if not length:
            return []
        first, end = offset // self.unit * self.unit, -(-(offset + length) // self.unit) * self.unit
        place = self._start + first
        there = max(0, min(end - first, self.file.size - place))
        data = self.file.read(place, there).ljust(end - first, b"\0") if there else bytes(end - first)
        plain = self._cipher.decrypt(self._first_sector + first // structs.SECTOR, data)
        return [plain[offset - first : offset - first + length]]
