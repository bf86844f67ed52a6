"""VMDK images for vmconv: VMware's virtual disks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.formats import Format
from vmconv.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.formats import CheckReport
    from vmconv.image import Image
    from vmconv.layout import Backing, Layout, Placement
    from vmconv.opener import Opener
    from vmconv.sources import File

_SIGNATURES = (b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0")
_HEAD = 4096
_TITLE = re.compile(rb"#\s*disk\s*descriptor\s*file", re.IGNORECASE)
_VERSION = re.compile(rb"version\s*=\s*\d+", re.IGNORECASE)


class Vmdk(Format):
    name = "vmdk"
    title = "VMware virtual disk"
    suffixes = (".vmdk",)
    carries = frozenset({"adapter_type", "geometry"})
    can_back = True
    in_place = True
    # Where a compressed grain lies is known when all before it are compressed.
    unviewed = frozenset({"reference", "streamOptimized"})

    def options(self) -> type[Any]:
        from vmconv_vmdk.options import Options

        return Options

    def probe(self, file: File) -> bool:
        head = file.read(0, min(file.size, _HEAD))
        return head.startswith(_SIGNATURES) or is_descriptor(head)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_vmdk.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_vmdk.writer import write

        return write(image, options, placement, backing=backing)

    def unlike_qemu(self, image: Image) -> str | None:
        from vmconv_vmdk.reader import unlike_qemu

        return unlike_qemu(image)

    def check(self, image: Image) -> CheckReport:
        from vmconv_vmdk.check import check
        from vmconv_vmdk.reader import VmdkImage

        assert isinstance(image, VmdkImage)
        return check(image.extents(), 0 if image.is_extent else image.file.size)


def is_descriptor(head: bytes) -> bool:
    """True when these are the first bytes of a descriptor: its title, or blank lines, comments and then a version.

    QEMU wants the version and no title, VirtualBox the title; each writes what some of the others' readers refuse.
    """
    for line in map(bytes.strip, head.removeprefix(b"\xef\xbb\xbf").splitlines()):
        if _TITLE.match(line):
            return True
        if line and not line.startswith(b"#"):
            return _VERSION.fullmatch(line) is not None
    return False


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Vmdk()]
