"""Views for vmconv: images in other formats that can be read without converting them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Command


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv_view import mounting, serving

    return [mounting.COMMAND, serving.COMMAND]
