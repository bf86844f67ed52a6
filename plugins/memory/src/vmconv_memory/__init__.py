"""Memory images of virtual machines for vmconv."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmconv.plugin import CheckReport, Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Backing, File, Image, Layout, Opener, Placement


class MemoryFormat(Format):
    """A format of memory: the check reads all tables, and no image has a parent."""

    kind = "memory"

    def check(self, image: Image) -> CheckReport:
        # Readers check all structure; whatever they refuse is the finding, and what they warn of cannot be decided.
        table = image.guest
        end = max(image.file.size, 0) if table.size else 0
        return CheckReport(total_clusters=0, image_end=end, doubts=tuple(image.warnings))

    def qemu_incompatibility(self, image: Image) -> str | None:
        return "QEMU has no driver for memory images"


class Ram(MemoryFormat):
    name = "ram"
    title = "raw memory: offsets are physical addresses"
    suffixes = (".ram", ".mem")
    plain_suffixes = frozenset(suffixes)
    keeps_holes = False

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.ram import read

        return read(file, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_memory.ram import write

        return write(image)


class ElfCore(MemoryFormat):
    name = "elfcore"
    title = "ELF core of a machine"
    suffixes = (".elf", ".core", ".vmcore", ".dump")
    carries_state = frozenset({"ELF notes"})

    def options(self) -> type[Any]:
        from vmconv_memory.options import ElfOptions

        return ElfOptions

    def probe(self, file: File) -> bool:
        head = file.read(0, min(file.size, _TYPED_ELF))
        if len(head) < _TYPED_ELF and file.path.lower().endswith(self.suffixes):
            # Cut before the type: the reader says where.
            return head[:4] == b"\x7fELF"
        # e_type, in the byte order of e_ident: a core. Programs and libraries are others.
        return head[:4] == b"\x7fELF" and (head[5:6], head[16:]) in ((b"\1", b"\4\0"), (b"\2", b"\0\4"))

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.elf import read

        return read(file, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_memory.elf_writer import write

        return write(image, options, placement)


_TYPED_ELF = 18
"""Bytes up to e_type."""


class Lime(MemoryFormat):
    name = "lime"
    title = "LiME memory image"
    suffixes = (".lime",)

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) == b"EMiL\1\0\0\0"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.lime import read

        return read(file, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_memory.lime import write

        return write(image, placement)


class Avml(MemoryFormat):
    name = "avml"
    title = "AVML memory image, compressed"
    suffixes = (".avml",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) == b"AVML\2\0\0\0"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.avml import read

        return read(file, snapshot=snapshot)


class Vmem(MemoryFormat):
    name = "vmem"
    title = "VMware memory with its saved state"
    suffixes = (".vmss", ".vmsn", ".vmem")
    plain_suffixes = frozenset({".vmem"})

    def probe(self, file: File) -> bool:
        magic = file.read(0, min(file.size, 4))
        return magic in (b"\xd0\xbe\xd2\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xbe\xd2\xbe", b"\xd3\xbe\xd3\xbe")

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.vmware import read

        return read(file, opener, snapshot=snapshot)

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        from vmconv_memory.vmware_writer import write

        return write(image, placement)

    def file_names(self, options: Any, name: str, size: int) -> tuple[str, ...]:
        from vmconv_memory.vmware_writer import beside_of

        return beside_of(name)[0], name


class Kdump(MemoryFormat):
    name = "kdump"
    title = "kdump-compressed dump of makedumpfile or QEMU"
    suffixes = (".kdump",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.read(0, min(file.size, 16)).startswith((b"KDUMP   ", b"makedumpfile\0\0\0\0"))

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.kdump import read

        return read(file, snapshot=snapshot)

    def check(self, image: Image) -> CheckReport:
        from vmconv_memory.kdump import KdumpImage

        found = super().check(image)
        return found._replace(doubts=(*found.doubts, *image.behind)) if isinstance(image, KdumpImage) else found


class Qevm(MemoryFormat):
    name = "qevm"
    title = "QEMU migration stream, with mapped RAM too"
    suffixes = (".mig", ".qemusave")
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= 8 and file.read(0, 8) == b"QEVM\0\0\0\3"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.qemu import read

        return read(file, snapshot=snapshot)


class LibvirtSave(MemoryFormat):
    name = "libvirtsave"
    title = "libvirt saved machine"
    suffixes = (".save",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.read(0, min(file.size, 16)) == b"LibvirtQemudSave"

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_memory.libvirt import read

        return read(file, snapshot=snapshot)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Ram(), ElfCore(), Lime(), Avml(), Vmem(), Kdump(), Qevm(), LibvirtSave()]
