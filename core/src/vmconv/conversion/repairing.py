"""Repairs of an image's structure where it lies."""

from __future__ import annotations

from typing import NamedTuple

from vmconv.conversion import editing
from vmconv.errors import VmconvError
from vmconv.inspect.checking import check_image
from vmconv.interface.arguments import Repairing
from vmconv.interface.format import CheckReport, Format
from vmconv.model.extents import Extents
from vmconv.model.image import Image


class Repaired(NamedTuple):
    """The checks before and after a repair, and the bytes that it wrote."""

    before: CheckReport
    after: CheckReport
    written: int = 0

    @property
    def leaks(self) -> int:
        """The number of leaked clusters that were repaired."""
        return max(0, self.before.leak_count - self.after.leak_count)

    @property
    def corruptions(self) -> int:
        """The number of errors that were repaired."""
        return max(0, self.before.corruption_count - self.after.corruption_count)


def repair(asked: Repairing) -> Repaired | None:
    """Repairs what follows from the rest of the image; None if there is no structure to check."""
    with editing.opened(asked.editing, repeatable=True) as (image, one, opener):
        before = check_image(image, opener)
        if before is None:
            return None
        draft = one.repair(image, errors=asked.what == "all")
        if draft is None or not draft.is_changed:
            return Repaired(before, before)
        table = _table(image)

        def agrees(made: Image) -> str | None:
            return _worse(one, before, made) or _other_content(table, made)

        done = editing.carry_out(image, draft, opener, asked.editing, keeps_content=True, agrees=agrees)
    with editing.opened(asked.editing, repeatable=True) as (image, _, opener):
        return Repaired(before, check_image(image, opener) or before, done.written)


def _table(image: Image) -> Extents | None:
    """Returns the table of the layer; None if it cannot be read."""
    try:
        return image.guest
    except VmconvError:
        return None


def _worse(one: Format, before: CheckReport, made: Image) -> str | None:
    after = one.check(made) or before
    if after.corruption_count > before.corruption_count or after.leak_count > before.leak_count:
        return (*after.corruptions, *after.leaks)[0]
    return None


def _other_content(table: Extents | None, made: Image) -> str | None:
    if table is None or editing.same_table(table, made.guest):
        return None
    return "the guest has another table"
