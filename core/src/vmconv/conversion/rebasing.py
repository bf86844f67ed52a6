"""Another parent for a layer, by its stored name alone."""

from __future__ import annotations

import os

from vmconv.conversion import editing
from vmconv.errors import UsageError
from vmconv.interface.arguments import Rebasing
from vmconv.io.registry import installed
from vmconv.model.image import Image
from vmconv.model.layout import Backing


def rebase_unsafely(asked: Rebasing) -> editing.Edited:
    """Changes the stored name and format of the parent, which is not opened; without a name removes them.

    Raises `PlanError` if the format has no parents, or no room for the name.
    """
    parent = _parent(asked)
    with editing.opened(asked.editing, repeatable=True) as (image, one, opener):
        editing.refuse_corrupt(image, one.check(image))
        table = image.guest
        draft = one.set_parent(image, parent)

        def agrees(made: Image) -> str | None:
            if _plain(made.parent_reference) != _plain(parent.reference if parent else None):
                return f"the parent is {made.parent_reference!r}"
            if not editing.same_table(table, made.guest):
                return "the layer has another table"
            return editing.damage(one, made)

        return editing.carry_out(image, draft, opener, asked.editing, keeps_content=True, agrees=agrees)


def _plain(name: str | None) -> str | None:
    """Returns a name without the steps that Windows' paths in images lose."""
    return None if name is None else os.path.normpath(name)


def _parent(asked: Rebasing) -> Backing | None:
    """Returns the new parent, None if there will be none. Raises `UsageError` for a name without a format."""
    if not asked.backing_file:
        return None
    if asked.backing_format is None:
        raise UsageError(
            f"-b {asked.backing_file}: its format is not known, because it is not opened", hint="-F names the format"
        )
    return Backing(asked.backing_file, installed().format(asked.backing_format).name)
