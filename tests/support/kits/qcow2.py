"""The conformance kit of qcow2."""

from __future__ import annotations

from vmconv.testing import FormatTests
from vmconv_qcow2 import Qcow2


class Qcow2Kit(FormatTests):
    format = Qcow2()
    variants = (
        {},
        {"cluster_size": "512"},
        {"cluster_size": "4K", "refcount_bits": "1"},
        {"cluster_size": "2M", "refcount_bits": "64"},
        {"compat": "0.10"},
        {"extended_l2": "on"},
        {"extended_l2": "on", "cluster_size": "16K", "lazy_refcounts": "on"},
        {"refcount_bits": "4"},
    )
    wrong_options = (
        {"cluster_size": "3K"},
        {"cluster_size": "4M"},
        {"cluster_size": "big"},
        {"refcount_bits": "3"},
        {"extended_l2": "on", "cluster_size": "4K"},
        {"extended_l2": "on", "compat": "0.10"},
        {"lazy_refcounts": "perhaps"},
        {"compat": "2.0"},
        {"subformat": "thin"},
        {"data_file": ""},
        {"data_file_raw": "on"},
        {"data_file": "disk.raw", "compat": "0.10"},
        {"data_file": "disk.raw", "subformat": "reference"},
    )
