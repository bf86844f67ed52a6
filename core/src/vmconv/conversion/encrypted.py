"""Encrypted payload of a result: proved by its places, its cipher and its key, without decrypting any."""

from __future__ import annotations

from collections.abc import Mapping

from vmconv.model.extents import Extents
from vmconv.model.sources import Decoded, Encrypted, Source


def as_decrypted(table: Extents, layouts: Mapping[int, Extents]) -> Extents:
    """Returns a result's table with windows onto what the writer has encrypted, where the reader decrypts it.

    The reader derives cipher and key from the result, and sectors are numbered by their place. So equal places with
    equal ciphers are equal payload. `layouts` are the tables of the result's files, by the id of the file object.
    """
    for result in table.sources:
        if isinstance(result, Decoded) and result.cipher and id(result.file) in layouts:
            table = table.through(result, _plain(layouts[id(result.file)], result, result.cipher))
    return table


def _plain(layout: Extents, result: Source, cipher: str) -> Extents:
    """Returns the table of a result's file as the reader decrypts it: of other ciphers and keys, its own bytes."""
    plain = Extents.whole(result)
    for index, source in enumerate(layout.sources):
        if isinstance(source, Encrypted) and source.cipher == cipher:
            # Only bytes at their own place have the sector's number that they were encrypted with.
            rows = (layout.source == index) & (layout.offset == layout.start)
            if rows.any():
                whole = source.plain.window(0, plain.size)
                plain = plain.replaced(whole, layout.start[rows], (layout.end - layout.start)[rows])
    return plain
