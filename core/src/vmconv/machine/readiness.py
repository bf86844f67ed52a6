"""Judges what is inside a guest's filesystems: whether it finds its disks and its network on the new machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vmconv.guest import Device, Facts, Kernel, Service, System, Volume, look
from vmconv.guest.filesystems import LIBRARIES
from vmconv.guest.protocol import Task
from vmconv.machine import drivers
from vmconv.machine.findings import Finding, Level

if TYPE_CHECKING:
    from vmconv.machine.model import Machine
    from vmconv.model.extents import Extents

HAVE_LIBRARIES = any(find_spec(name) for name in LIBRARIES.values())
"""Whether any library of the extra `vmconv[guest]` is installed."""

_PLACES = ("/dev/disk/by-path/", "/dev/disk/by-id/")


_MAKE_INITRAMFS = "rebuild the initramfs with it in the guest first, or leave it to virt-v2v-in-place"

_INSTALL = "install it in the guest before, or leave it to virt-v2v-in-place"
_DISABLED = 4


class Needs:
    """The drivers that a machine needs, for the disk it starts from, for its other disks, and for its network."""

    def __init__(self, machine: Machine, boot: int | None) -> None:
        found = [(f"disks[{n}]", drivers.of_disk(machine, disk)) for n, disk in enumerate(machine.disks)]
        self.disks = {path: one for path, one in found if one is not None}
        self.boot = "" if boot is None else f"disks[{boot}]"
        found = [(f"nics[{n}]", drivers.of_nic(nic)) for n, nic in enumerate(machine.nics)]
        self.nics = {path: one for path, one in found if one is not None}
        self.names = drivers.device_names(machine)

    def task(self, volumes: Sequence[Volume]) -> Task:
        """Returns the child's task."""
        every = [*self.disks.values(), *self.nics.values()]
        modules = {name for one in every for group in one.linux for name in group}
        services = {name for one in every for name in one.windows}
        return Task(tuple(volumes), tuple(sorted(modules)), tuple(sorted(services)))


def findings(disks: Sequence[Extents], volumes: Sequence[Volume], needs: Needs, *, moved: bool) -> Iterator[Finding]:
    """Yields what is found in the filesystems; `moved`: the machine is to be on another platform."""
    for volume in volumes:
        if volume.content == "btrfs":
            yield Finding("note", volume.where, "no library can read its filesystem (btrfs)")
    known = [volume for volume in volumes if volume.content in LIBRARIES]
    if known:
        yield from of_facts(look(disks, needs.task(known)), needs, moved=moved)


def of_facts(facts: Facts, needs: Needs, *, moved: bool) -> Iterator[Finding]:
    """Yields what facts mean for a machine."""
    for problem in facts.problems:
        yield Finding("note", problem.where or "disks", problem.text)
    for system in facts.systems:
        yield Finding("note", system.where, f"has {system.name or system.kind.capitalize()}")
        for device in system.devices:
            yield _of_device(system, device, needs, moved=moved)
        if system.kind == "linux":
            yield from _of_kernels(system, needs)
        else:
            yield from _of_windows(system, needs)
    if not facts.systems:
        yield Finding("note", "disks", "no operating system was found in the filesystems that can be read")


def _of_device(system: System, device: Device, needs: Needs, *, moved: bool) -> Finding:
    path = f"{system.where}: {device.file}:{device.line}"
    if device.name.startswith(_PLACES):
        known = not moved
        why = "made of the place of its controller or of its serial number"
    elif not needs.names or device.name.removeprefix("/dev/").startswith(tuple(needs.names)):
        known, why = True, "which depends on the order of the disks"
    else:
        known, why = (
            False,
            f"and the machine's disks are {' and '.join(f'/dev/{name}*' for name in sorted(needs.names))}",
        )
    level: Level = "note" if known else "error" if device.needed else "warning"
    return Finding(level, path, f"names {device.name} for {device.use}, {why}", "name it by UUID")


def _of_kernels(system: System, needs: Needs) -> Iterator[Finding]:
    if not system.kernels:
        yield Finding("warning", system.where, "the modules of no kernel were found: its drivers are not known")
    for position, kernel in enumerate(system.kernels):
        path = f"{system.where}: kernel {kernel.version}"
        if kernel.initramfs is None:
            yield Finding("note", path, "has no initramfs that was found")
        elif kernel.problem:
            yield Finding("warning", path, f"{kernel.initramfs} {kernel.problem}: its drivers are not known")
        # The newest is started by default; the others are there for the case that it fails.
        level: Level = "warning" if position else "error"
        for device, one in needs.disks.items():
            for group in one.linux:
                early = device == needs.boot
                yield from _of_driver(kernel, path, device, group, level if early else "warning", early=early)
        for device, one in needs.nics.items():
            for group in one.linux:
                yield from _of_driver(kernel, path, device, group, "warning", early=False)


def _of_driver(
    kernel: Kernel, path: str, device: str, group: tuple[str, ...], level: Level, *, early: bool
) -> Iterator[Finding]:
    """Yields what is wrong with a driver, of which one of `group` is enough; `early`: to start from the device."""
    names = " or ".join(group)
    if set(group) & set(kernel.builtin):
        return
    if not set(group) & set(kernel.modules):
        yield Finding(level, path, f"has no driver {names}, which {device} needs")
    elif early and not set(group) & set(kernel.inside) and not kernel.problem:
        where = f"{kernel.initramfs} lacks it" if kernel.initramfs else "it has no initramfs"
        yield Finding(level, path, f"has {names}, which {device} needs, as a module, and {where}", _MAKE_INITRAMFS)


def _of_windows(system: System, needs: Needs) -> Iterator[Finding]:
    if system.hibernated:
        hint = "turn fast startup off, and shut it down"
        yield Finding("warning", system.where, "is hibernated: it will be resumed, with the devices it had", hint)
    known = {service.name: service for service in system.services}
    for device, one in needs.disks.items():
        installed = [known[name] for name in one.windows if name in known]
        early = device == needs.boot
        if not any(_starts(service, early=early) for service in installed):
            level: Level = "error" if early else "warning"
            text = f"has no driver {' or '.join(one.windows)}, which {device} needs"
            if installed:
                text = f"has {installed[0].name}, which {device} needs, and {_why(installed[0])}"
            yield Finding(level, system.where, text, _INSTALL)
    for device, one in needs.nics.items():
        if one.windows and not any(name in known for name in one.windows):
            text = f"has no driver {' or '.join(one.windows)}, which {device} needs"
            yield Finding("warning", system.where, text, _INSTALL)


def _starts(service: Service, *, early: bool) -> bool:
    """True if a driver can start; `early`: with the kernel, as for the disk that Windows is on."""
    if not service.has_file or service.start is None or service.start == _DISABLED:
        return False
    return not early or (service.start == 0 and service.override in (None, 0))


def _why(service: Service) -> str:
    if not service.has_file:
        return "its file is missing"
    if service.start == _DISABLED:
        return "it is disabled"
    if service.start == 0:
        return f"its StartOverride is {service.override}, not 0"
    return f"its Start is {'not set' if service.start is None else service.start}, not 0"
