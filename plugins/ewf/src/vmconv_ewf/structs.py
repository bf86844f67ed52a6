"""The structures of EWF, version 1, as in an E01 (libyal, "Expert Witness Compression Format specification").

    0    file header: signature, segment number
    13   sections: descriptor, content
         header2, header   zlib: a table of text about the case
         volume            size of the disk and of a chunk; `data` repeats it in later segments
         sectors           chunks: zlib, or as they are with an Adler-32 behind them
         table             offset of each chunk of the `sectors` before it; `table2` repeats it
         error2            sectors that could not be read
         digest, hash      SHA-1 and MD5 of the disk
         next              the last section of a segment that another follows
         done              the last section of the last segment

All numbers are little-endian. Checksums are Adler-32.
"""

from __future__ import annotations

import struct

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

SIGNATURE = b"EVF\t\r\n\xff\0"
SIGNATURE_2 = b"EVF2\r\n\x81\0"
"""Of version 2, Ex01."""

FileHeader = Struct(
    "signature" / Const(SIGNATURE), "fields_start" / Const(b"\1"), "segment" / Int16ul, "fields_end" / Const(b"\0\0")
)
FILE_HEADER_LENGTH = FileHeader.sizeof()

SECTION = struct.Struct("<16sQQ40xI")
"""Type, offset of the next section, size with the descriptor, checksum of what precedes it."""

Volume = Struct(
    "media_type" / Int8ul,
    Padding(3),
    "chunk_count" / Int32ul,
    "sectors_per_chunk" / Int32ul,
    "bytes_per_sector" / Int32ul,
    "sector_count" / Int64ul,
    Padding(12),
    "media_flags" / Int8ul,
    Padding(15),
    "compression_level" / Int8ul,
    Padding(3),
    "error_granularity" / Int32ul,
    Padding(4),
    "set_identifier" / Bytes(16),
    Padding(968),
    "checksum" / Int32ul,
)
VOLUME_LENGTH = Volume.sizeof()

TABLE = struct.Struct("<I4xQ4xI")
"""Number of entries, base of their offsets, checksum of what precedes it."""

COMPRESSED = 1 << 31
"""In an entry of a table: the chunk is compressed. The other bits are its offset from the base."""

CHECKSUM = struct.Struct("<I")

MD5_LENGTH, SHA1_LENGTH = 16, 20
DIGEST_LENGTH, HASH_LENGTH = 80, 36

# Limits that are ours: bounds for memory and time.

MIN_SECTOR, MAX_SECTOR = 512, 1 << 16
MAX_CHUNK = 16 << 20
MAX_ENTRIES = 1 << 20
"""Chunks of one table; EnCase writes 16375, ewfacquire at most 65534."""
MAX_SECTIONS = 1 << 16
"""Sections of one segment file."""
MAX_SEGMENTS = 14971
"""E01 to E99, then EAA to ZZZ."""
MAX_TEXT = 1 << 20
"""Bytes of a header, uncompressed."""

FIELDS = {
    "c": "case-number",
    "n": "evidence-number",
    "a": "description",
    "e": "examiner",
    "t": "notes",
    "m": "acquired",
    "u": "system-date",
    "ov": "acquired-on",
    "av": "acquired-by",
    "md": "model",
    "sn": "serial-number",
}
"""What the columns of a header mean."""
