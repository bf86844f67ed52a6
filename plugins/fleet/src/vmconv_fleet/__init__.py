"""Fleets: one catalogue of nodes, disks and conversions over many machines, single writer and many readers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.plugin import hookimpl

if TYPE_CHECKING:
    from vmconv.plugin import Command


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv_fleet.cli import fleet, node

    return [node.COMMAND, fleet.COMMAND]
