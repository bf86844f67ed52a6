"""The interface of formats; the hooks only register instances of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vmconv.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmconv.io.opener import Opener
    from vmconv.model.draft import Draft
    from vmconv.model.extents import Column
    from vmconv.model.image import Image
    from vmconv.model.layer import WritableLayer
    from vmconv.model.layout import Backing, Layout, Placement
    from vmconv.model.sources import Decoded, Encryptor, File


FormatKind = Literal["disk", "memory"]
"""What the images of a format hold: a disk, or the memory of a machine. No conversion leads from one to the other."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a format without options."""


class CheckReport(NamedTuple):
    """The result of a check: `corruptions` make wrong reads possible, `leaks` only waste space.

    `doubts` are undecidable findings. `errors` name parts that could not be read, so the check is incomplete.
    `image_end` is the end of the last cluster in use, in bytes.
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


BitmapVerb = Literal["add", "remove", "clear", "enable", "disable", "merge"]


class BitmapChange(NamedTuple):
    """A change of a bitmap. One that is added has `granularity` bytes for each bit, 0 for the format's choice.

    `source` is the bitmap whose bits are merged into it, of `source_image` or of the same image.
    """

    verb: BitmapVerb
    granularity: int = 0
    source: str = ""
    source_image: Image | None = None


SnapshotVerb = Literal["create", "delete", "apply"]


class SnapshotChange(NamedTuple):
    """A change of internal snapshots: the one named `name` is taken, deleted, or becomes the disk.

    `time` is that of a new snapshot, nanoseconds since the epoch.
    """

    verb: SnapshotVerb
    name: str
    time: int = 0


class Encryption(NamedTuple):
    """How the payload of a file is encrypted: `facts` for `info`, under QEMU's names, without a passphrase.

    `decrypted(size)` returns the first `size` bytes of the file as they are decrypted: its sectors are numbered from
    its beginning. It derives the key from the user's passphrases, and raises `SecretError` if there are none.
    """

    facts: Mapping[str, Any]
    decrypted: Callable[[int], Decoded]


class Format:
    """One image format. A plugin subclasses it, sets the names and overrides the supported operations.

    Keep the module of the subclass cheap to import, because each start of vmconv imports it: import the reader and the
    writer inside the methods.
    """

    name: str
    title: str
    kind: FormatKind = "disk"
    suffixes: tuple[str, ...] = ()
    """Suffixes with their dot, lower case. New files get the first."""
    plain_suffixes: frozenset[str] = frozenset()
    """Those of the suffixes whose files have no signature, so that the name alone decides."""
    carries: frozenset[str] = frozenset()
    """Fields of `DiskFacts`, besides the identity, that the writer stores."""
    carries_state: frozenset[str] = frozenset()
    """Parts of `Image.state` that the writer stores."""
    keeps_holes = True
    """For memory: False if the images cannot state where the machine has no RAM, and have zeros there."""
    can_read = True
    can_write = True
    supports_backing = False
    """True if the writer accepts a parent (`backing`)."""
    not_mountable: frozenset[str] = frozenset()
    """Values of the option `subformat` that mounts leave out, because planning reads all payload, for example, or the
    image needs other files."""
    keeps_bitmaps = False
    """True if `with_bitmaps` reads persistent bitmaps and the writer stores `Image.bitmaps`."""
    compressing: Mapping[str, str] = MappingProxyType({})
    """The writer's options that compress all payload, for `convert -c`; none if it cannot."""
    encrypts_with: str | None = None
    """The format whose header the writer puts into an image that it encrypts (`Placement.encryptor`); None if it never
    does."""
    in_place = False
    """True if the writer supports `Placement.carrier`: payload stays at its offset in a file."""

    def options(self) -> type[Any]:
        """Returns the frozen dataclass of the writer's options; see `vmconv.model.options`."""
        return NoOptions

    def options_of(self, image: Image) -> Any:
        """Returns the options with which the writer makes an image like this one: subformat, block sizes, identity.

        Raises `PlanError` if the writer makes none like it.
        """
        if self.options() is not NoOptions:
            from vmconv.errors import PlanError

            raise PlanError(f"{image.file.name}: {self.name} does not tell the options of an image")
        return NoOptions()

    def probe(self, file: File) -> bool:
        """True if `file` has this format's signature. Reads little; never raises."""
        return False

    def read(self, file: File, opener: Opener, *, snapshot: str | None = None) -> Image:
        """Returns the image in `file`.

        Checks the header now and the tables on demand. Opens other files only by `opener`. `snapshot` names an internal
        snapshot to read instead of the current state. Raises `ImageError` if the image is damaged or not supported.
        """
        raise NotImplementedError(f"{self.name} has no reader")

    def encryption(self, file: File, opener: Opener, offset: int, length: int) -> Encryption:
        """Returns what a header of this format says that lies inside an image of another, at bytes `[offset, offset +
        length)` of `file`. Raises `ImageError` if it is damaged or not supported.
        """
        raise NotImplementedError(f"{self.name} is no encryption")

    def encryptor(self, passphrase: bytes) -> Encryptor:
        """Returns the encryption of a new image of another format, with a header of this one and a random key.

        Raises `AccessError` for a passphrase that readers of such images do not take.
        """
        raise NotImplementedError(f"{self.name} encrypts no images")

    def write(self, image: Image, options: Any, placement: Placement, *, backing: Backing | None = None) -> Layout:
        """Returns the layout of `image.flat`, or of `image.guest` on top of `backing`.

        A pure function: it opens and writes nothing. Raises `PlanError` if the format cannot store the disk.
        """
        raise NotImplementedError(f"{self.name} has no writer")

    def file_names(self, options: Any, name: str, size: int) -> tuple[str, ...]:
        """Returns the names of the files that `write` makes of an image of `size` bytes; `name`, the target, is last.

        A mount lists them without planning. It never asks for subformats in `not_mountable`.
        """
        return (name,)

    def keeps_source(self, options: Any) -> bool:
        """True if these options make an empty overlay with the source itself as its backing file."""
        return False

    def dirty_ranges(self, image: Image, bitmap: str) -> tuple[Column, Column]:
        """Returns `(start, length)` of the ranges of the disk that a bitmap in `image` has as written, in bytes.

        They are sorted, and may touch. Raises `UsageError` if there is no such bitmap, `PlanError` if it may lack
        writes.
        """
        raise UsageError(f"{image.file.name}: {self.name} has no bitmaps")

    def bitmaps_size(self, image: Image, options: Any) -> int | None:
        """Returns how many bytes copies of the bitmaps of `image` would take in an image of this format.

        None if `image` or this format can have no bitmaps.
        """
        return None

    def with_bitmaps(self, image: Image, *, skip_broken: bool) -> Image:
        """Returns the image with its persistent bitmaps to carry over.

        `skip_broken` leaves out those that cannot be; else they are a `PlanError`.
        """
        raise UsageError(f"{image.file.name}: {self.name} has no bitmaps")

    def qemu_incompatibility(self, image: Image) -> str | None:
        """Returns why QEMU cannot read this layer, or reads other bytes; None if it reads the same."""
        return f"QEMU has no driver for {self.name}"

    def set_parent(self, image: Image, parent: Backing | None) -> Draft:
        """Returns the file of `image` with another stored parent, or none; the parent is not opened.

        Raises `PlanError` if the format has no parents, or the file has no room for the name.
        """
        from vmconv.errors import PlanError

        raise PlanError(f"{image.file.name}: {self.name} stores no name of a parent that could change")

    def open_layer(self, image: Image, descriptor: int) -> WritableLayer:
        """Returns the disk of `image` for a guest that writes; writes go to its file, open for writing as `descriptor`.

        The layer closes the descriptor. Raises `PlanError` if vmconv cannot write to images of this form while they are
        in use; the descriptor stays open then.
        """
        from vmconv.errors import PlanError

        raise PlanError(f"{image.file.name}: vmconv does not write to {self.name} while it is in use")

    def change_snapshots(self, image: Image, change: SnapshotChange) -> Draft:
        """Returns the file of `image` after a change of its internal snapshots.

        Raises `PlanError` if the format has none, or the image has no room; `UsageError` for an unknown name.
        """
        from vmconv.errors import PlanError

        raise PlanError(f"{image.file.name}: {self.name} has no internal snapshots that vmconv changes")

    def change_bitmaps(self, image: Image, name: str, changes: Sequence[BitmapChange]) -> Draft:
        """Returns the file of `image` after changes of the bitmap `name`, in their order.

        Raises `PlanError` if the format has none, or the image has no room; `UsageError` for an unknown name.
        """
        from vmconv.errors import PlanError

        raise PlanError(f"{image.file.name}: {self.name} has no bitmaps that vmconv changes")

    def repair(self, image: Image, *, errors: bool) -> Draft | None:
        """Returns the file of `image` with what can be derived made right; without `errors` only leaks.

        None, or a draft without changes, if nothing can be repaired. The guest's content does not change.
        """
        return None

    def check(self, image: Image) -> CheckReport | None:
        """Returns the defects in the structure of `image`; None if the format has no structure to check."""
        return None
