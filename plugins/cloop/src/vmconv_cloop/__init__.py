"""Compressed loop images (cloop) for vmconv: blocks compressed by zlib. Read-only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import Format, hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import CheckReport, File, Image, Opener

_SIGNATURE = b"#!/bin/sh\n#V2.0 Format\n"


class Cloop(Format):
    name = "cloop"
    title = "compressed loop image, version 2.0"
    suffixes = (".cloop",)
    can_write = False

    def probe(self, file: File) -> bool:
        return file.size >= len(_SIGNATURE) and file.read(0, len(_SIGNATURE)) == _SIGNATURE

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        from vmconv_cloop.reader import read

        return read(file, snapshot=snapshot)

    def check(self, image: Image) -> CheckReport:
        from vmconv_cloop.reader import check

        return check(image)


@hookimpl
def vmconv_register_formats() -> Iterable[Format]:
    return [Cloop()]
