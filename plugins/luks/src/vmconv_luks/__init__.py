"""LUKS disks for vmconv: encrypted containers of QEMU and cryptsetup, read-only, and new encrypted qcow2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import CheckReport, Encryption, Encryptor, File, Image, Opener


class Luks(Format):
    name = "luks"
    title = "LUKS encrypted disk, versions 1 and 2"
    suffixes = (".luks",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= 6 and file.read(0, 6) == b"LUKS\xba\xbe"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_luks.reader import read

        return read(file, opener, snapshot=snapshot)

    def encryption(self, file: File, opener: Opener, offset: int, length: int) -> Encryption:
        from vmconv_luks.reader import encryption

        return encryption(file, opener, offset, length)

    def encryptor(self, passphrase: bytes) -> Encryptor:
        from vmconv_luks.writer import encryptor

        return encryptor(passphrase)

    def qemu_incompatibility(self, image: Image) -> str | None:
        return "QEMU needs the passphrase to read it"

    def check(self, image: Image) -> CheckReport:
        from vmconv_luks.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Luks()]
