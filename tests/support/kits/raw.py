"""The conformance kit of raw disks."""

from __future__ import annotations

from vmconv.testing import FormatTests
from vmconv_raw import Raw


class RawKit(FormatTests):
    format = Raw()
    has_signature = False
