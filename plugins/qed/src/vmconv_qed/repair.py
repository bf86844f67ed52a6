"""Repairs of a QED file: the request for a check is answered."""

from __future__ import annotations

from vmconv.plugin import Draft, Image, Structure
from vmconv_qed import structs
from vmconv_qed.check import check
from vmconv_qed.reader import read_header


def repair(image: Image) -> Draft:
    """Returns the file without the flag that requests a check, if there are no errors. Leaks stay."""
    header, draft = read_header(image.file), Draft(image.file)
    if header.features & structs.NEED_CHECK and not check(image).corruption_count:
        place = Structure(draft, structs.Header).offset_of("features")
        draft.write(place, (header.features & ~structs.NEED_CHECK).to_bytes(8, "little"))
    return draft
