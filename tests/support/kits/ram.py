"""The conformance kit of raw memory."""

from __future__ import annotations

from vmconv.testing import MemoryFormatTests
from vmconv_memory import Ram


class RamKit(MemoryFormatTests):
    format = Ram()
    has_signature = False
