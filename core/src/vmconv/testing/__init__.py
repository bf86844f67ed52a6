"""The conformance kit: what every format and every backend has to pass, and generators of disks to test with.

A plugin's test file is mostly one class::

    from vmconv.testing import FormatTests

    class TestQcow2(FormatTests):
        format = Qcow2()
        variants = ({}, {"cluster_size": "4K"})

It needs pytest and hypothesis: `pip install vmconv[testing]`. For useful failures, put
`pytest.register_assert_rewrite("vmconv.testing")` into the plugin's conftest.py before importing it.
"""

from vmconv.testing.backends import BackendTests
from vmconv.testing.disks import disk_of, image_file, make_in_memory, patterned, random_bytes
from vmconv.testing.formats import FormatTests
from vmconv.testing.malformed import KINDS, Malformed, Sample
from vmconv.testing.strategies import disks, tables

__all__ = [
    "KINDS",
    "BackendTests",
    "FormatTests",
    "Malformed",
    "Sample",
    "disk_of",
    "disks",
    "image_file",
    "make_in_memory",
    "patterned",
    "random_bytes",
    "tables",
]
