"""Raw disks: the conformance kit, and what only storage can show."""

from __future__ import annotations

from vmconv_raw import Raw

from vmconv.testing import FormatTests


class TestRaw(FormatTests):
    format = Raw()
    has_signature = False
