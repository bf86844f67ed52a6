"""Raw disks: the conformance kit, and what only storage can show."""

from __future__ import annotations

from support.kits.raw import RawKit
from support.kits.storage import OnStorage


class TestRaw(RawKit):
    """The conformance kit."""


class TestRawOnStorage(OnStorage):
    format = RawKit.format
