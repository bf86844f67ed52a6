"""Exports of XenServer and XCP-ng (XVA) for vmconv: a machine's records and its disks in one tar archive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vmconv.plugin import MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import CheckReport, File, Member, NewFile, Opener, Progress

_FIRST = b"ova.xml\0"


class Xva(MachineFormat):
    name = "xva"
    title = "XenServer and XCP-ng export (XVA)"
    suffixes = (".xva", ".xva.gz", ".xva.zst", ".xva.xz")
    is_package = True
    can_write = False

    def probe(self, file: File) -> bool:
        from vmconv.plugin import decoded_head

        # `xe vm-export compress=zstd` writes to any name, such as web.xva.
        return any(_is_first(head) for head in (file.read(0, min(file.size, 512)), decoded_head(file, 512)))

    def compression(self, file: File) -> str | None:
        from vmconv.plugin import compression_of

        return compression_of(file)

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_xva import archive, decoding
        from vmconv_xva.reader import read

        return read(file, decoding.Stream(file).config if self.compression(file) else archive.config_of(file))

    def members(self, file: File) -> Sequence[Member]:
        from vmconv_xva import archive, decoding

        return decoding.members(file) if self.compression(file) else archive.members(file)

    def decode(self, file: File, create: Callable[[str, int], NewFile], progress: Progress | None) -> Sequence[Member]:
        from vmconv_xva.decoding import decode

        return decode(file, create, progress)

    def check_payload(self, file: File, progress: Progress | None = None, *, sample: bool = False) -> CheckReport:
        from vmconv_xva import checksums, decoding

        if self.compression(file):
            return decoding.check(file, progress)
        return checksums.check(file, progress, sample=sample)


def _is_first(head: bytes) -> bool:
    return head.startswith(_FIRST) and head[257:262] == b"ustar"


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Xva()]
