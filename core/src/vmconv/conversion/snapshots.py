"""Internal snapshots: taken, deleted, applied."""

from __future__ import annotations

import time

from vmconv.conversion import editing
from vmconv.interface.arguments import Snapshotting
from vmconv.interface.format import Format, SnapshotChange
from vmconv.io.opener import Opener
from vmconv.model.extents import Extents
from vmconv.model.image import Image


def change_snapshots(asked: Snapshotting) -> editing.Edited:
    """Takes, deletes or applies a snapshot. Raises `PlanError` if the format has none, or the image has no room."""
    # Repeating an interrupted edit would take a second snapshot, or delete one of the same name.
    with editing.opened(asked.editing, repeatable=False) as (image, one, opener):
        editing.refuse_corrupt(image, one.check(image))
        draft = one.change_snapshots(image, SnapshotChange(asked.verb, asked.name, time.time_ns()))
        wanted = _wanted(asked, image, one, opener)
        number = _count(image) + {"create": 1, "delete": -1, "apply": 0}[asked.verb]

        def agrees(made: Image) -> str | None:
            if _count(made) != number:
                return f"there are {_count(made)} snapshots, not {number}"
            if not editing.same_table(wanted, made.guest):
                return "the disk has another table"
            return editing.damage(one, made)

        keeps = asked.verb != "apply"
        return editing.carry_out(image, draft, opener, asked.editing, keeps_content=keeps, agrees=agrees)


def _wanted(asked: Snapshotting, image: Image, one: Format, opener: Opener) -> Extents:
    """Returns the table that the disk has afterwards."""
    if asked.verb == "apply":
        return one.read(image.file, opener, snapshot=asked.name).guest
    return image.guest


def _count(image: Image) -> int:
    return len(image.details.get("snapshots", ()))
