"""qcow2: the conformance kit, and what QEMU makes of it."""

from __future__ import annotations

from support.kits.qcow2 import Qcow2Kit


class TestQcow2(Qcow2Kit):
    """The conformance kit."""
