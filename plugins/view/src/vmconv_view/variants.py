"""The variants in which an image is shown: each installed format of its kind, in each of its subformats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from vmconv.api import Registry
from vmconv.plugin import Format, FormatKind


class Variant(NamedTuple):
    """A format with options of its writer; `name` is that of the format, with the subformat unless default."""

    name: str
    format: Format
    options: Mapping[str, Any]


def variants(registry: Registry, kind: FormatKind = "disk") -> dict[str, Variant]:
    """Returns all variants of one kind by name, in order."""
    found = [
        Variant(name if value is None else f"{name}-{value}", one, {} if value is None else {"subformat": value})
        for name, one in sorted(registry.formats_of(kind).items())
        if one.can_write
        for value in _subformats(one)
    ]
    return {variant.name: variant for variant in found}


def _subformats(one: Format) -> list[str | None]:
    """Returns None for the default subformat, then the other mountable subformats."""
    model = one.options()
    hint: Any = get_type_hints(model).get("subformat")
    # An option whose default depends on others is a choice or None.
    values = next((get_args(each) for each in (hint, *get_args(hint)) if get_origin(each) is Literal), ())
    default = getattr(model(), "subformat", None)
    return [None, *(value for value in values if value != default and value not in one.not_mountable)]
