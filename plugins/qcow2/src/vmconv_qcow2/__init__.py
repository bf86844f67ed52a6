"""qcow2 images for vmconv: QEMU's copy-on-write format, versions 2 and 3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import (
        Backing,
        BitmapChange,
        CheckReport,
        Column,
        Draft,
        File,
        Image,
        Layout,
        Opener,
        Placement,
        SnapshotChange,
        WritableLayer,
    )


class Qcow2(Format):
    name = "qcow2"
    title = "QEMU copy-on-write, versions 2 and 3"
    suffixes = (".qcow2",)
    supports_backing = True
    not_mountable = frozenset({"reference"})
    in_place = True
    keeps_bitmaps = True
    encrypts_with = "luks"
    compressing = MappingProxyType({"compress": "on"})

    def options(self) -> type[Any]:
        from vmconv_qcow2.options import Options

        return Options

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) in (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3")

    def options_of(self, image: Image) -> Any:
        from vmconv_qcow2.reader import options_of

        return options_of(image)

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_qcow2.reader import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_qcow2.writer import write

        return write(image, options, placement, backing=backing)

    def dirty_ranges(self, image: Image, bitmap: str) -> tuple[Column, Column]:
        from vmconv_qcow2.bitmaps import dirty_ranges

        return dirty_ranges(image, bitmap)

    def with_bitmaps(self, image: Image, *, skip_broken: bool) -> Image:
        from vmconv_qcow2.bitmaps import with_bitmaps

        return with_bitmaps(image, skip_broken=skip_broken)

    def bitmaps_size(self, image: Image, options: Any) -> int | None:
        from vmconv_qcow2.bitmaps import bitmaps_size

        return bitmaps_size(image, options)

    def keeps_source(self, options: Any) -> bool:
        return bool(options.subformat == "reference")

    def qemu_incompatibility(self, image: Image) -> str | None:
        from vmconv_qcow2.reader import qemu_incompatibility

        return qemu_incompatibility(image)

    def set_parent(self, image: Image, parent: Backing | None) -> Draft:
        from vmconv_qcow2.parent import set_parent

        return set_parent(image, parent)

    def open_layer(self, image: Image, descriptor: int) -> WritableLayer:
        from vmconv_qcow2.layer import open_layer

        return open_layer(image, descriptor)

    def change_bitmaps(self, image: Image, name: str, changes: Sequence[BitmapChange]) -> Draft:
        from vmconv_qcow2.bitmap_edits import change_bitmaps

        return change_bitmaps(image, name, changes)

    def change_snapshots(self, image: Image, change: SnapshotChange) -> Draft:
        from vmconv_qcow2.snapshots import change_snapshots

        return change_snapshots(image, change)

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        from vmconv_qcow2.repair import repair

        return repair(image, errors=errors)

    def check(self, image: Image) -> CheckReport:
        from vmconv_qcow2.check import check

        return check(image)


class Qcow(Format):
    name = "qcow"
    title = "QEMU copy-on-write, version 1"
    suffixes = (".qcow",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) == b"QFI\xfb\0\0\0\1"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_qcow2.version1 import read

        return read(file, opener, snapshot=snapshot)

    def qemu_incompatibility(self, image: Image) -> str | None:
        return None

    def check(self, image: Image) -> CheckReport:
        from vmconv_qcow2.version1 import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Qcow2(), Qcow()]
