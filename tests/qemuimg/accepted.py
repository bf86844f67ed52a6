"""What is run of QEMU's tests, and the differences from its answers that are accepted, each with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Accepted(NamedTuple):
    """Lines that may differ, by a pattern: in `tests` and `formats`, or in all where these are empty."""

    pattern: str
    reason: str
    tests: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


FORMATS = ("raw", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "qcow2")

TESTS = tuple((Path(__file__).parent / "tests.txt").read_text().split())
"""The tests, by QEMU's names; one that does not suit a format is left out there."""

LEFT_OUT: dict[tuple[str, str], str] = {}
"""Tests, by format, that are not run, and why."""

BY_QEMU: dict[str, tuple[str, ...]] = {}
"""Verbs that the real qemu-img answers in a test that depends on the places of metadata in its own images."""

ACCEPTED = (
    Accepted(
        "^.disk image file size in bytes: ",
        "payload of a VDI that vmconv makes begins at 1 MiB, where blocks can be shared",
        ("084",),
        ("vdi",),
    ),
    Accepted(
        r"too many blocks|^\+(image|file format|virtual size|cluster_size): ",
        "QEMU limits the number of blocks that a VDI states; vmconv reads as many as the disk has",
        ("084",),
        ("vdi",),
    ),
)
