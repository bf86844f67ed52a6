"""The variants in which an image is shown: each installed format of its kind, in each of its subformats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from vmconv.api import Registry, did_you_mean
from vmconv.plugin import Format, FormatKind, UsageError

PARTITIONS = "partitions"
"""The directory of a disk's partitions, beside those of the formats."""


class Variant(NamedTuple):
    """A format with options of its writer; `name` is that of the format, with the subformat unless default."""

    name: str
    format: Format
    options: Mapping[str, Any]

    def parsed(self) -> Any:
        """Returns the options as an instance of the format's dataclass."""
        return self.format.options()(**self.options)


class Partitions:
    """The partitions of a disk as files, which only reading the disk tells."""

    name = PARTITIONS


Shown = Variant | Partitions


def shown(registry: Registry, kind: FormatKind, wanted: Collection[str] = ()) -> dict[str, Shown]:
    """Returns `variants` with the partitions of a disk, by name."""
    found: dict[str, Shown] = {**variants(registry, kind, wanted)}
    if kind == "disk" and (not wanted or PARTITIONS in wanted):
        found[PARTITIONS] = Partitions()
    return found


def variants(registry: Registry, kind: FormatKind = "disk", wanted: Collection[str] = ()) -> dict[str, Variant]:
    """Returns all variants of one kind by name, in order.

    With `wanted`, only those named there: by their own name, or by that of their format for all its variants.
    """
    found = [
        Variant(name if value is None else f"{name}-{value}", one, {} if value is None else {"subformat": value})
        for name, one in sorted(registry.formats_of(kind).items())
        if one.can_write
        for value in _subformats(one)
    ]
    return {each.name: each for each in found if not wanted or each.name in wanted or each.format.name in wanted}


def refuse_unknown(registry: Registry, wanted: Collection[str]) -> None:
    """Raises `UsageError` for a name that is neither that of a variant nor of a format that can be written."""
    kinds: tuple[FormatKind, ...] = ("disk", "memory")
    every = [each for kind in kinds for each in variants(registry, kind).values()]
    known = {PARTITIONS, *(name for each in every for name in (each.name, each.format.name))}
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"--formats: {name!r} is no format that a mount shows",
                hint=f"{did_you_mean(name, known)}formats are {', '.join(sorted(known))}",
            )


def _subformats(one: Format) -> list[str | None]:
    """Returns None for the default subformat, then the other mountable subformats."""
    model = one.options()
    hint: Any = get_type_hints(model).get("subformat")
    # An option whose default depends on others is a choice or None.
    values = next((get_args(each) for each in (hint, *get_args(hint)) if get_origin(each) is Literal), ())
    default = getattr(model(), "subformat", None)
    return [None, *(value for value in values if value != default and value not in one.not_mountable)]
