"""The structural check of a LUKS container: headers, key slots and payload lie apart. Needs no passphrase."""

from __future__ import annotations

from vmconv.plugin import CheckReport, Findings, Image, Usage
from vmconv_luks import structs
from vmconv_luks.reader import LuksImage


def check(image: Image) -> CheckReport:
    """Returns the report; the reader has checked all numbers, and the checksums of LUKS 2."""
    assert isinstance(image, LuksImage)
    volume, findings, usage = image.volume, Findings(), Usage()
    for name, offset, length in volume.areas:
        usage.add(name, [offset], length)
    findings.overlaps(usage, structs.SECTOR)
    for warning in volume.warnings:
        findings.doubt(warning)
    if not volume.slots:
        findings.corrupt("no key slot is in use: nobody can decrypt the disk")
    sectors = volume.size // volume.sector
    return findings.report(allocated=sectors, total=sectors, end=volume.payload + volume.size)
