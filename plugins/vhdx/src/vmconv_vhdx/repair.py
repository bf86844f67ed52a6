"""Repairs of a VHDX file: its log is replayed, and damaged copies follow from the others."""

from __future__ import annotations

from vmconv.plugin import Draft, Image, fresh
from vmconv_vhdx import structs
from vmconv_vhdx.header import Header, doubtful_copies, read_header
from vmconv_vhdx.headers import next_header


def repair(image: Image) -> Draft:
    """Returns the file after the replay of its log, with two valid headers and region tables."""
    header, draft = read_header(image.file), Draft(image.file)
    if not header.replayed and not list(doubtful_copies(image.file)):
        return draft
    if header.replayed:
        _replay(draft, header)
    _copy_regions(draft)
    # Twice, so that neither header asks for a replay.
    for _ in structs.HEADER_OFFSETS:
        next_header(draft, log_guid=bytes(16), file_write_guid=fresh())
    return draft


def _replay(draft: Draft, header: Header) -> None:
    """Writes what the log has for the file, which may become longer."""
    for row in header.view:
        if row.source is not header.file:
            length = row.length if row.start < header.file.size or row.source else 0
            draft.write(row.start, row.source.read(row.offset, length) if row.source else bytes(length))
    draft.truncate(header.view.size)


def _copy_regions(draft: Draft) -> None:
    tables = [draft.read(at, structs.REGION_TABLE_LENGTH) for at in structs.REGION_TABLE_OFFSETS]
    sound = [data[:4] == b"regi" and int.from_bytes(data[4:8], "little") == structs.checksum(data) for data in tables]
    for at, is_sound in zip(structs.REGION_TABLE_OFFSETS, sound, strict=True):
        if not is_sound:
            draft.write(at, tables[sound.index(True)])
