"""VHD images for vmconv: the disks of Virtual PC, Hyper-V, Azure and XenServer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, CheckReport, Draft, File, Image, Layout, Opener, Placement

_COOKIE = b"conectix"


class Vhd(Format):
    name = "vhd"
    title = "Hyper-V and Virtual PC virtual disk"
    suffixes = (".vhd", ".vpc", ".avhd")
    carries = frozenset({"geometry", "creator"})
    supports_backing = True

    def options(self) -> type[Any]:
        from vmconv_vhd.options import Options

        return Options

    def probe(self, file: File) -> bool:
        if file.size < 512:
            return False
        # Virtual PC 2004 and older wrote footers of 511 bytes.
        return file.read(0, 8) == _COOKIE or _COOKIE in (
            file.read(file.size - 512, 8),
            file.read(file.size - 511, 8),
        )

    def options_of(self, image: Image) -> Any:
        from vmconv_vhd.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_vhd.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_vhd.writer import write

        return write(image, options, placement, backing=backing)

    def qemu_incompatibility(self, image: Image) -> str | None:
        from vmconv_vhd.reader import qemu_incompatibility

        return qemu_incompatibility(image)

    def set_parent(self, image: Image, parent: Backing | None) -> Draft:
        from vmconv_vhd.parent import set_parent

        return set_parent(image, parent)

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        from vmconv_vhd.repair import repair

        return repair(image) if errors else None

    def check(self, image: Image) -> CheckReport:
        from vmconv_vhd.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Vhd()]
