"""Raw disks for vmconv: the file is the disk, byte for byte, and its holes read as zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, File, Image, Layout, Opener, Placement


class Raw(Format):
    name = "raw"
    title = "raw disk"
    suffixes = (".raw", ".img", ".dd")

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_raw.reader import read

        return read(file, snapshot=snapshot)

    def options(self) -> type[Any]:
        from vmconv_raw.options import Options

        return Options

    def options_of(self, image: Image) -> Any:
        return self.options()()

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_raw.writer import write

        return write(image, options)

    def qemu_incompatibility(self, image: Image) -> str | None:
        return None


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Raw()]
