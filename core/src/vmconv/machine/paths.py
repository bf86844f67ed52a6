"""Dotted paths of a machine's fields, and what a format does not carry.

`nics[1].mac` names one value; without indexes, `nics.mac`, it names the field of every device. A format carries a
path if its set `carries` has the path without indexes, or a path above it: `cpu` covers `cpu.count`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from vmconv.machine.model import About, ByCore, Machine, Unless

_INDEX = re.compile(r"\[\d+\]")


def stated(machine: Machine) -> Iterator[tuple[str, Any]]:
    """Yields the path and the value of each field that the machine states, devices in their order.

    A device without any stated field yields its own path and "present". `extra` yields one path for each format, such
    as `extra.vmx`, with all its settings.
    """
    yield from _fields(machine, "")


def _fields(part: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in type(part).model_fields.items():
        yield from _values(getattr(part, name), f"{prefix}{name}", optional=field.default is None)


def _values(value: Any, path: str, *, optional: bool) -> Iterator[tuple[str, Any]]:
    if value is None or value in ((), {}):
        return
    if isinstance(value, BaseModel):
        yield from _device(value, path) if optional else _fields(value, f"{path}.")
    elif isinstance(value, tuple) and isinstance(value[0], BaseModel):
        for number, item in enumerate(value):
            yield from _device(item, f"{path}[{number}]")
    elif isinstance(value, dict):
        yield from ((f"{path}.{key}", inner) for key, inner in value.items() if inner)
    else:
        yield path, value


def _device(part: BaseModel, path: str) -> Iterator[tuple[str, Any]]:
    yield from list(_fields(part, f"{path}.")) or [(path, "present")]


def still_states(after: Mapping[str, Any], path: str, value: Any) -> bool:
    """True if the fields `after` hold a value that `stated` yielded before. A present device may have gained fields."""
    if value == "present" and path not in after:
        return any(other.startswith(f"{path}.") for other in after)
    return bool(after.get(path) == value)


def plain(path: str) -> str:
    """Returns a path without indexes."""
    return _INDEX.sub("", path)


def is_field(path: str) -> bool:
    """True if machines have this field, with indexes or without, or vendor extras of this name."""
    from vmconv.machine.model import Machine

    parts: list[type[BaseModel]] = [Machine]
    names = plain(path).split(".")
    for number, name in enumerate(names):
        fields = [part.model_fields[name] for part in parts if name in part.model_fields]
        if not fields:
            return False
        if name == "extra" and number == 0:
            return True
        parts = [part for field in fields for part in _parts(field.annotation)]
    return True


@cache
def marks() -> dict[str, ByCore | Unless | About]:
    """Returns the marks of the model's fields, by their paths without indexes."""
    from vmconv.machine.model import Machine

    return dict(_marks(Machine, ""))


def _marks(part: type[BaseModel], prefix: str) -> Iterator[tuple[str, ByCore | Unless | About]]:
    from vmconv.machine.model import About, ByCore, Unless

    for name, field in part.model_fields.items():
        path = f"{prefix}{name}"
        yield from ((path, mark) for mark in field.metadata if isinstance(mark, (ByCore, Unless, About)))
        for inner in _parts(field.annotation):
            yield from _marks(inner, f"{path}.")


def _parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the parts of the model in an annotation, such as `Tpm` in `Tpm | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def carried(path: str, carries: Collection[str]) -> bool:
    """True if a format with this set carries the path, with indexes or without.

    The path of a whole device is carried if any of its fields is.
    """
    whole = plain(path)
    parts = whole.split(".")
    return any(".".join(parts[:count]) in carries for count in range(1, len(parts) + 1)) or _holds(whole, carries)


def _holds(path: str, carries: Collection[str]) -> bool:
    return any(each.startswith(f"{path}.") for each in carries)


def restricted(machine: Machine, carries: Collection[str]) -> Machine:
    """Returns the machine with only the carried fields. Devices of which no field is carried are left out.

    A required field of a device is kept with the device.
    """
    return type(machine)(**_kept(machine, "", carries))


def _kept(part: BaseModel, prefix: str, carries: Collection[str]) -> dict[str, Any]:
    """Returns the carried fields of a part, and those without which it cannot exist."""
    kept: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        path, value = f"{prefix}{name}", getattr(part, name)
        if isinstance(value, dict):
            kept[name] = {key: inner for key, inner in value.items() if carried(f"{path}.{key}", carries)}
        elif not (carried(path, carries) or field.is_required()):
            continue
        elif isinstance(value, BaseModel):
            kept[name] = type(value)(**_kept(value, f"{path}.", carries))
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            kept[name] = tuple(type(item)(**_kept(item, f"{path}.", carries)) for item in value)
        else:
            kept[name] = value
    return kept
