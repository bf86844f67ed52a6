"""Verifies a new machine before its files are named: disks by their tables, the configuration by reading it back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmconv.conversion.verify import verify as verify_disks
from vmconv.errors import VerifyError, VmconvError
from vmconv.inspect.comparison import first_difference
from vmconv.io.opener import Opener
from vmconv.io.registry import Registry
from vmconv.machine.paths import restricted, stated
from vmconv.model.planned import PlannedFile
from vmconv.model.sources import File

if TYPE_CHECKING:
    from vmconv.interface.arguments import Verify
    from vmconv.interface.machines import ConfigFile
    from vmconv.machine.layout import NewDisk, NewMachine
    from vmconv.machine.model import Machine
    from vmconv.machine.target import Target
    from vmconv.model.extents import Extents
    from vmconv.model.plan import Progress

_CHUNK = 4 << 20


def verify(
    made: NewMachine, files: Sequence[File], target: Target, registry: Registry, mode: Verify, progress: Progress | None
) -> None:
    """Raises `VerifyError` unless the finished files hold the machine.

    `files` are in the order of the plan: each disk's files, then the small files, the configuration last.
    """
    if made.package is None:
        disks, small = files[: len(files) - len(made.configs)], files[len(files) - len(made.configs) :]
    else:
        disks, small = _members(made, files[-1], target, mode)
    verify_configs(made, small, target, files[-1])
    containers = [each for disk in made.disks if not disk.is_kept for each in disk.containers]
    verify_disks(containers, disks, registry, mode, progress)


def verify_configs(made: NewMachine, small: Sequence[File], target: Target, config: File) -> None:
    """Raises `VerifyError` unless the small files have the planned bytes, and `config` is read as planned."""
    for planned, file in zip(made.configs, small, strict=True):
        _check_bytes(planned, file)
    _check_machine(made, config, target)


def _members(made: NewMachine, package: File, target: Target, mode: Verify) -> tuple[list[File], list[File]]:
    """Returns the new disks and the small files of a package, as its reader finds them in the finished file."""
    found, tables = {}, {}
    for member in target.format.members(package):
        tables[member.name] = member.table
        found[member.name] = PlannedFile(os.path.join(package.path, member.name), member.table)
    config = next(iter(found.values()), None)
    if config is None:
        raise VerifyError(f"{package.name}: has no members")
    try:
        for disk in (disk for disk in made.disks if disk.is_kept):
            _check_kept(disk, tables[disk.container.name], package, made, mode)
        disks: list[File] = [found[disk.container.name] for disk in made.disks if not disk.is_kept]
        small: list[File] = [found[each.name] for each in made.configs[:-1]]
    except KeyError as exc:
        raise VerifyError(f"{package.name}: has no member {exc}") from exc
    # The configuration comes first in a package, and its reader finds it there.
    return disks, [*small, config]


def _check_kept(disk: NewDisk, found: Extents, package: File, made: NewMachine, mode: Verify) -> None:
    """Raises `VerifyError` unless a member of the finished package has all bytes of the source's image."""
    name, wanted = disk.container.name, disk.container.layout.files[-1].table
    if made.package is None or found.size != wanted.size:
        raise VerifyError(f"{name}: the result has {found.size} bytes, the source {wanted.size}")
    where = first_difference(found.through(package, made.package), wanted)
    if where is None and mode != "metadata":
        where = next(
            (at for at in range(0, found.size, _CHUNK) if _chunk(found, at) != _chunk(wanted, at)),
            None,
        )
    if where is not None:
        raise VerifyError(f"{name}: the result differs from the source at {where:#x} of the file")


def _chunk(table: Extents, at: int) -> bytes:
    return table.read(at, min(_CHUNK, table.size - at))


def _check_bytes(config: ConfigFile, file: File) -> None:
    # A package pads its configuration with white space.
    content = file.read(0, file.size) if file.size <= 2 * len(config.content) + (1 << 20) else b""
    if not content.startswith(config.content) or content[len(config.content) :].strip():
        raise VerifyError(f"{config.name}: the result has other bytes than were written")


def _check_machine(made: NewMachine, file: File, target: Target) -> None:
    """Raises `VerifyError` if the configuration is read as another machine, on platforms whose reader reads it."""
    if not (target.format.can_read and target.format.probe(file)):
        return
    try:
        found = _without_directory(target.format.read(file, Opener(Registry())), target)
    except VmconvError as exc:
        raise VerifyError(f"the configuration cannot be read back: {exc}") from exc
    wanted = restricted(made.machine, target.format.carries)
    if restricted(found, target.format.carries) != wanted:
        there = dict(stated(found))
        path = next((path for path, value in stated(wanted) if there.get(path) != value), "")
        raise VerifyError(
            f"{file.name}: {path or 'a device'} is read back as {there.get(path)!r}",
            hint="this is a defect of vmconv or of the plugin, please report it; nothing was created",
        )


def _without_directory(machine: Machine, target: Target) -> Machine:
    """Returns the machine with plain names for files of the target's directory, for platforms with absolute paths."""
    # A platform with absolute paths may name the directory that the disks move to later.
    directory = os.path.normpath(getattr(target.options, "directory", "") or os.path.realpath(target.directory))

    def plain(part: Any) -> Any:
        inside = part.file is not None and os.path.normpath(os.path.dirname(part.file)) == directory
        return part.model_copy(update={"file": os.path.basename(part.file)}) if inside else part

    firmware = machine.firmware
    if firmware.nvram is not None:
        firmware = firmware.model_copy(update={"nvram": plain(firmware.nvram)})
    return machine.model_copy(update={"disks": tuple(map(plain, machine.disks)), "firmware": firmware})
