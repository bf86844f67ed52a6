"""Growing disks of Bochs for vmconv: sectors allocated in extents with bitmaps. Read-only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import CheckReport, File, Image, Opener

_SIGNATURE = b"Bochs Virtual HD Image"


class Bochs(Format):
    name = "bochs"
    title = "Bochs growing disk"
    suffixes = (".bochs",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= len(_SIGNATURE) and file.read(0, len(_SIGNATURE)) == _SIGNATURE

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_bochs.reader import read

        return read(file, snapshot=snapshot)

    def check(self, image: Image) -> CheckReport:
        from vmconv_bochs.reader import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Bochs()]
