"""Exports of XenServer and XCP-ng (XVA) for vmconv: a machine's records and its disks in one tar archive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vmconv.plugin import MachineFormat, hookimpl

if TYPE_CHECKING:
    from vmconv.machine import Machine
    from vmconv.plugin import File, Member, Opener

_FIRST = b"ova.xml\0"
_COMPRESSED = {".xva.gz": "gzip -d", ".xva.zst": "zstd -d", ".xva.xz": "xz -d"}


class Xva(MachineFormat):
    name = "xva"
    title = "XenServer and XCP-ng export (XVA)"
    suffixes = (".xva", *_COMPRESSED)
    is_package = True
    can_write = False

    def probe(self, file: File) -> bool:
        head = file.read(0, min(file.size, 512))
        if head.startswith((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0")):
            return file.path.lower().endswith(tuple(_COMPRESSED))
        return head.startswith(_FIRST) and head[257:262] == b"ustar"

    def read(self, file: File, opener: Opener) -> Machine:
        from vmconv_xva.reader import read

        self._refuse_compressed(file)
        return read(file)

    def members(self, file: File) -> Sequence[Member]:
        from vmconv_xva.archive import members

        self._refuse_compressed(file)
        return members(file)

    def _refuse_compressed(self, file: File) -> None:
        from vmconv.plugin import ImageError

        suffix = next((each for each in _COMPRESSED if file.path.lower().endswith(each)), None)
        if suffix and file.read(0, min(file.size, 8)) != _FIRST:
            hint = f"decompress it first: {_COMPRESSED[suffix]} {file.name}"
            raise ImageError(f"{file.name}: is compressed, and its pieces are read by reference", hint=hint)


@hookimpl
def vmconv_register_machines() -> Iterable[MachineFormat]:
    return [Xva()]
