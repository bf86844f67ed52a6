"""The commands that come with vmconv, registered by an entry point of core as those of plugins are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.interface.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.interface.command import Command


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv.cli import (
        backends,
        check,
        compare,
        completion,
        convert,
        demo,
        fanout,
        formats,
        info,
        map,  # noqa: A004 each module has the name of its verb
        plan,
        prove,
        recover,
        undo,
    )

    modules = (
        formats,
        backends,
        info,
        map,
        check,
        plan,
        convert,
        fanout,
        recover,
        undo,
        compare,
        prove,
        demo,
        completion,
    )
    return [module.COMMAND for module in modules]
