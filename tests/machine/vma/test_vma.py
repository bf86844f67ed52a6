"""The conformance kit for Proxmox's backups."""

from __future__ import annotations

from vmconv.testing import MachineTests
from vmconv_vma import Vma


class TestVma(MachineTests):
    format = Vma()
