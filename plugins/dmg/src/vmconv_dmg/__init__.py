"""Apple disk images (UDIF, .dmg) for vmconv: chunks that are stored or compressed. Read-only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import CheckReport, File, Image, Opener


class Dmg(Format):
    name = "dmg"
    title = "Apple disk image (UDIF)"
    suffixes = (".dmg",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= 512 and file.read(file.size - 512, 4) == b"koly"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_dmg.reader import read

        return read(file, snapshot=snapshot)

    def qemu_incompatibility(self, image: Image) -> str | None:
        from vmconv_dmg.reader import qemu_incompatibility

        return qemu_incompatibility(image)

    def check(self, image: Image) -> CheckReport:
        from vmconv_dmg.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Dmg()]
