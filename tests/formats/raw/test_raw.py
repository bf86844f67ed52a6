"""Raw disks: the conformance kit, and what only storage can show."""

from __future__ import annotations

from vmconv.testing import FormatTests
from vmconv_raw import Raw


class TestRaw(FormatTests):
    format = Raw()
    has_signature = False
