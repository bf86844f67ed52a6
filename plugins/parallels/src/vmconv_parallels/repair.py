"""Repairs of a Parallels image: the mark of an open image, and unused space at the end."""

from __future__ import annotations

from vmconv.plugin import Draft, Image, Structure
from vmconv_parallels import structs
from vmconv_parallels.check import check
from vmconv_parallels.reader import read_header


def repair(image: Image, *, errors: bool) -> Draft:
    """Returns the file without the mark, unless there are other errors, and without what is unused at its end."""
    draft = Draft(image.file)
    header = read_header(image.file)
    report = check([header])
    if report.leak_count and report.corruption_count == header.in_use:
        draft.truncate(report.image_end)
    if errors and header.in_use and report.corruption_count == 1:
        draft.write(Structure(draft, structs.Header).offset_of("in_use"), bytes(4))
    return draft
