"""Makedumpfile's flattened format: a stream of pieces of a file, each with the offset it belongs to.

    0       "makedumpfile", type 1, version 1
    4096    pieces: offset and length (i64 each, big-endian), bytes; the last one has -1 for both

A later piece replaces an earlier one (makedumpfile, IMPLEMENTATION).
"""

from __future__ import annotations

import struct

import numpy as np

from vmconv.plugin import Columns, Extents, File, Kind, damaged, read_part

MAGIC = b"makedumpfile\0\0\0\0"
_HEADER = struct.Struct(">16sqq")
_PIECE = struct.Struct(">qq")
_FIRST = 4096
_MAX_PIECES = 1 << 20
_MAX_SIZE = 1 << 45


def flattened(file: File) -> tuple[Extents, int]:
    """Returns the table of the file in a flattened one, and where the stream ends.

    Raises `ImageError` if the stream has no end.
    """
    magic, kind, version = _HEADER.unpack(read_part(file, "header", 0, _HEADER.size))
    if (magic, kind, version) != (MAGIC, 1, 1):
        raise damaged(file, "header", 0, f"type {kind}, version {version} of a flattened file, only 1 and 1 are read")
    pieces: list[tuple[int, int, int]] = []
    at = _FIRST
    while True:
        offset, length = _PIECE.unpack(read_part(file, "piece", at, _PIECE.size))
        if offset == length == -1:
            break
        begin = at + _PIECE.size
        if offset < 0 or length <= 0 or offset + length > _MAX_SIZE or begin + length > file.size:
            raise damaged(file, "piece", at, f"{length} bytes for {offset:#x} reach past the end, or are none")
        if len(pieces) >= _MAX_PIECES:
            raise damaged(file, "piece", at, f"more than {_MAX_PIECES} pieces")
        pieces.append((offset, length, begin))
        at = begin + length
    return _table(file, pieces), at + _PIECE.size


def _table(file: File, pieces: list[tuple[int, int, int]]) -> Extents:
    """Returns the table of pieces, of which later ones replace earlier ones."""
    start, length, where = np.array(pieces, dtype=np.int64).reshape(-1, 3).T
    # Between two neighbouring edges, one piece counts: the last that covers it.
    edges = np.unique(np.concatenate([start, start + length]))
    owner = np.full(max(0, len(edges) - 1), -1, dtype=np.int64)
    low, high = np.searchsorted(edges, start), np.searchsorted(edges, start + length)
    if int((high - low).sum()) > 4 * _MAX_PIECES:
        raise damaged(file, "piece", _FIRST, "too many pieces replace others")
    for number, (first, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        owner[first:end] = number
    there = np.flatnonzero(owner >= 0)
    mine = owner[there]
    rows = Columns(
        edges[there],
        np.full(len(there), Kind.DATA, dtype=np.uint8),
        np.zeros(len(there), dtype=np.int32),
        where[mine] + edges[there] - start[mine],
    )
    size = int(edges[-1]) if len(edges) else 0
    return Extents.placed(size, rows, edges[there + 1] - edges[there], [file])
