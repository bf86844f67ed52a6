"""VDI images for vmconv: VirtualBox's own format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, CheckReport, Draft, File, Image, Layout, Opener, Placement


class Vdi(Format):
    name = "vdi"
    title = "VirtualBox disk image"
    suffixes = (".vdi",)
    carries = frozenset({"geometry"})
    supports_backing = True

    def options(self) -> type[Any]:
        from vmconv_vdi.options import Options

        return Options

    def probe(self, file: File) -> bool:
        return file.size >= 72 and file.read(64, 4) == b"\x7f\x10\xda\xbe"

    def options_of(self, image: Image) -> Any:
        from vmconv_vdi.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_vdi.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_vdi.writer import write

        return write(image, options, placement, backing=backing)

    def qemu_incompatibility(self, image: Image) -> str | None:
        from vmconv_vdi.reader import qemu_incompatibility

        return qemu_incompatibility(image)

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        from vmconv_vdi.repair import repair

        return repair(image) if errors else None

    def check(self, image: Image) -> CheckReport:
        from vmconv_vdi.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Vdi()]
