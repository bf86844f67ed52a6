"""Parallels disk images for vmconv: expandable images, and the descriptor of a disk with its snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, CheckReport, Draft, File, Image, Layout, Opener, Placement


class Parallels(Format):
    name = "parallels"
    title = "Parallels disk image"
    suffixes = (".hdd", ".hds")
    in_place = True

    def options(self) -> type[Any]:
        from vmconv_parallels.options import Options

        return Options

    def probe(self, file: File) -> bool:
        head = file.read(0, min(512, file.size))
        return head.startswith((b"WithoutFreeSpace", b"WithouFreSpacExt")) or is_descriptor(head)

    def options_of(self, image: Image) -> Any:
        if is_descriptor(image.file.read(0, min(512, image.file.size))):
            from vmconv.plugin import PlanError

            raise PlanError(f"{image.file.name}: is the descriptor of a disk, which vmconv does not write")
        from vmconv_parallels.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        if is_descriptor(file.read(0, min(512, file.size))):
            from vmconv_parallels.bundle import read_bundle

            return read_bundle(file, opener, snapshot=snapshot)
        from vmconv_parallels.reader import read

        return read(file, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_parallels.writer import write

        return write(image, options, placement)

    def qemu_incompatibility(self, image: Image) -> str | None:
        descriptor = is_descriptor(image.file.read(0, min(512, image.file.size)))
        return "QEMU does not read the descriptor of a Parallels disk" if descriptor else None

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        from vmconv_parallels.repair import repair

        return repair(image, errors=errors)

    def check(self, image: Image) -> CheckReport:
        from vmconv_parallels.bundle import headers_of
        from vmconv_parallels.check import check

        return check(headers_of(image))


def is_descriptor(head: bytes) -> bool:
    """True if these are the first bytes of a DiskDescriptor.xml."""
    return b"<Parallels_disk_image" in head and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Parallels()]
