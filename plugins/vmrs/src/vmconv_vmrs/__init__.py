"""Memory in saved states of Hyper-V for vmconv."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import CheckReport, Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import File, Image, Opener


class Vmrs(Format):
    name = "vmrs"
    title = "Hyper-V saved state"
    kind = "memory"
    suffixes = (".vmrs",)
    can_write = False

    def probe(self, file: File) -> bool:
        """True if one of the headers is there, and the name is not that of a configuration, which has the same."""
        signature = (0x01282014).to_bytes(4, "little")
        return (
            file.size >= 8192
            and not file.path.lower().endswith(".vmcx")
            and any(file.read(at, 4) == signature for at in (0, 4096))
        )

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_vmrs.reader import read

        return read(file, snapshot=snapshot)

    def check(self, image: Image) -> CheckReport:
        # The reader checks all structure; whatever it refuses is the finding.
        table = image.guest
        return CheckReport(total_clusters=0, image_end=max(image.file.size, 0) if table.size else 0)

    def qemu_incompatibility(self, image: Image) -> str | None:
        return "QEMU has no driver for memory images"


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Vmrs()]
