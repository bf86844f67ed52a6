"""The commands of core, registered by an entry point as a plugin's are."""

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
        machine,
        map,  # noqa: A004 modules are named as verbs
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
        machine,
        demo,
        completion,
    )
    return [module.COMMAND for module in modules]
