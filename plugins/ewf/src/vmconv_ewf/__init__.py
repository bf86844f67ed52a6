"""Expert Witness disk images (EWF, E01) for vmconv: compressed chunks with checksums, in segment files. Read-only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import CheckReport, File, Image, Opener

_SIGNATURES = (b"EVF\t\r\n\xff\0", b"EVF2\r\n\x81\0")


class Ewf(Format):
    name = "ewf"
    title = "Expert Witness disk image (E01)"
    suffixes = (".e01",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) in _SIGNATURES

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_ewf.reader import read

        return read(file, opener, snapshot=snapshot)

    def check(self, image: Image) -> CheckReport:
        from vmconv_ewf.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Ewf()]
