"""Repairs of a qcow2 file: reference counts and COPIED flags follow from its tables; the tables themselves do not."""

from __future__ import annotations

from vmconv.plugin import Draft, Image, Structure
from vmconv_qcow2 import structs
from vmconv_qcow2.check import Check
from vmconv_qcow2.header import Header, read_header
from vmconv_qcow2.refcounts import drop_leaks, opened, settle


def repair(image: Image, *, errors: bool) -> Draft:
    """Returns the file with right reference counts; while there are errors that stay, only without leaks.

    Unreferenced clusters keep their bytes: they may be what damaged tables have lost. Nothing changes while a table
    does not tell its references: they would count as leaks, and the next writes would overwrite them.
    """
    header, draft = read_header(image.file), Draft(image.file)
    check = Check(header)
    report = check.report(header.size)
    if check.is_partial:
        return draft
    if errors or not report.corruption_count:
        settle(draft, opened(draft, header.size), header.size, frees=False)
    else:
        drop_leaks(draft, header.size)
    if errors and not Check(read_header(draft)).report(header.size).corruption_count:
        _clear_marks(draft, header)
    return draft


def _clear_marks(draft: Draft, header: Header) -> None:
    if header.incompatible & (structs.DIRTY | structs.CORRUPT):
        place = Structure(draft, structs.HeaderV3, structs.V2_LENGTH).offset_of("incompatible_features")
        draft.write(place, (header.incompatible & ~(structs.DIRTY | structs.CORRUPT)).to_bytes(8, "big"))
