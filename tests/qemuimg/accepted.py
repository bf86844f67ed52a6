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

BY_QEMU: dict[str, tuple[str, ...]] = {"271": ("resize",)}
"""Verbs that the real qemu-img answers in a test that depends on the places of metadata in its own images."""

ACCEPTED = (
    Accepted(
        r"^[-+]    \(\d+\.\d\d/100%\)$",
        "progress before the end: payload is shared in one step, and copied in larger ones",
        ("086",),
    ),
    Accepted(
        r"^-(Header extension:|magic +0x6803f857 \(Feature table\)|length +(384|336)|data +<binary>)?$"
        r"|^\+No such header extension$",
        "vmconv writes no table of the names of features into qcow2 headers",
        ("031", "036", "061"),
        ("qcow2",),
    ),
    Accepted(
        r"^[-+](0|0x[0-9a-f]+) +0x[0-9a-f]+ +TEST_DIR/",
        "rows of `map`: rebase takes no clusters that are equal in both parents, and commit places payload elsewhere",
        ("024", "097"),
        ("qcow2",),
    ),
    Accepted(
        r"^[-+]0 +0x(8dc00|82000) +0x[0-9a-f]+ +TEST_DIR/",
        "rows of `map`: resize makes a hole of the zeros behind the old end of the disk, in the middle of a cluster",
        ("292",),
        ("qcow2",),
    ),
    Accepted(
        r"^[-+](bitmap_(directory|table)_offset +0x|0 +serialized +65536 +\d+$"
        r'| +"(bitmap_(directory|table)_)?offset": \d+,?$)',
        "the places of metadata in an image that vmconv makes",
        ("303",),
        ("qcow2",),
    ),
    Accepted(
        r"^[-+]    (Icount: (0|18446744073709551615)|Unknown extra data: \ufffd*very important data)$",
        "the instruction count of a new snapshot, which is not known: -1, as the specification says; qemu-img writes 0",
        ("261",),
        ("qcow2",),
    ),
    Accepted(
        r"^[-+]Image end offset: \d+$",
        "commit of zeros drops the clusters of the base, and the end of its file with them",
        ("313",),
        ("qcow2",),
    ),
    Accepted(
        r"^[-+](Successfully reused|Failed to reuse) original clusters|^\+(Original|New) map:|^\+[\[ ]*\{ ",
        "map shows holes of the file where they are; QEMU only if the file has allocated less than the image counts",
        ("066",),
        ("qcow2",),
    ),
    Accepted(
        r"L1 table is too small|^\+(image|file format|virtual size|cluster_size|Snapshot list|ID +TAG|1 +foo)\b",
        "info describes an image by its header, and the L1 table is looked at when its disk is read",
        ("080",),
        ("qcow2",),
    ),
    Accepted(
        "^.Disk usage delta: ",
        "QEMU asks XFS to allocate at least 1 MiB at once for its images, vmconv does not",
        ("250",),
        ("qcow2",),
    ),
    Accepted(
        "^.fully allocated size: ",
        "the file of an image, measured as if it were raw, ends where its payload does: it has another length",
        ("190",),
        ("qcow2",),
    ),
    Accepted(
        r"^\+ERROR \(create\): (Image length|Host size) has grown",
        "resize lays payload out anew where blocks are shared: clusters that were preallocated and never written go",
        ("125",),
        ("qcow2",),
    ),
    Accepted(
        r"Could not create snapshot 'foo': -22|^-Leaked cluster|^-$|leaked clusters were found|^-This means waste|"
        r"^\+No errors were found",
        "a snapshot counts references anew, and so repairs a wrong refcount instead of failing at it",
        ("112",),
        ("qcow2",),
    ),
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
