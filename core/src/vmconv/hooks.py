"""The hooks of vmconv: each only registers things; plain typed calls on what was registered do the work.

A plugin is a distribution with an entry point in the group `vmconv` that names a module; in it, functions marked with
`hookimpl` and named as below.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vmconv.cli.command import Command
    from vmconv.formats import Format
    from vmconv.storage import Backend

GROUP = "vmconv"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def vmconv_register_formats() -> Iterable[Format]:
    """Returns the formats that this plugin adds."""
    raise NotImplementedError


@hookspec
def vmconv_register_backends() -> Iterable[Backend]:
    """Returns the storage backends that this plugin adds."""
    raise NotImplementedError


@hookspec
def vmconv_register_commands() -> Iterable[Command]:
    """Returns the subcommands that this plugin adds to the command line."""
    raise NotImplementedError
