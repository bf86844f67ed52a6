"""The conformance kit: tests for formats, machine formats and backends, and generators of disks and machines.

A plugin's test file is mostly one class::

    from vmconv.testing import FormatTests

    class TestQcow2(FormatTests):
        format = Qcow2()
        variants = ({}, {"cluster_size": "4K"})

A format without a writer subclasses `ReaderTests` and gives it an image. It needs pytest and hypothesis:
`pip install vmconv[testing]`. For detailed assertion messages, call
`pytest.register_assert_rewrite("vmconv.testing")` in the plugin's conftest.py before importing it.
"""

from vmconv.testing.backends import BackendTests
from vmconv.testing.disks import disk_of, image_file, make_in_memory, patterned, random_bytes
from vmconv.testing.formats import FormatTests
from vmconv.testing.machines import MachineTests, machines
from vmconv.testing.malformed import KINDS, Malformed, Sample
from vmconv.testing.ram import MemoryFormatTests, MemoryReaderTests, memory_of
from vmconv.testing.reading import ReaderTests
from vmconv.testing.samples import SampleImage, sample_disk, sample_images
from vmconv.testing.storage import StorageFormatTests
from vmconv.testing.strategies import disks, tables

__all__ = [
    "KINDS",
    "BackendTests",
    "FormatTests",
    "MachineTests",
    "Malformed",
    "MemoryFormatTests",
    "MemoryReaderTests",
    "ReaderTests",
    "Sample",
    "SampleImage",
    "StorageFormatTests",
    "disk_of",
    "disks",
    "image_file",
    "machines",
    "make_in_memory",
    "memory_of",
    "patterned",
    "random_bytes",
    "sample_disk",
    "sample_images",
    "tables",
]
