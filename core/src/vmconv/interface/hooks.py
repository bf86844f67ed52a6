"""The pluggy hooks of vmconv; they only register formats, backends, commands, schemes and machine formats.

A plugin is a distribution with an entry point in the group `vmconv`. The entry point names a module with functions
marked `hookimpl` and named as below.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vmconv.interface.backend import Backend
    from vmconv.interface.command import Command
    from vmconv.interface.format import Format
    from vmconv.interface.machines import MachineFormat
    from vmconv.interface.scheme import Scheme

GROUP = "vmconv"
MACHINE_GROUP = "vmconv.machines"
"""The entry points of plugins with machine formats, which commands for disks do not load."""

VMCONV_INTERFACE = 1
"""The version of `vmconv.plugin`; a plugin states the version it was written for under this name."""

OLDEST_INTERFACE = 1
"""The oldest supported version."""

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


@hookspec
def vmconv_register_schemes() -> Iterable[Scheme]:
    """Returns the schemes of URLs that this plugin can read from."""
    raise NotImplementedError


@hookspec
def vmconv_register_machines() -> Iterable[MachineFormat]:
    """Returns the machine formats that this plugin adds. Its entry point is in the group `vmconv.machines`."""
    raise NotImplementedError
