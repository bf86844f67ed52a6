"""The guest's operating system: names of vSphere, VirtualBox and CIM in one section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from vmconv.machine import GuestOS, guest, name_in

Kind = Literal["vsphere", "vbox", "cim"]

KINDS: tuple[Kind, ...] = ("vsphere", "vbox", "cim")
"""Kinds of names, the most telling first."""


def guest_of(stated: Mapping[Kind, str | None]) -> GuestOS:
    """Returns the system that the names stand for: the first known name decides, the others fill in.

    Raises `ValueError` if a name has control characters.
    """
    known = [guest(kind, name) for kind in KINDS if (name := stated[kind])]
    return GuestOS(
        id=next((each.id for each in known if each.id), None),
        architecture=next((each.architecture for each in known if each.architecture), None),
        source_id=known[0].source_id if known else None,
    )


def surplus(stated: Mapping[Kind, str | None], os: GuestOS) -> dict[str, str]:
    """Returns the settings for names that `written` would not find without them."""
    return {f"os.{kind}": name for kind, name in stated.items() if name and name != name_in(kind, os)}


def written(os: GuestOS, extra: Mapping[str, str]) -> dict[Kind, str | None]:
    """Returns the names to write for a system: the source's own if they stand for it, else those of the table."""
    # VirtualBox has an element of its own for its name, which other packages do not need.
    names: dict[Kind, str | None] = {"vsphere": name_in("vsphere", os), "vbox": None, "cim": name_in("cim", os)}
    stated = {kind: extra.get(f"os.{kind}") or name for kind, name in names.items()}
    found = guest_of(stated)
    return stated if (found.id, found.architecture) == (os.id, os.architecture) else names
