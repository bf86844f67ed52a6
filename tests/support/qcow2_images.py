"""Builds the bytes of small qcow2 images by hand, sound or not, without the code under test.

The clusters of an image, in order: header with extensions and backing file name, refcount table, refcount block, L1
table, L2 table, payload of guest cluster 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
COPIED = 1 << 63
COMPRESSED = 1 << 62

REFCOUNT_TABLE, REFCOUNT_BLOCK, L1_TABLE, L2_TABLE, PAYLOAD = range(1, 6)
"""Cluster numbers."""

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
ENCRYPTION = 0x0537BE77
DATA_FILE = 0x44415441

DIRTY, CORRUPT, EXTERNAL_DATA, ZSTD, EXTENDED_L2 = 1, 2, 4, 8, 16
"""Incompatible features."""

_FIELDS = {
    "magic": "4s",
    "version": "I",
    "backing_file_offset": "Q",
    "backing_file_size": "I",
    "cluster_bits": "I",
    "size": "Q",
    "crypt_method": "I",
    "l1_size": "I",
    "l1_table_offset": "Q",
    "refcount_table_offset": "Q",
    "refcount_table_clusters": "I",
    "nb_snapshots": "I",
    "snapshots_offset": "Q",
    "incompatible_features": "Q",
    "compatible_features": "Q",
    "autoclear_features": "Q",
    "refcount_order": "I",
    "header_length": "I",
    "compression_type": "B7x",
}
_V2_FIELDS = 13


def field_place(name: str) -> tuple[int, int]:
    """Returns offset and length in bytes of a header field."""
    names = list(_FIELDS)
    before = ">" + "".join(_FIELDS[other] for other in names[: names.index(name)])
    return struct.calcsize(before), struct.calcsize(">" + _FIELDS[name])


def extension(kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a header extension; `length` is what it claims, if not the truth."""
    return struct.pack(">II", kind, len(data) if length is None else length) + data + bytes(-len(data) % 8)


def feature_name(bit: int, name: bytes, kind: int = 0) -> bytes:
    """Returns an entry of the table of feature names."""
    return struct.pack(">BB46s", kind, bit, name)


def compressed_entry(offset: int, sectors: int = 1, cluster_bits: int = CLUSTER_BITS) -> int:
    """Returns the L2 entry of compressed data at `offset` in that many 512-byte sectors."""
    return COMPRESSED | (sectors - 1) << (62 - (cluster_bits - 8)) | offset


def _cluster_size(cluster_bits: int | bytes) -> int:
    """Returns the size of the clusters that an image really has: where the header talks nonsense, the usual one."""
    return 1 << cluster_bits if isinstance(cluster_bits, int) and 9 <= cluster_bits <= 21 else CLUSTER


def header(*, extensions: bytes = b"", backing: str | bytes | None = None, **fields: int | bytes) -> bytes:
    """Returns the header of a disk of 16 clusters with what follows it in the first cluster; any field may be given."""
    cluster = _cluster_size(fields.get("cluster_bits", CLUSTER_BITS))
    values: dict[str, int | bytes] = {
        "magic": b"QFI\xfb",
        "version": 3,
        "cluster_bits": CLUSTER_BITS,
        "size": 16 * cluster,
        "l1_size": 1,
        "l1_table_offset": L1_TABLE * cluster,
        "refcount_table_offset": REFCOUNT_TABLE * cluster,
        "refcount_table_clusters": 1,
        "refcount_order": 4,
        "header_length": 112,
    }
    names = list(_FIELDS)[:_V2_FIELDS] if fields.get("version") == 2 else list(_FIELDS)
    layout = ">" + "".join(_FIELDS[name] for name in names)
    if backing is not None:
        name = backing.encode() if isinstance(backing, str) else backing
        after = extensions + extension(END)
        values |= {"backing_file_offset": struct.calcsize(layout) + len(after), "backing_file_size": len(name)}
        extensions = after + name
    values |= fields
    return struct.pack(layout, *(values.get(name, 0) for name in names)) + extensions


def image(
    *,
    l1: Sequence[int] | None = None,
    l2: Sequence[int] | None = None,
    payload: bytes | None = None,
    extensions: bytes = b"",
    backing: str | bytes | None = None,
    cluster_bits: int = CLUSTER_BITS,
    **fields: int | bytes,
) -> bytes:
    """Returns a whole image with one cluster of payload; entries of both tables and any header field may be given."""
    cluster = _cluster_size(cluster_bits)
    l1 = [COPIED | L2_TABLE * cluster] if l1 is None else l1
    l2 = [COPIED | PAYLOAD * cluster] if l2 is None else l2
    payload = b"\x5a" * cluster if payload is None else payload
    used = PAYLOAD + -(-len(payload) // cluster)
    counts = struct.pack(f">{used}H", *[1] * used) if used * 2 <= cluster else b""
    parts = [
        header(extensions=extensions, backing=backing, cluster_bits=cluster_bits, **fields),
        struct.pack(">Q", REFCOUNT_BLOCK * cluster),
        counts,
        struct.pack(f">{len(l1)}Q", *l1),
        struct.pack(f">{len(l2)}Q", *l2),
        payload,
    ]
    return b"".join(part.ljust(cluster, b"\0") for part in parts)


def empty_overlay(backing: str, backing_format: str | None = "raw", *, cluster_bits: int = 9) -> bytes:
    """Returns a tiny image that says nothing itself: the guest sees its backing file."""
    extensions = extension(BACKING_FORMAT, backing_format.encode()) if backing_format else b""
    return image(l1=[0], l2=[0], payload=b"", backing=backing, extensions=extensions, cluster_bits=cluster_bits)


def with_data_file(name: str) -> bytes:
    """Returns an image whose guest cluster 0 is the first cluster of the data file `name`."""
    return image(
        l2=[COPIED], payload=b"", extensions=extension(DATA_FILE, name.encode()), incompatible_features=EXTERNAL_DATA
    )
