"""The conformance kit of VDI."""

from __future__ import annotations

from typing import ClassVar

from vmconv.model.facts import DiskFacts, Geometry
from vmconv.testing import FormatTests
from vmconv_vdi import Vdi

OPTIONS: tuple[dict[str, str], ...] = ({}, {"static": "on"})


class VdiKit(FormatTests):
    format = Vdi()
    sizes_differ = False
    variants = OPTIONS
    wrong_options = ({"static": "perhaps"}, {"static": "2"})
    facts: ClassVar[DiskFacts] = DiskFacts(geometry=Geometry(cylinders=1023, heads=16, sectors=63))
    ids = ("identity", "modification-uuid")
