"""What the child found, as it is passed to the parent. All texts come from the guest: the parent escapes and judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_TEXT = 200
"""Characters of a text. Longer ones are cut."""

MAX_ITEMS = 64
"""Items of a list. Further ones are left out."""


@dataclass(frozen=True)
class Device:
    """A device that the guest names by the order or the place of its disks.

    `use` is the mount point, or the parameter of the kernel. `needed`: the guest does not start without it.
    """

    file: str
    line: int
    name: str
    use: str
    needed: bool


@dataclass(frozen=True)
class Kernel:
    """An installed kernel: which of the wanted drivers it has built in, as modules, and inside its initramfs.

    `initramfs` is the file's name, None without one. `problem` is the reason if it could not be read.
    """

    version: str
    builtin: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    initramfs: str | None = None
    inside: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Service:
    """A driver of Windows: its Start value, the value that overrides it, and whether its file exists."""

    name: str
    start: int | None
    override: int | None
    has_file: bool


@dataclass(frozen=True)
class System:
    """An operating system on the disks. `where` names its partition.

    `hibernated`: a file holds its memory, and it will be resumed rather than started.
    """

    kind: Literal["linux", "windows"]
    where: str
    name: str | None = None
    devices: tuple[Device, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    services: tuple[Service, ...] = ()
    hibernated: bool = False


@dataclass(frozen=True)
class Problem:
    """Why something could not be read; `where` is empty if it is about all disks."""

    where: str
    text: str


@dataclass(frozen=True)
class Facts:
    """All systems on the disks, and what could not be read."""

    systems: tuple[System, ...] = ()
    problems: tuple[Problem, ...] = ()


def cut(text: str) -> str:
    """Returns a text of the guest with at most `MAX_TEXT` characters."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
