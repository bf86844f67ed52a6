"""Disks and planned files as rows of letters in records, for the pictures of the console.

A letter tells what most of one part is. All parts are equal, and a part with any payload shows payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmconv.api import Plan, strips
    from vmconv.plugin import Image

PARTS = 160
MAX_FILES = 4
"""Files of a plan that are drawn."""
_MAX_TITLE = 200
_LETTERS = {"hole": "h", "zero": "z", "metadata": "m", "shared": "s", "copied": "c"}
_OWN, _BELOW, _COMPRESSED = "p", "b", "k"


def of_disk(image: Image) -> dict[str, Any]:
    """Returns the guest's disk in an image, with all layers."""
    from vmconv.api import strips

    return _record(strips.of_disk(image, PARTS))


def of_plan(plan: Plan) -> list[dict[str, Any]]:
    """Returns the files that a plan makes, the first ones."""
    from vmconv.api import strips

    return [_record(one) for one in strips.of_plan(plan, PARTS)[:MAX_FILES]]


def _record(one: strips.Strip) -> dict[str, Any]:
    letters = [_letter(category.look) for category in one.categories]
    parts = "".join(letters[category] for category in one.category.tolist())
    return {"title": one.title[:_MAX_TITLE], "size": one.size, "parts": parts}


def _letter(look: str) -> str:
    """Returns the letter of a look; all layers below the first have one."""
    if look.startswith("compressed"):
        return _COMPRESSED
    return _LETTERS.get(look, _OWN if look == "layer0" else _BELOW)
