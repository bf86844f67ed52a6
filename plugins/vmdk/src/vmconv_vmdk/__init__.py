"""VMDK images for vmconv: VMware's virtual disks."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl
from vmconv_vmdk.title import is_descriptor

if TYPE_CHECKING:
    from vmconv.plugin import Backing, CheckReport, Draft, File, Image, Layout, Opener, Placement

_SIGNATURES = (b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0")
_HEAD = 4096
_SECTOR = 512


class Vmdk(Format):
    name = "vmdk"
    title = "VMware virtual disk"
    suffixes = (".vmdk",)
    carries = frozenset({"adapter_type", "geometry"})
    supports_backing = True
    in_place = True
    compressing = MappingProxyType({"subformat": "streamOptimized"})
    # The offset of a compressed grain depends on all grains before it.
    not_mountable = frozenset({"reference", "streamOptimized"})

    def options(self) -> type[Any]:
        from vmconv_vmdk.options import Options

        return Options

    def probe(self, file: File) -> bool:
        head = file.read(0, min(file.size, _HEAD))
        return head.startswith(_SIGNATURES) or is_descriptor(head)

    def options_of(self, image: Image) -> Any:
        from vmconv_vmdk.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_vmdk.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_vmdk.writer import write

        return write(image, options, placement, backing=backing)

    def file_names(self, options: Any, name: str, size: int) -> tuple[str, ...]:
        from vmconv_vmdk.options import MAX_SECTORS, extent_names

        sectors = -(-size // _SECTOR)
        # The writer refuses larger disks.
        return (*(extent_names(options, name, sectors) if sectors <= MAX_SECTORS else ()), name)

    def qemu_incompatibility(self, image: Image) -> str | None:
        from vmconv_vmdk.reader import qemu_incompatibility

        return qemu_incompatibility(image)

    def set_parent(self, image: Image, parent: Backing | None) -> Draft:
        from vmconv_vmdk.parent import set_parent

        return set_parent(image, parent)

    def check(self, image: Image) -> CheckReport:
        from vmconv_vmdk.check import check
        from vmconv_vmdk.reader import VmdkImage

        assert isinstance(image, VmdkImage)
        return check(image.extents(), 0 if image.is_extent else image.file.size)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Vmdk()]
