"""The conformance kit of ELF cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vmconv.testing import MemoryFormatTests
from vmconv_memory import ElfCore

NOTE = b"\5\0\0\0\4\0\0\0\1\0\0\0CORE\0\0\0\0abcd"
"""A note of the registers of one processor, which are four bytes here."""


class ElfcoreKit(MemoryFormatTests):
    format = ElfCore()
    variants = ({}, {"machine": "x86_64"})
    wrong_options = ({"machine": "vax"}, {"machine": "62"})
    # The number of the processor in ELF, and one note.
    state: ClassVar[Mapping[str, bytes]] = {"ELF notes": b"\x3e\0" + NOTE}
