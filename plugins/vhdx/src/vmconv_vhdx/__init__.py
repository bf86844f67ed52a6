"""VHDX images for vmconv: the disks of Hyper-V since Windows Server 2012."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, CheckReport, Draft, File, Image, Layout, Opener, Placement


class Vhdx(Format):
    name = "vhdx"
    title = "Hyper-V virtual disk, version 2"
    suffixes = (".vhdx", ".avhdx")
    carries = frozenset({"creator", "logical_sector_size", "physical_sector_size"})
    supports_backing = True
    in_place = True

    def options(self) -> type[Any]:
        from vmconv_vhdx.options import Options

        return Options

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) == b"vhdxfile"

    def options_of(self, image: Image) -> Any:
        from vmconv_vhdx.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_vhdx.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_vhdx.writer import write

        return write(image, options, placement, backing=backing)

    def qemu_incompatibility(self, image: Image) -> str | None:
        if image.parent_reference is not None:
            return "QEMU refuses differencing VHDX images"
        return "QEMU replays its log before it reads it, or refuses to" if image.details["dirty-flag"] else None

    def set_parent(self, image: Image, parent: Backing | None) -> Draft:
        from vmconv_vhdx.parent import set_parent

        return set_parent(image, parent)

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        from vmconv_vhdx.repair import repair

        return repair(image) if errors else None

    def check(self, image: Image) -> CheckReport:
        from vmconv_vhdx.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Vhdx()]
