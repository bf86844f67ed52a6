"""The reference of machine formats: what each carries of a machine, and what becomes of models it does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from vmconv.errors import PlanError
from vmconv.interface.machines import MachineFormat
from vmconv.io.registry import installed_machines
from vmconv.machine import (
    CONTROLLER_MODELS,
    NIC_MODELS,
    Controller,
    Cpu,
    Disk,
    Firmware,
    GuestOS,
    Machine,
    Memory,
    Nic,
    carried,
)
from vmconv.model.options import describe, parse_options

_HIDDEN = {"extra", "identity.uuid_text", "disks.file_size", "disks.image_uuid"}
_HIDDEN |= {f"disks.layers.{name}" for name in ("file", "format", "image_uuid")}
"""Fields that a conversion uses and people do not set."""

_BUSES = {"ahci": "sata", "nvme": "nvme", "virtio-blk": "virtio", "piix3": "ide", "piix4": "ide", "ich6": "ide"}


_PLAIN: dict[str, Any] = {
    "name": "x",
    "os": GuestOS(id="debian12", architecture="x86_64"),
    "cpu": Cpu(count=1),
    "memory": Memory(size=1 << 30),
    "firmware": Firmware(kind="bios"),
}
"""A Linux machine with a BIOS, which every platform takes."""


def shipped(distributions: set[str]) -> list[MachineFormat]:
    """Returns the machine formats of these distributions, by name."""
    registry = installed_machines()
    return [one for name, one in sorted(registry.machines.items()) if registry.owners["machine", name] in distributions]


def page(formats: list[MachineFormat]) -> str:
    """Returns the page on all machine formats."""
    head = ["# Machine formats", "<!-- Written by docs/generate.py from the machine formats. Do not edit. -->"]
    parts = [
        *head,
        "`vmconv machine formats` lists what is installed. [Machines](../guide/machines.md) explains the commands.",
        "\n".join(_table(["format", "reads", "writes", "suffixes", "disks"], map(_summary, formats))),
        "## Fields that a format carries",
        "A field that the target does not carry is reported as lost, with its value. Settings that only one platform\n"
        "knows are kept in conversions to the same format.",
        "\n".join(_table(["field", *(one.name for one in formats)], _fields(formats))),
        "## Models that change",
        "For a Linux machine with a BIOS. An empty cell means that the model stays as it is. `vmconv machine plan`\n"
        "prints the reason for each change.",
        "\n".join(_table(["network card", *_writers(formats)], _models(formats, NIC_MODELS, _nic))),
        "\n".join(_table(["controller", *_writers(formats)], _models(formats, CONTROLLER_MODELS, _controller))),
    ]
    for one in formats:
        parts += _options(one)
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _summary(one: MachineFormat) -> list[str]:
    suffixes = ", ".join(f"`{suffix}`" for suffix in one.suffixes)
    return [one.name, _yes(one.can_read), _yes(one.can_write), suffixes, one.disk_format]


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _fields(formats: list[MachineFormat]) -> Iterator[list[str]]:
    for path in _paths(Machine, ""):
        if path not in _HIDDEN:
            yield [f"`{path}`", *(_yes(carried(path, one.carries)) for one in formats)]


def _paths(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yields the paths of all fields below a part of the model."""
    for name, field in kind.model_fields.items():
        part = _part(field.annotation)
        if part is None:
            yield f"{prefix}{name}"
        else:
            yield from _paths(part, f"{prefix}{name}.")


def _part(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _part(inner))), None)


def _writers(formats: list[MachineFormat]) -> list[str]:
    return [one.name for one in formats if one.can_write]


def _models(formats: list[MachineFormat], models: tuple[str, ...], make: Any) -> Iterator[list[str]]:
    for model in models:
        yield [model, *(_after(one, make(model)) for one in formats if one.can_write)]


def _nic(model: str) -> tuple[Machine, str]:
    return Machine(**_PLAIN, nics=(Nic(model=model),)), "nics"


def _controller(model: str) -> tuple[Machine, str]:
    bus: Any = _BUSES.get(model, "scsi")
    disk = Disk(file="x", bus=bus, controller=0, unit=0)
    return Machine(**_PLAIN, controllers=(Controller(bus=bus, model=model),), disks=(disk,)), "controllers"


def _after(one: MachineFormat, made: tuple[Machine, str]) -> str:
    """Returns what a platform makes of the only model of a machine; empty if it keeps it."""
    machine, path = made
    try:
        adapted = one.adapt(machine, parse_options(one.options(), {}, one.name)).machine
    except PlanError:
        return "refused"
    before, after = getattr(machine, path)[0].model, [each.model for each in getattr(adapted, path)]
    if not carried(f"{path}.model", one.carries):
        return "not stated"
    return "" if before in after else ", ".join(str(model) for model in after) or "none"


def _options(one: MachineFormat) -> Iterator[str]:
    yield f"## {one.name}"
    yield f"{one.title[0].upper()}{one.title[1:]}."
    rows = [[f"`{o.name}`", f"`{o.default}`", _cell(o.help)] for o in describe(one.options())]
    yield "\n".join(_table(["option", "default", "meaning"], rows)) if rows else "No options."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
