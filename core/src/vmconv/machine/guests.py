"""Names of guest operating systems in the terms of each platform, from one table.

    guest("vmx", "debian12-64")          # GuestOS(id="debian12", architecture="x86_64", source_id="debian12-64")
    name_in("proxmox", that)             # "l26"

The table `guests.tsv` joins facts that no single source has: libosinfo has no names of VMware, CIM and VirtualBox.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Literal, NamedTuple, get_args

from vmconv.machine.model import GuestOS

Kind = Literal["vmx", "vsphere", "cim", "vbox", "proxmox"]
"""VMX `guestOS`, vSphere `guestId`, OVF OperatingSystemSection `id`, VirtualBox and Proxmox OS types."""


class _Row(NamedTuple):
    id: str
    family: str
    architecture: str
    names: dict[str, tuple[str, ...]]
    """Names by kind; the first is written, and those without "!" are read."""

    @property
    def stem(self) -> str:
        """What the ids of this system begin with."""
        return self.id.removesuffix("*").removesuffix("-unknown")

    def reads(self, kind: str, text: str) -> bool:
        return text in (name.lower() for name in self.names[kind])

    def covers(self, osinfo: str) -> bool:
        """True if the row is the one of this id, or of all that begin so: `rhel1*` does not cover `rhel10`."""
        if osinfo == self.id:
            return True
        if not self.id.endswith(("*", "-unknown")) or not osinfo.startswith(self.stem):
            return False
        rest = osinfo[len(self.stem) :]
        return not (self.stem[-1:].isdigit() and rest[:1].isdigit())


@cache
def rows() -> tuple[_Row, ...]:
    """Returns the table, general rows before special ones and x86_64 before other architectures."""
    # importlib.resources would import zipfile and take longer than reading the table.
    with open(os.path.join(os.path.dirname(__file__), "guests.tsv"), encoding="utf-8") as file:
        lines = file.read().splitlines()
    head, *table = (line.split("\t") for line in lines if not line.startswith("#"))
    kinds = head[3:]
    return tuple(
        _Row(
            osinfo,
            family,
            architecture,
            {kind: tuple(names.split(",")) for kind, names in zip(kinds, cells, strict=True)},
        )
        for osinfo, family, architecture, *cells in table
    )


def guest(kind: Kind, text: str) -> GuestOS:
    """Returns the system that a platform calls `text`, in any case.

    A name that several systems share, such as `ubuntu-64`, gives only what they have in common. An unknown name is kept
    as `source_id`. Raises `ValueError` if the text has control characters.
    """
    found = [row for row in rows() if row.reads(kind, text.strip().lower())]
    ids, architectures = {row.id for row in found}, {row.architecture for row in found}
    return GuestOS.model_validate(
        {
            "id": _stated(ids.pop()) if len(ids) == 1 else None,
            "architecture": architectures.pop() if len(architectures) == 1 else None,
            "source_id": text.strip() or None,
        }
    )


def _stated(osinfo: str) -> str | None:
    return None if osinfo.endswith("*") else osinfo or None


def name_in(kind: Kind, os: GuestOS) -> str | None:
    """Returns what a platform calls a system: the name of its row, or else the general name of its family.

    A system without a row is "other". Returns None if nothing is known about the system.
    """
    if os == GuestOS():
        return None
    same = _candidates(os)
    fitting = [row for row in same if row.architecture == (os.architecture or row.architecture)]
    best = max(fitting, key=lambda row: (row.id in (os.id, os.source_id), len(row.stem)), default=None)
    row = best or _general(same[0].family if same else "other", os.architecture or "x86_64")
    return row.names[kind][0].strip("!")


def _candidates(os: GuestOS) -> list[_Row]:
    """Returns the rows of a system: by its id, or else by the name that its source has for it."""
    by_id = [row for row in rows() if row.id and os.id and row.covers(os.id)]
    text = (os.source_id or "").lower()
    return by_id or [row for row in rows() if any(row.reads(kind, text) for kind in get_args(Kind))]


def _general(family: str, architecture: str) -> _Row:
    general = [row for row in rows() if not row.id and row.architecture == architecture]
    return next((row for row in general if row.family == family), general[0])
