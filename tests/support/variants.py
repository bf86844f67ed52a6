"""Every writable format in each of its subformats, as the registry has them, and what other programs call them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import vmconv
from vmconv.io.registry import installed

QEMU_NAMES = {"vhd": "vpc"}
"""Where QEMU's name of a format is another one."""

Variant = tuple[str, str]
"""A format's name and the options of its writer as a user gives them, "" for none."""


def variants() -> list[Variant]:
    """Returns each format that can be read and written, with each of its subformats."""
    found = []
    for name, one in sorted(installed().formats.items()):
        if one.can_read and one.can_write:
            found += [(name, option) for option in _subformats(one.options())]
    return found


def self_contained() -> list[Variant]:
    """Returns the variants whose images hold their payload: the others are tested in test_references.py."""
    return [variant for variant in variants() if "reference" not in variant[1]]


def _subformats(model: type[Any]) -> list[str]:
    hints: Mapping[str, Any] = get_type_hints(model)
    subformat = hints.get("subformat")
    for hint in (subformat, *get_args(subformat)):
        if get_origin(hint) is Literal:
            return [f"subformat={value}" for value in get_args(hint)]
    # VDI has an option where others have a subformat.
    return ["static=off", "static=on"] if "static" in hints else [""]


def title(variant: Variant) -> str:
    """Returns a name for test ids and directories."""
    return "-".join(filter(None, [variant[0], variant[1].removeprefix("subformat=")]))


def options(variant: Variant) -> dict[str, str]:
    return dict(part.split("=") for part in variant[1].split(",") if part)


def has_identity(variant: Variant) -> bool:
    """True when images of the format have ids."""
    return hasattr(installed().formats[variant[0]].options()(), "identity")


def identified(variant: Variant, identity: str = "01234567-89ab-4cde-8f01-23456789abcd") -> dict[str, str]:
    """Returns the options with an identity, where the format takes one: with it, the same disk is the same image."""
    return options(variant) | ({"identity": identity} if has_identity(variant) else {})


def qemu_name(variant: Variant) -> str:
    return QEMU_NAMES.get(variant[0], variant[0])


def is_compressed(variant: Variant) -> bool:
    return "streamOptimized" in variant[1]


def make(raw: Path, variant: Variant, directory: Path, **arguments: Any) -> Path:
    """Returns an image of the variant with the content of a raw disk, in a new directory of its own."""
    folder = directory / title(variant)
    folder.mkdir()
    path = folder / f"disk{installed().formats[variant[0]].suffixes[0]}"
    vmconv.convert(str(raw), str(path), target_format=variant[0], options=options(variant), **arguments)
    return path
