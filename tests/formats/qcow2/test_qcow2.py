"""qcow2: the conformance kit, and what QEMU makes of it."""

from __future__ import annotations

from support.kits.qcow2 import Qcow2Kit
from support.kits.storage import OnStorage


class TestQcow2(Qcow2Kit):
    """The conformance kit."""


class TestQcow2OnStorage(OnStorage):
    format = Qcow2Kit.format
    variants = (
        {},
        {"cluster_size": "512"},
        {"cluster_size": "4K"},
        {"cluster_size": "2M"},
        {"compat": "0.10"},
        {"refcount_bits": "1"},
        {"extended_l2": "on"},
    )
    written_by_qemu = variants
    made_by_qemu = ({}, {"cluster_size": "4K"}, {"compat": "0.10"})
    in_place = ({}, {"compat": "0.10"})
