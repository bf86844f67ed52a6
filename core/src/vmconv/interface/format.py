"""The interface of a format plugin: typed calls; the hooks only register instances of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vmconv.io.opener import Opener
    from vmconv.model.image import Image
    from vmconv.model.layout import Backing, Layout, Placement
    from vmconv.model.sources import File


@dataclass(frozen=True)
class NoOptions:
    """The options of a format that has none."""


class CheckReport(NamedTuple):
    """What a check found: `corruptions` make wrong reads possible, `leaks` only waste space.

    `doubts` are what a check cannot tell, and `errors` what it could not look at: then it is not complete. `image_end`
    is the end of the last cluster in use, bytes.
    """

    corruptions: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    corruption_count: int = 0
    leak_count: int = 0
    allocated_clusters: int = 0
    total_clusters: int = 0
    image_end: int = 0
    doubts: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class Format:
    """One hypervisor format. A plugin subclasses it, fills in the names and overrides what the format can do.

    Keep the module that defines the subclass cheap to import (every start of vmconv imports it): import the reader
    and the writer inside the methods.
    """

    name: str
    title: str
    suffixes: tuple[str, ...] = ()
    """File name endings with their dot, lower case; the first is the one new files get."""
    carries: frozenset[str] = frozenset()
    """Fields of `Disk`, besides size and identity, that this format's writer stores."""
    can_read = True
    can_write = True
    supports_backing = False
    """True when the writer can keep a parent (`backing`)."""
    not_mountable: frozenset[str] = frozenset()
    """Values of the option `subformat` that no mount offers: to plan one is to read all payload, say, or it is no image
    without other files."""
    in_place = False
    """True when the writer can leave payload wherever it lies in a file (`Placement.carrier`)."""

    def options(self) -> type[Any]:
        """Returns the frozen dataclass of the writer's options; see `vmconv.model.options`."""
        return NoOptions

    def probe(self, file: File) -> bool:
        """True when the content of `file` begins (or ends) as this format's does. Reads little; never raises."""
        return False

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        """Returns the image in `file`.

        Checks the header now and the tables when they are asked for; raises `ImageError` for what is wrong, and opens
        other files only by `opener`. `snapshot` names the internal snapshot to read instead of the present state.
        """
        raise NotImplementedError(f"{self.name} has no reader")

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        """Returns the layout that holds `image.flat`, or `image.guest` on top of `backing`.

        A pure function: nothing is opened or written. Raises `PlanError` when the format cannot hold the disk.
        """
        raise NotImplementedError(f"{self.name} has no writer")

    def keeps_source(self, options: Any) -> bool:
        """True when these options make an image that holds nothing and has the source itself as its parent."""
        return False

    def qemu_incompatibility(self, image: Image) -> str | None:
        """Returns why QEMU cannot read this layer, or reads another disk in it; None when it reads the same."""
        return f"QEMU has no driver for {self.name}"

    def check(self, image: Image) -> CheckReport | None:
        """Returns what is wrong with the structure of `image`; None when the format has no structure to check."""
        return None
