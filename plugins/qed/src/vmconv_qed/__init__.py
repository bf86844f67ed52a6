"""QED images for vmconv: QEMU's enhanced disk, a format between qcow and qcow2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, CheckReport, Draft, File, Image, Layout, Opener, Placement


class Qed(Format):
    name = "qed"
    title = "QEMU enhanced disk"
    suffixes = (".qed",)
    supports_backing = True

    def options(self) -> type[Any]:
        from vmconv_qed.options import Options

        return Options

    def probe(self, file: File) -> bool:
        return file.size >= 4 and file.read(0, 4) == b"QED\0"

    def options_of(self, image: Image) -> Any:
        from vmconv_qed.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_qed.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_qed.writer import write

        return write(image, options, placement, backing=backing)

    def qemu_incompatibility(self, image: Image) -> str | None:
        return None

    def set_parent(self, image: Image, parent: Backing | None) -> Draft:
        from vmconv_qed.parent import set_parent

        return set_parent(image, parent)

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        from vmconv_qed.repair import repair

        return repair(image)

    def check(self, image: Image) -> CheckReport:
        from vmconv_qed.check import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Qed()]
