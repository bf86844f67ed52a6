"""The commands of core, registered by an entry point as a plugin's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmconv.interface.hooks import hookimpl

if TYPE_CHECKING:
    from vmconv.interface.command import Command

COMMANDS = (
    ("formats", "list the formats that are installed, and those that could be"),
    ("backends", "show what each storage backend can do in a directory"),
    ("info", "describe an image"),
    ("map", "show where each range of the guest's disk lies"),
    ("check", "check the structure of an image"),
    ("plan", "show what a conversion would share, copy and write"),
    ("measure", "tell how large an image of a disk will be"),
    ("create", "make an image of an empty disk"),
    ("resize", "give a disk another size"),
    ("snapshot", "list, take, delete or apply internal snapshots"),
    ("bitmap", "change the persistent bitmaps of an image"),
    ("commit", "bring the content of a layer into its base"),
    ("rebase", "give a layer another parent"),
    ("convert", "convert a disk to another format"),
    ("fanout", "make images of one disk in several formats"),
    ("sync", "bring an image up to date with the disk that it was made of"),
    ("recover", "roll back or complete an interrupted conversion in place"),
    ("undo", "turn a disk back into what it was converted from in place"),
    ("compare", "compare what a guest sees of two disks"),
    ("prove", "prove by physical addresses that two images share their payload"),
    ("machine", "convert whole machines: configuration, firmware and disks"),
    ("demo", "convert a disk in every way that works here, with the proof"),
    ("plugin", "write the skeleton of a plugin"),
    ("completion", "print a completion script for a shell"),
)
"""Name and help of each command. The module of this name is imported when the command is used."""


@hookimpl
def vmconv_register_commands() -> Iterable[Command]:
    from vmconv.cli.verbs import command

    return [command("vmconv.cli", name, summary) for name, summary in COMMANDS]
